//! An invoice as PDF: A4, one table over as many pages as it takes, selectable text.
//!
//! The same invoice and font give the same bytes: nothing in it comes from a clock or from chance.

mod font;

use pdf_writer::{Content, Name, Pdf, Rect, Ref, Str, TextStr, types::TextRenderingMode};

pub use self::font::FontError;
use self::font::{Font, FontIds, Glyphs};
use super::{
    document::{Invoice, InvoiceKind, Party},
    line::{InvoiceLine, LineKind},
};
use crate::money::Total;

/// Points.
const PAGE: (f32, f32) = (595.0, 842.0);
const LEFT: f32 = 56.0;
const RIGHT: f32 = PAGE.0 - LEFT;
const TOP: f32 = 786.0;
const BOTTOM: f32 = 84.0;
const FOOT: f32 = 44.0;
const TEXT: f32 = 9.0;
const LEADING: f32 = 13.0;
/// Description and project from their left edges, quantity and amount to their right ones.
const PROJECT_AT: f32 = 290.0;
const QUANTITY_TO: f32 = 468.0;
const DESCRIPTION_WIDTH: f32 = PROJECT_AT - LEFT - 10.0;
const PROJECT_WIDTH: f32 = 90.0;
/// Addresses of more lines than this are cut: the table must have room on the first page.
const ADDRESS_LINES_MAX: usize = 12;
const FONT: Name<'static> = Name(b"F");

/// Draws an invoice; `font` is a TrueType file where the built-in one has not all characters.
pub fn render(invoice: &Invoice, font: Option<&[u8]>) -> Result<Vec<u8>, FontError> {
    let font = Font::parse(font)?;
    let mut sheet = Sheet { font: &font, glyphs: Glyphs::default(), pages: vec![Content::new()], y: TOP };
    sheet.head(invoice);
    sheet.table(invoice);
    sheet.totals(invoice);
    sheet.feet(invoice);
    sheet.finish(invoice)
}

/// Whether a font can be used.
pub fn check_font(font: &[u8]) -> Result<(), FontError> {
    Font::parse(Some(font)).map(drop)
}

/// Pages that are written from top to bottom.
struct Sheet<'a> {
    font: &'a Font<'a>,
    glyphs: Glyphs,
    pages: Vec<Content>,
    y: f32,
}

#[derive(Clone, Copy)]
enum Weight {
    Regular,
    Bold,
}

