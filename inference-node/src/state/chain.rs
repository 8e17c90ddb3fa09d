//! Names for prefixes: a hash chain over blocks of tokens, salted with the tenant and with everything that decides a bit.
//!
//! ```text
//! root = H(format, model, kernel, dtype, tenant)    key 1 = H(root, tokens 0..64)    key 2 = H(key 1, tokens 64..128)
//! ```
//!
//! Equal keys mean equal state, bit for bit; another tenant's equal prompt has other keys, so that nobody can learn from a hit what
//! others sent. Tokens cannot be read back from a key.

use super::BLOCK_TOKENS;
use sha2::{Digest, Sha256};
use std::fmt;

/// Name of a prefix of one tenant's tokens.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 32]);

/// What decides the bits of a state beside the tokens.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Content hash of the model.
    pub model: String,
    /// Kind of arithmetic.
    pub kernel: String,
    /// In which the weights are computed with.
    pub dtype: String,
}

/// Keys of one sequence: `keys[b]` names its first `b` blocks. Empty where nothing is cached.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    keys: Vec<Key>,
}

/// Changes when the layout of a state or the grid does.
const FORMAT: &str = "sluice state 1, blocks of 64";

impl Key {
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }

    /// `None` unless these are 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Key> {
        let mut key = [0; 32];
        hex::decode_to_slice(text, &mut key).ok()?;
        Some(Key(key)).filter(|key| key.to_hex() == text)
    }

    /// Names this prefix and `tokens` after it.
    pub fn then(self, tokens: &[u32]) -> Key {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.to_le_bytes());
        }
        Key(hash.finalize().into())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_hex()[..16])
    }
}

impl Identity {
    /// The key of `tenant`'s empty prefix.
    pub fn root(&self, tenant: &str) -> Key {
        let mut hash = Sha256::new();
        for part in [FORMAT, &self.model, &self.kernel, &self.dtype, tenant] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }
}

impl Chain {
    pub fn new(root: Key, tokens: &[u32]) -> Chain {
        let mut chain = Chain { keys: vec![root] };
        chain.extend(tokens);
        chain
    }

    /// Names the blocks that have closed since; `tokens` is all of the sequence.
    pub fn extend(&mut self, tokens: &[u32]) {
        let Some(mut key) = self.keys.last().copied() else { return };
        for block in tokens.chunks_exact(BLOCK_TOKENS).skip(self.keys.len() - 1) {
            key = key.then(block);
            self.keys.push(key);
        }
    }

    /// Whole blocks that have a name; 0 where nothing is cached.
    pub fn blocks(&self) -> usize {
        self.keys.len().saturating_sub(1)
    }

    /// Names the first `blocks` blocks.
    pub fn key(&self, blocks: usize) -> Option<Key> {
        self.keys.get(blocks).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity { model: "m".into(), kernel: "k".into(), dtype: "f32".into() }
    }

    #[test]
    fn a_key_names_tokens_tenant_and_model() {
        let tokens: Vec<u32> = (0..200).collect();
        let chain = Chain::new(identity().root("a"), &tokens);
        assert_eq!(chain.blocks(), 3);
        let mut later = Chain::new(identity().root("a"), &tokens[..100]);
        later.extend(&tokens);
        assert_eq!(later.key(3), chain.key(3));
        let mut changed = tokens.clone();
        changed[63] += 1;
        let changed = Chain::new(identity().root("a"), &changed);
        assert!(
            (1..=3).all(|blocks| changed.key(blocks) != chain.key(blocks)),
            "one token changes all that follow"
        );
        for other in [
            identity().root("b"),
            Identity { model: "n".into(), ..identity() }.root("a"),
            Identity { kernel: "l".into(), ..identity() }.root("a"),
            Identity { dtype: "bf16".into(), ..identity() }.root("a"),
            // Parts do not flow into each other.
            Identity { dtype: "f3".into(), ..identity() }.root("2a"),
        ] {
            assert_ne!(Chain::new(other, &tokens).key(1), chain.key(1));
        }
    }

    #[test]
    fn hex_is_read_back_and_nothing_else_is() {
        let key = identity().root("a");
        assert_eq!(Key::from_hex(&key.to_hex()), Some(key));
        for text in ["", "00", &key.to_hex()[1..], &key.to_hex().to_uppercase(), &"x".repeat(64)] {
            assert_eq!(Key::from_hex(text), None, "{text}");
        }
    }

    #[test]
    fn without_a_root_nothing_has_a_name() {
        let mut chain = Chain::default();
        chain.extend(&[1; 1000]);
        assert_eq!((chain.blocks(), chain.key(0)), (0, None));
    }
}
