//! Text to token ids and token ids to bytes, by a Hugging Face `tokenizer.json`.
//!
//! Two ways in, which differ in who is trusted with control tokens:
//!
//! - [`Tokenizer::encode_text`]: the caller owns the whole prompt, control tokens are parsed.
//! - [`Tokenizer::encode_rendered`]: a template owns the control tokens, the users' strings inside it are only text
//!   (see [`control_tokens`]).
//!
//! One way out: [`Tokenizer::bytes`], a table from id to the exact bytes it stands for. Control tokens stand for none.

pub mod control_tokens;

use self::control_tokens::{ControlTokens, Piece};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

pub struct Tokenizer {
    /// Reads control tokens in the text.
    parsing: tokenizers::Tokenizer,
    /// Takes the text of a control token for text.
    literal: tokenizers::Tokenizer,
    controls: ControlTokens,
    table: ByteTable,
}

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{0} does not exist; put the tokenizer.json of the model beside its config.json")]
    Missing(PathBuf),
    #[error("{path} is not a tokenizer: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error("{path}: the decoder {decoder} is not supported; ByteLevel, ByteFallback and Metaspace are")]
    Decoder { path: PathBuf, decoder: String },
    #[error(
        "{path} has token id {id}, but config.json says vocab_size {vocab_size}; they are from different models"
    )]
    Vocabulary { path: PathBuf, id: u32, vocab_size: usize },
}

/// Text that the tokenizer refused.
#[derive(Debug, thiserror::Error)]
#[error("the text cannot be encoded: {0}")]
pub struct EncodeError(String);