impl Sheet<'_> {
    fn head(&mut self, invoice: &Invoice) {
        let (title, whose) = match invoice.kind {
            InvoiceKind::Invoice => ("Invoice", "Bill to"),
            InvoiceKind::Statement => ("Statement", "Account of"),
        };
        self.text(LEFT, 18.0, Weight::Bold, title);
        self.y -= 2.0 * LEADING;
        let top = self.y;
        for (name, value) in [
            ("Number", invoice.number.clone()),
            ("Account", invoice.account.to_string()),
            ("Month", format!("{} (UTC)", invoice.period)),
            ("Issued", invoice.issued_at.date().to_string()),
            ("Due", invoice.due_at.date().to_string()),
        ] {
            if name == "Due" && invoice.kind == InvoiceKind::Statement {
                continue;
            }
            self.text(LEFT, TEXT, Weight::Regular, name);
            self.text(LEFT + 60.0, TEXT, Weight::Regular, &value);
            self.y -= LEADING;
        }
        let facts_end = self.y;
        self.y = top;
        self.party(PROJECT_AT, "From", &invoice.issuer);
        self.y = self.y.min(facts_end) - LEADING;
        self.party(LEFT, whose, &invoice.customer);
        self.y -= LEADING;
    }

    fn party(&mut self, x: f32, title: &str, party: &Party) {
        self.text(x, TEXT, Weight::Bold, title);
        self.y -= LEADING;
        let place = [party.region.as_deref(), party.country.as_deref()];
        let place: Vec<&str> = place.into_iter().flatten().collect();
        let lines = [party.name.clone()]
            .into_iter()
            .chain(party.address.iter().cloned())
            .chain([place.join(", ")])
            .chain(party.tax_id.iter().map(|id| format!("Tax ID {id}")))
            .chain(party.email.clone())
            .filter(|line| !line.is_empty());
        let wrapped: Vec<String> = lines.flat_map(|line| self.wrap(&line, RIGHT - PROJECT_AT)).collect();
        for line in wrapped.iter().take(ADDRESS_LINES_MAX) {
            self.text(x, TEXT, Weight::Regular, line);
            self.y -= LEADING;
        }
    }

    fn table(&mut self, invoice: &Invoice) {
        self.table_head();
        for line in invoice.lines.iter().filter(|line| line.kind != LineKind::Tax) {
            self.row(line);
        }
        self.rule();
    }

    fn table_head(&mut self) {
        self.text(LEFT, TEXT, Weight::Bold, "Description");
        self.text(PROJECT_AT, TEXT, Weight::Bold, "Project");
        self.text_to(QUANTITY_TO, TEXT, Weight::Bold, "Quantity");
        self.text_to(RIGHT, TEXT, Weight::Bold, "Amount USD");
        self.y -= 5.0;
        self.rule();
    }

    fn row(&mut self, line: &InvoiceLine) {
        let description = self.wrap(&line.description, DESCRIPTION_WIDTH);
        let project = self.wrap(&line.project, PROJECT_WIDTH);
        let quantity = match line.quantity {
            0 => String::new(),
            quantity => format!("{} {}", grouped(&quantity.to_string()), line.unit),
        };
        for index in 0..description.len().max(project.len()).max(1) {
            if self.y < BOTTOM {
                self.turn();
                self.table_head();
            }
            if let Some(text) = description.get(index) {
                self.text(LEFT, TEXT, Weight::Regular, text);
            }
            if let Some(text) = project.get(index) {
                self.text(PROJECT_AT, TEXT, Weight::Regular, text);
            }
            if index == 0 {
                self.text_to(QUANTITY_TO, TEXT, Weight::Regular, &quantity);
                self.text_to(RIGHT, TEXT, Weight::Regular, &line.amount.to_usd_string());
            }
            self.y -= LEADING;
        }
    }

    fn totals(&mut self, invoice: &Invoice) {
        let totals = invoice.totals();
        let taxes: Vec<&InvoiceLine> =
            invoice.lines.iter().filter(|line| line.kind == LineKind::Tax).collect();
        let notes =
            invoice.tax_note.iter().flat_map(|note| self.wrap(note, RIGHT - LEFT)).collect::<Vec<_>>();
        let needed = (taxes.len() + notes.len() + 4) as f32 * LEADING;
        if self.y - needed < BOTTOM {
            self.turn();
        }
        self.sum(Weight::Regular, "Subtotal", totals.charged + totals.credit);
        for tax in taxes {
            self.sum(Weight::Regular, &tax.description, tax.amount.into());
        }
        self.sum(Weight::Bold, "Amount due USD", totals.due);
        self.y -= LEADING;
        for note in notes {
            self.text(LEFT, TEXT, Weight::Regular, &note);
            self.y -= LEADING;
        }
    }

    fn sum(&mut self, weight: Weight, name: &str, amount: Total) {
        self.text(PROJECT_AT, TEXT, weight, name);
        self.text_to(RIGHT, TEXT, weight, &amount.to_usd_string());
        self.y -= LEADING;
    }

    fn feet(&mut self, invoice: &Invoice) {
        let pages = std::mem::take(&mut self.pages);
        let count = pages.len();
        for (index, page) in pages.into_iter().enumerate() {
            self.pages.push(page);
            self.y = FOOT;
            self.text(LEFT, 7.0, Weight::Regular, &invoice.number);
            self.text_to(RIGHT, 7.0, Weight::Regular, &format!("Page {} of {count}", index + 1));
        }
    }

    fn turn(&mut self) {
        self.pages.push(Content::new());
        self.y = TOP;
    }

    fn page(&mut self) -> &mut Content {
        self.pages.last_mut().expect("a sheet has a page")
    }

    fn text_to(&mut self, right: f32, size: f32, weight: Weight, text: &str) {
        self.text(right - self.font.width(text, size), size, weight, text);
    }

    fn text(&mut self, x: f32, size: f32, weight: Weight, text: &str) {
        if text.is_empty() {
            return;
        }
        let bytes = self.glyphs.encode(self.font, text);
        let y = self.y;
        let page = self.page();
        page.begin_text().set_font(FONT, size);
        // One font: bold is its outline, drawn.
        match weight {
            Weight::Regular => page.set_text_rendering_mode(TextRenderingMode::Fill),
            Weight::Bold => {
                page.set_line_width(size / 36.0).set_text_rendering_mode(TextRenderingMode::FillStroke)
            }
        };
        page.next_line(x, y).show(Str(&bytes)).end_text();
    }

    fn rule(&mut self) {
        let y = self.y;
        self.page().set_line_width(0.5).move_to(LEFT, y).line_to(RIGHT, y).stroke();
        self.y -= LEADING;
    }

    /// Breaks a text at spaces, and a word that is wider than a line anywhere.
    fn wrap(&self, text: &str, width: f32) -> Vec<String> {
        let fits = |line: &str| self.font.width(line, TEXT) <= width;
        let mut lines = Vec::new();
        let mut line = String::new();
        for word in text.split_whitespace() {
            let longer = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
            if fits(&longer) {
                line = longer;
                continue;
            }
            if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
            }
            for c in word.chars() {
                line.push(c);
                if !fits(&line) && line.chars().count() > 1 {
                    line.pop();
                    lines.push(std::mem::replace(&mut line, c.to_string()));
                }
            }
        }
        if !line.is_empty() {
            lines.push(line);
        }
        lines
    }

    fn finish(self, invoice: &Invoice) -> Result<Vec<u8>, FontError> {
        let id = |number: usize| Ref::new(i32::try_from(number).expect("an invoice has few pages"));
        let (catalog, tree, info) = (id(1), id(2), id(3));
        let font_ids = FontIds { font: id(4), cid: id(5), descriptor: id(6), data: id(7), unicode: id(8) };
        let page_id = |index: usize| id(9 + 2 * index);
        let mut pdf = Pdf::new();
        pdf.catalog(catalog).pages(tree).lang(TextStr("en"));
        let title = format!("{} {}", invoice.kind.as_str(), invoice.number);
        pdf.document_info(info)
            .title(TextStr(&title))
            .author(TextStr(&invoice.issuer.name))
            .creator(TextStr("Sluice"));
        let count = self.pages.len();
        pdf.pages(tree).kids((0..count).map(page_id)).count(i32::try_from(count).unwrap_or(i32::MAX));
        for (index, content) in self.pages.into_iter().enumerate() {
            let content_id = id(10 + 2 * index);
            let mut page = pdf.page(page_id(index));
            page.media_box(Rect::new(0.0, 0.0, PAGE.0, PAGE.1)).parent(tree).contents(content_id);
            page.resources().fonts().pair(FONT, font_ids.font);
            drop(page);
            pdf.stream(content_id, &content.finish());
        }
        self.font.embed(&mut pdf, &font_ids, &self.glyphs)?;
        Ok(pdf.finish())
    }
}

