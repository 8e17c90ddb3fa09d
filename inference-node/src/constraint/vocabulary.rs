//! The tokenizer's table of bytes, as the trie that masks are computed along.

use crate::tokenizer::Tokenizer;
use llguidance::toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use std::sync::Arc;

/// Longer tokens than the trie can hold take no part in constrained output.
const TOKEN_BYTES_MAX: usize = 1000;

struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    /// Only for grammars that name control tokens.
    fn tokenize_bytes(&self, text: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(text)
    }

    /// So any way to cut a text into tokens is allowed, and no token is forced: the model decides.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// `end_of_sequence` may be empty: then an output ends where its grammar allows nothing more.
pub fn environment(tokenizer: &Tokenizer, end_of_sequence: &[u32]) -> TokEnv {
    let vocab_size = tokenizer.vocab_size();
    let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| word(tokenizer, id)).collect();
    let first = end_of_sequence.first().copied().unwrap_or(INVALID_TOKEN);
    let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, first), &words);
    Arc::new(Vocabulary(match end_of_sequence {
        [] => trie,
        ids => trie.with_eos_tokens(ids),
    }))
}

/// Control tokens are marked as such, so that no text matches them. Nothing is a token that never occurs in text.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.bytes(id);
    if tokenizer.is_control(id) {
        let name = tokenizer.token(id).unwrap_or_default();
        let mut marked = vec![TokTrie::SPECIAL_TOKEN_MARKER];
        marked.extend_from_slice(name.as_bytes());
        return marked;
    }
    let unfit = bytes.len() > TOKEN_BYTES_MAX || bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER);
    if unfit { Vec::new() } else { bytes.to_vec() }
}
