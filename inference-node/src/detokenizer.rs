//! Token bytes to text, as a stream.
//!
//! What leaves is always whole UTF-8 characters, and never a part of a stop string: the tail that could still become
//! one is held back, no more. The text sent after the first n tokens is a function of those tokens alone, so that a
//! sequence continues elsewhere by replaying them.

use std::sync::Arc;

pub struct Detokenizer {
    stop_strings: Arc<[String]>,
    /// The start of a character: at most 3 bytes.
    partial: Vec<u8>,
    /// Characters that may begin a stop string.
    held: String,
}

impl Detokenizer {
    /// None of `stop_strings` is empty.
    pub fn new(stop_strings: Arc<[String]>) -> Detokenizer {
        debug_assert!(stop_strings.iter().all(|stop| !stop.is_empty()));
        Detokenizer { stop_strings, partial: Vec::new(), held: String::new() }
    }

    /// Takes the bytes of the next token and appends to `out` the text that is now certain. Answers with the index
    /// of the stop string that this token completed, if it did: then `out` ends before it and nothing follows.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) -> Option<usize> {
        self.decode(bytes);
        if let Some((at, stop)) = self.first_stop() {
            out.push_str(&self.held[..at]);
            self.held.clear();
            self.partial.clear();
            return Some(stop);
        }
        let keep = self.possible_stop();
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        None
    }

    /// The same where stop strings do not count yet: text that was held back is out with it, and begins none.
    pub fn push_unwatched(&mut self, bytes: &[u8], out: &mut String) {
        self.decode(bytes);
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The sequence has ended without a stop string: what was held back is text after all.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        if !self.partial.is_empty() {
            out.push(char::REPLACEMENT_CHARACTER);
            self.partial.clear();
        }
    }

    fn decode(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        let mut from = 0;
        loop {
            let rest = &self.partial[from..];
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.held.push_str(text);
                    self.partial.clear();
                    return;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    self.held.push_str(std::str::from_utf8(valid).expect("from_utf8 found it valid"));
                    let Some(invalid) = error.error_len() else {
                        let start = self.partial.len() - after.len();
                        self.partial.drain(..start);
                        return;
                    };
                    self.held.push(char::REPLACEMENT_CHARACTER);
                    from += valid.len() + invalid;
                }
            }
        }
    }

    /// Where the first stop string begins, and which it is; of two at one place, the first that was asked for.
    fn first_stop(&self) -> Option<(usize, usize)> {
        let stops = self.stop_strings.iter().enumerate();
        stops.filter_map(|(index, stop)| Some((self.held.find(stop.as_str())?, index))).min()
    }

    /// Where the longest tail begins that is a proper prefix of a stop string.
    fn possible_stop(&self) -> usize {
        let longest = self.stop_strings.iter().map(String::len).max().unwrap_or(0);
        let earliest = (self.held.len() + 1).saturating_sub(longest);
        let starts = (earliest..self.held.len()).filter(|&at| self.held.is_char_boundary(at));
        let mut starts = starts.filter(|&at| {
            let tail = &self.held[at..];
            self.stop_strings.iter().any(|stop| stop.len() > tail.len() && stop.starts_with(tail))
        });
        starts.next().unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `chunks`; the frames as they left, with the flush at the end as the last one.
    fn stream<'a>(
        stops: &[&str],
        chunks: impl IntoIterator<Item = &'a [u8]>,
    ) -> (Vec<String>, Option<usize>) {
        let mut detokenizer = Detokenizer::new(stops.iter().map(|s| s.to_string()).collect());
        let mut frames = Vec::new();
        for chunk in chunks {
            let mut out = String::new();
            let stop = detokenizer.push(chunk, &mut out);
            frames.push(out);
            if stop.is_some() {
                return (frames, stop);
            }
        }
        let mut out = String::new();
        detokenizer.finish(&mut out);
        frames.push(out);
        (frames, None)
    }

    #[track_caller]
    fn check(stops: &[&str], chunks: &[&[u8]], frames: &[&str], stop: Option<usize>) {
        let (got, got_stop) = stream(stops, chunks.iter().copied());
        assert_eq!((got.iter().map(String::as_str).collect::<Vec<_>>(), got_stop), (frames.to_vec(), stop));
    }

    #[test]
    fn characters_are_never_split() {
        check(&[], &[b"\xE4\xBD", b"\xA0\xE5", b"\xA5\xBD!"], &["", "你", "好!", ""], None);
        check(&[], &[b"\xF0", b"\x9F", b"\xA6", b"\x80"], &["", "", "", "🦀", ""], None);
    }

    #[test]
    fn broken_bytes_become_replacement_characters() {
        check(&[], &[b"a\xFFb"], &["a\u{FFFD}b", ""], None);
        check(&[], &[b"\xE4\xBD", b"x"], &["", "\u{FFFD}x", ""], None);
        check(&[], &[b"ok\xE4\xBD"], &["ok", "\u{FFFD}"], None);
    }

    #[test]
    fn only_a_proper_prefix_of_a_stop_is_held_back() {
        check(&["END"], &[b"the E", b"N", b"D of"], &["the ", "", ""], Some(0));
        check(&["END"], &[b"the E", b"NOUGH"], &["the ", "ENOUGH", ""], None);
        check(&["END"], &[b"THE EN"], &["THE ", "EN"], None);
        check(&["aab"], &[b"aa", b"ab"], &["", "a"], Some(0));
        check(&["\n\n", "x"], &[b"a\n", b"bx"], &["a", "\nb"], Some(1));
        check(&["好"], &[b"\xE4\xBD\xA0\xE5", b"\xA5\xBD"], &["你", ""], Some(0));
    }

    #[test]
    fn the_earliest_stop_wins() {
        check(&["bc", "ab"], &[b"xabc"], &["x"], Some(1));
    }

    proptest! {
        /// However bytes are cut into tokens: the text is the lossy decoding, up to the first stop.
        #[test]
        fn any_split_gives_one_text(
            text in "[ab é好🦀]{0,40}",
            noise in prop::collection::vec(any::<u8>(), 0..4),
            cuts in prop::collection::vec(0usize..200, 0..30),
        ) {
            let mut bytes = text.into_bytes();
            bytes.splice(bytes.len() / 2..bytes.len() / 2, noise);
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c % (bytes.len() + 1)).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let chunks = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]);
            let lossy = String::from_utf8_lossy(&bytes);

            let (frames, _) = stream(&[], chunks.clone());
            prop_assert_eq!(frames.concat(), lossy.as_ref());

            let (frames, stop) = stream(&["ab好"], chunks);
            prop_assert_eq!(stop.is_some(), lossy.contains("ab好"));
            prop_assert_eq!(frames.concat(), lossy.split("ab好").next().unwrap_or_default());
        }
    }
}
