//! Where checkpoints are made: at the places that later prompts are likely to share.

use super::BLOCK_TOKENS;

/// How densely a prompt is covered. Every place is on the grid and leaves the prompt's last token to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Tokens between checkpoints whatever the text, a multiple of the block; 0 makes none of these.
    pub grid_tokens: usize,
    /// Ends of turns that are covered: the first one (the system prompt and the tools), then the latest.
    pub turns_max: usize,
}

impl Placement {
    /// Positions, ascending: the end of turns (a control token, rounded down to the grid), the sparse grid, and the last block
    /// boundary of the prompt.
    pub fn of(&self, tokens: &[u32], is_control: impl Fn(u32) -> bool) -> Vec<usize> {
        let last = tokens.len().saturating_sub(1) / BLOCK_TOKENS * BLOCK_TOKENS;
        let mut places = Vec::new();
        if self.grid_tokens > 0 {
            places.extend((self.grid_tokens..last).step_by(self.grid_tokens));
        }
        let controls = tokens.iter().enumerate().filter(|&(_, &token)| is_control(token));
        let mut turns: Vec<usize> =
            controls.map(|(at, _)| (at + 1) / BLOCK_TOKENS * BLOCK_TOKENS).filter(|&end| end > 0).collect();
        turns.dedup();
        if self.turns_max > 0 && turns.len() > self.turns_max {
            turns.drain(1..turns.len() + 1 - self.turns_max);
        }
        places.extend(turns.into_iter().take(self.turns_max).filter(|&end| end < last));
        places.extend((last > 0).then_some(last));
        places.sort_unstable();
        places.dedup();
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROL: u32 = 7;

    /// A prompt of `len` tokens with control tokens at `controls`.
    fn check(grid_tokens: usize, turns_max: usize, len: usize, controls: &[usize], expect: &[usize]) {
        let mut tokens = vec![1; len];
        controls.iter().for_each(|&at| tokens[at] = CONTROL);
        let placement = Placement { grid_tokens, turns_max };
        assert_eq!(placement.of(&tokens, |token| token == CONTROL), expect, "{len} tokens, {controls:?}");
    }

    #[test]
    fn places_are_on_the_grid_and_leave_a_token() {
        check(0, 8, 0, &[], &[]);
        check(0, 8, 64, &[0, 63], &[]);
        check(0, 8, 65, &[], &[64]);
        check(0, 8, 128, &[], &[64]);
        check(0, 8, 1000, &[], &[960]);
        check(256, 8, 1000, &[], &[256, 512, 768, 960]);
        check(0, 8, 1000, &[0, 63, 64, 200, 999], &[64, 192, 960]);
    }

    #[test]
    fn the_first_turn_and_the_latest_are_covered() {
        check(0, 3, 1000, &[100, 200, 300, 400, 500], &[64, 384, 448, 960]);
        check(0, 1, 1000, &[100, 200, 300], &[64, 960]);
        check(0, 0, 1000, &[100, 200, 300], &[960]);
    }
}