/// Digits in groups of three.
fn grouped(digits: &str) -> String {
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::document::example, *};

    #[test]
    fn the_same_invoice_is_the_same_bytes() {
        let pdf = render(&example(), None).expect("a PDF");
        assert!(pdf.starts_with(b"%PDF-1.7") && pdf.ends_with(b"%%EOF"));
        assert_eq!(render(&example(), None).expect("a PDF"), pdf);
        let mut other = example();
        other.customer.name.push('!');
        assert_ne!(render(&other, None).expect("a PDF"), pdf);
        assert!(pdf.len() < 100_000, "{} bytes", pdf.len());
    }

    #[test]
    fn a_font_that_is_not_truetype_is_refused() {
        let error = render(&example(), Some(b"no font")).expect_err("refused");
        assert!(error.to_string().contains("TrueType"), "{error}");
    }

    #[test]
    fn long_words_break_and_numbers_group() {
        let font = Font::parse(None).expect("the built-in font");
        let sheet = Sheet { font: &font, glyphs: Glyphs::default(), pages: vec![], y: 0.0 };
        let text = format!("two words and {}", "x".repeat(200));
        let lines = sheet.wrap(&text, 100.0);
        assert!(lines.len() > 5 && lines.iter().all(|line| font.width(line, TEXT) <= 100.0));
        assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        assert_eq!(
            (grouped("1").as_str(), grouped("1234567").as_str(), grouped("123").as_str()),
            ("1", "1,234,567", "123")
        );
    }
}