/// A prompt as a template wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// The marker that defuses users' strings in `text`; `None` if there was nothing to defuse.
    pub marker: Option<char>,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`. `vocab_size` is the model's: no token may lie beyond it.
    pub fn load(dir: &Path, vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(TokenizerError::Missing(path));
        }
        let malformed = |reason: String| TokenizerError::Malformed { path: path.clone(), reason };
        let mut parsing =
            tokenizers::Tokenizer::from_file(&path).map_err(|error| malformed(error.to_string()))?;
        parsing.with_padding(None);
        parsing.with_truncation(None).map_err(|error| malformed(error.to_string()))?;
        let mut literal = parsing.clone();
        literal.set_encode_special_tokens(true);

        let added = parsing.get_added_tokens_decoder();
        let controls = ControlTokens::new(
            added.iter().filter(|(_, token)| token.special).map(|(id, token)| (token.content.clone(), *id)),
        );
        let mut verbatim: HashMap<u32, Vec<u8>> = HashMap::new();
        for (id, token) in added {
            let bytes = if token.special { Vec::new() } else { token.content.into_bytes() };
            verbatim.insert(id, bytes);
        }
        let decoder = serde_json::to_value(parsing.get_decoder()).unwrap_or(Value::Null);
        let alphabet = Alphabet::of(&decoder)
            .ok_or_else(|| TokenizerError::Decoder { path: path.clone(), decoder: kind_of(&decoder) })?;
        let vocabulary = parsing.get_vocab(true);
        if let Some(id) = vocabulary.values().copied().filter(|&id| id as usize >= vocab_size).max() {
            return Err(TokenizerError::Vocabulary { path, id, vocab_size });
        }
        let table = ByteTable::new(vocab_size, &vocabulary, &verbatim, alphabet);
        Ok(Tokenizer { parsing, literal, controls, table })
    }

    /// Encodes a whole prompt. Control tokens in it are parsed, and the tokenizer's own (such as a
    /// begin-of-sentence) are put around it.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>, EncodeError> {
        encode(&self.parsing, text, true)
    }

    /// Encodes what a template wrote.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>, EncodeError> {
        let Some(marker) = rendered.marker else {
            return encode(&self.parsing, &rendered.text, false);
        };
        let mut ids = Vec::new();
        for piece in self.controls.split(&rendered.text) {
            match piece {
                Piece::Control(id) => ids.push(id),
                Piece::Text(text) => ids.extend(encode(&self.literal, &text.replace(marker, ""), false)?),
            }
        }
        Ok(ids)
    }

    /// The bytes that `id` stands for: none for a control token or an id the tokenizer does not know.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// The model's: ids are below it.
    pub fn vocab_size(&self) -> usize {
        self.table.ends.len()
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.bytes(id).is_empty() && self.token(id).is_some()
    }

    pub fn controls(&self) -> &ControlTokens {
        &self.controls
    }

    /// The text of one token, a control token's included.
    pub fn token(&self, id: u32) -> Option<String> {
        self.parsing.id_to_token(id)
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
    let encoding =
        tokenizer.encode_fast(text, add_special).map_err(|error| EncodeError(error.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}

/// How a vocabulary writes bytes as printable characters.
#[derive(Clone, Copy)]
enum Alphabet {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: U+2581 is a space, `<0xAB>` a byte.
    SentencePiece,
}

impl Alphabet {
    fn of(decoder: &Value) -> Option<Alphabet> {
        let parts = match decoder["decoders"].as_array() {
            Some(parts) => parts.iter().map(kind_of).collect(),
            None => vec![kind_of(decoder)],
        };
        let has = |kind: &str| parts.iter().any(|part| part == kind);
        if has("ByteLevel") {
            Some(Alphabet::ByteLevel)
        } else if has("ByteFallback") || has("Metaspace") {
            Some(Alphabet::SentencePiece)
        } else {
            None
        }
    }

    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            // A character outside the alphabet means that the token was never written in it.
            Alphabet::ByteLevel => {
                token.chars().map(byte_of).collect::<Option<_>>().unwrap_or_else(|| token.into())
            }
            Alphabet::SentencePiece => {
                let byte = token.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'));
                match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => token.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }
}

fn kind_of(decoder: &Value) -> String {
    decoder["type"].as_str().unwrap_or("null").to_owned()
}

/// GPT-2 shows printable bytes as themselves and the other 68, in order, as the characters from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    let shown = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|&byte| shown(byte)),
        code => (0..=255u8).filter(|&byte| !shown(byte)).nth((code as usize).checked_sub(0x100)?),
    }
}

/// id -> bytes, all in one allocation.
struct ByteTable {
    bytes: Vec<u8>,
    /// `bytes[ends[id - 1]..ends[id]]`
    ends: Vec<u32>,
}

impl ByteTable {
    fn new(
        vocab_size: usize,
        vocabulary: &HashMap<String, u32>,
        verbatim: &HashMap<u32, Vec<u8>>,
        alphabet: Alphabet,
    ) -> ByteTable {
        let mut tokens: Vec<Option<&str>> = vec![None; vocab_size];
        for (token, &id) in vocabulary {
            tokens[id as usize] = Some(token);
        }
        let mut table = ByteTable { bytes: Vec::new(), ends: Vec::with_capacity(vocab_size) };
        for (id, token) in tokens.into_iter().enumerate() {
            match (verbatim.get(&(id as u32)), token) {
                (Some(bytes), _) => table.bytes.extend_from_slice(bytes),
                (None, Some(token)) => table.bytes.extend(alphabet.bytes(token)),
                (None, None) => {}
            }
            table.ends.push(table.bytes.len() as u32);
        }
        table
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let Some(&end) = self.ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id as usize - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_alphabet_covers_every_byte_once() {
        let mut seen = [false; 256];
        for code in 0..0x100 + 68 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true), "byte {byte} twice");
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of('Ġ'), Some(b' '));
        assert_eq!(byte_of('Ċ'), Some(b'\n'));
        assert_eq!(byte_of('你'), None);
    }

    #[test]
    fn sentencepiece_tokens_are_spaces_and_bytes() {
        assert_eq!(Alphabet::SentencePiece.bytes("\u{2581}the"), b" the");
        assert_eq!(Alphabet::SentencePiece.bytes("<0xE4>"), [0xE4]);
    }

    #[test]
    fn an_unknown_decoder_is_refused() {
        assert!(Alphabet::of(&serde_json::json!({"type": "WordPiece"})).is_none());
        assert!(Alphabet::of(&Value::Null).is_none());
    }
}
