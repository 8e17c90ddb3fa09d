//! Which checkpoints there are, found by the tokens of a request: the deepest first.

use super::BLOCK_TOKENS;
use super::chain::{Chain, Key};
use std::collections::{HashMap, HashSet};

/// Where a checkpoint stands: on the grid its key is its block's; off the grid `open` tokens of a block follow `base`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub key: Key,
    /// Names the whole blocks before it.
    pub base: Key,
    pub position: usize,
}

#[derive(Default)]
pub(crate) struct Index {
    whole: HashSet<Key>,
    /// Off the grid: (tokens of the open block, key), by base.
    open: HashMap<Key, Vec<(usize, Key)>>,
}

impl Place {
    /// Of the first `position` tokens of a sequence; `None` where its chain does not reach.
    pub fn of(chain: &Chain, tokens: &[u32], position: usize) -> Option<Place> {
        let base = chain.key(position / BLOCK_TOKENS)?;
        let open = &tokens[position - position % BLOCK_TOKENS..position];
        let key = if open.is_empty() { base } else { base.then(open) };
        Some(Place { key, base, position })
    }

    fn open_tokens(&self) -> usize {
        self.position % BLOCK_TOKENS
    }
}

impl Index {
    pub fn insert(&mut self, place: Place) {
        if place.open_tokens() == 0 {
            self.whole.insert(place.key);
            return;
        }
        let open = self.open.entry(place.base).or_default();
        if !open.iter().any(|&(_, key)| key == place.key) {
            open.push((place.open_tokens(), place.key));
        }
    }

    pub fn remove(&mut self, place: Place) {
        if place.open_tokens() == 0 {
            self.whole.remove(&place.key);
        } else if let Some(open) = self.open.get_mut(&place.base) {
            open.retain(|&(_, key)| key != place.key);
            if open.is_empty() {
                self.open.remove(&place.base);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.whole.is_empty() && self.open.is_empty()
    }

    /// The deepest checkpoint of these tokens at more than `above` and at most `at_most` of them.
    pub fn deepest(&self, chain: &Chain, tokens: &[u32], above: usize, at_most: usize) -> Option<Place> {
        if self.is_empty() {
            return None;
        }
        let at_most = at_most.min(tokens.len());
        let blocks = (above / BLOCK_TOKENS..=(at_most / BLOCK_TOKENS).min(chain.blocks())).rev();
        for block in blocks {
            let base = chain.key(block)?;
            let start = block * BLOCK_TOKENS;
            let open = self.open.get(&base).into_iter().flatten();
            let matching = open
                .filter(|&&(open, key)| {
                    start + open <= at_most && base.then(&tokens[start..start + open]) == key
                })
                .max_by_key(|&&(open, _)| open);
            let found = match matching {
                Some(&(open, key)) => Some(Place { key, base, position: start + open }),
                None => self.whole.contains(&base).then_some(Place { key: base, base, position: start }),
            };
            if let Some(place) = found {
                return (place.position > above).then_some(place);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::chain::Identity;
    use super::*;

    #[test]
    fn the_deepest_that_matches_and_is_allowed_is_found() {
        let root = Identity { model: "m".into(), kernel: "k".into(), dtype: "f32".into() }.root("a");
        let tokens: Vec<u32> = (0..300).collect();
        let chain = Chain::new(root, &tokens);
        let mut index = Index::default();
        for position in [64, 128, 150, 160, 256] {
            index.insert(Place::of(&chain, &tokens, position).expect("the chain reaches"));
        }
        let check = |tokens: &[u32], above, at_most, expect: Option<usize>| {
            let found = index.deepest(&Chain::new(root, tokens), tokens, above, at_most);
            assert_eq!(found.map(|place| place.position), expect, "above {above}, at most {at_most}");
        };
        check(&tokens, 0, 299, Some(256));
        check(&tokens, 0, 256, Some(256));
        check(&tokens, 0, 255, Some(160));
        check(&tokens, 0, 159, Some(150));
        check(&tokens, 0, 149, Some(128));
        check(&tokens, 128, 149, None);
        check(&tokens, 0, 63, None);
        check(&tokens[..160], 0, 160, Some(160));
        check(&tokens[..100], 0, 500, Some(64));
        let mut forked = tokens.clone();
        forked[155] += 1;
        check(&forked, 0, 299, Some(150));
        forked[149] += 1;
        check(&forked, 0, 299, Some(128));
        index.remove(Place::of(&chain, &tokens, 150).expect("the chain reaches"));
        index.remove(Place::of(&chain, &tokens, 128).expect("the chain reaches"));
        let found = index.deepest(&chain, &tokens, 0, 159);
        assert_eq!(found.map(|place| place.position), Some(64));
    }
}
