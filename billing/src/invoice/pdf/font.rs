//! The one font of an invoice: measured, and embedded with the glyphs that it used.
//!
//! Latin, Greek, Cyrillic, Armenian and Georgian are built in (DejaVu Sans). Other scripts need a TrueType font of the
//! operator's. There is no shaping and no right-to-left order: a character is a glyph, and a character that the font
//! does not have is the font's box.

use std::collections::BTreeMap;

use pdf_writer::{
    Name, Pdf, Ref, Str,
    types::{CidFontType, FontFlags, SystemInfo, UnicodeCmap},
};
use subsetter::GlyphRemapper;
use ttf_parser::Face;

/// See `assets/DejaVuSans-LICENSE.txt`.
const BUILT_IN: &[u8] = include_bytes!("../../../assets/DejaVuSans.ttf");
/// Six letters and a plus mark a font that is not whole.
const BASE_NAME: Name<'static> = Name(b"SLUICE+InvoiceFont");
const IDENTITY: SystemInfo<'static> =
    SystemInfo { registry: Str(b"Adobe"), ordering: Str(b"Identity"), supplement: 0 };

/// Why a font is refused.
#[derive(Debug, thiserror::Error)]
pub enum FontError {
    #[error("the font is not a TrueType file; take a .ttf with outlines of its own, not a collection or CFF")]
    NotTrueType,
    #[error("the font cannot be reduced to the glyphs that are used")]
    Subset(#[source] subsetter::Error),
}

/// A parsed font.
pub(super) struct Font<'a> {
    data: &'a [u8],
    face: Face<'a>,
}

/// The glyphs of a font that a document used, numbered anew.
#[derive(Default)]
pub(super) struct Glyphs {
    remapper: GlyphRemapper,
    chars: BTreeMap<u16, char>,
}

/// The objects that a font takes.
pub(super) struct FontIds {
    pub font: Ref,
    pub cid: Ref,
    pub descriptor: Ref,
    pub data: Ref,
    pub unicode: Ref,
}

impl<'a> Font<'a> {
    pub fn parse(data: Option<&'a [u8]>) -> Result<Font<'a>, FontError> {
        let data = data.unwrap_or(BUILT_IN);
        let face = Face::parse(data, 0).map_err(|_| FontError::NotTrueType)?;
        match face.tables().glyf {
            Some(_) => Ok(Font { data, face }),
            None => Err(FontError::NotTrueType),
        }
    }

    /// The width of a text at a size, in points.
    pub fn width(&self, text: &str, size: f32) -> f32 {
        text.chars().map(|c| self.advance(self.glyph(c))).sum::<f32>() * size / 1000.0
    }

    /// 0, the font's box, where it has no glyph.
    fn glyph(&self, c: char) -> u16 {
        self.face.glyph_index(c).map_or(0, |id| id.0)
    }

    /// In thousandths of the size.
    fn advance(&self, glyph: u16) -> f32 {
        let units = self.face.glyph_hor_advance(ttf_parser::GlyphId(glyph)).unwrap_or(0);
        f32::from(units) * self.scale()
    }

    fn scale(&self) -> f32 {
        1000.0 / f32::from(self.face.units_per_em())
    }

    /// Writes the font with the glyphs that were used.
    pub fn embed(&self, pdf: &mut Pdf, ids: &FontIds, glyphs: &Glyphs) -> Result<(), FontError> {
        let subset = subsetter::subset(self.data, 0, &glyphs.remapper).map_err(FontError::Subset)?;
        pdf.stream(ids.data, &subset).pair(Name(b"Length1"), i32::try_from(subset.len()).unwrap_or(i32::MAX));
        pdf.type0_font(ids.font)
            .base_font(BASE_NAME)
            .encoding_predefined(Name(b"Identity-H"))
            .descendant_font(ids.cid)
            .to_unicode(ids.unicode);
        let mut cid = pdf.cid_font(ids.cid);
        cid.subtype(CidFontType::Type2)
            .base_font(BASE_NAME)
            .system_info(IDENTITY)
            .font_descriptor(ids.descriptor)
            .default_width(0.0)
            .cid_to_gid_map_predefined(Name(b"Identity"));
        cid.widths().consecutive(0, glyphs.remapper.remapped_gids().map(|glyph| self.advance(glyph)));
        drop(cid);
        let bounds = self.face.global_bounding_box();
        let scaled = |units: i16| f32::from(units) * self.scale();
        pdf.font_descriptor(ids.descriptor)
            .name(BASE_NAME)
            .flags(FontFlags::SYMBOLIC)
            .bbox(pdf_writer::Rect::new(
                scaled(bounds.x_min),
                scaled(bounds.y_min),
                scaled(bounds.x_max),
                scaled(bounds.y_max),
            ))
            .italic_angle(0.0)
            .ascent(scaled(self.face.ascender()))
            .descent(scaled(self.face.descender()))
            .cap_height(scaled(self.face.capital_height().unwrap_or(self.face.ascender())))
            .stem_v(80.0)
            .font_file2(ids.data);
        let mut unicode = UnicodeCmap::new(Name(b"Invoice"), IDENTITY);
        unicode.pair(0_u16, char::REPLACEMENT_CHARACTER);
        for (&glyph, &c) in glyphs.chars.iter().filter(|(glyph, _)| **glyph != 0) {
            unicode.pair(glyph, c);
        }
        let unicode = unicode.finish();
        pdf.cmap(ids.unicode, &unicode).name(Name(b"Invoice")).system_info(IDENTITY);
        Ok(())
    }
}

impl Glyphs {
    /// The text as the new numbers of its glyphs, two bytes each.
    pub fn encode(&mut self, font: &Font<'_>, text: &str) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(text.len() * 2);
        for c in text.chars() {
            let glyph = self.remapper.remap(font.glyph(c));
            self.chars.entry(glyph).or_insert(c);
            bytes.extend(glyph.to_be_bytes());
        }
        bytes
    }
}
