//! Reads tool calls out of an answer as it streams.
//!
//! The answer follows the grammar of [`crate::constraint`], where everything around names and arguments is fixed; so
//! this is a small machine that never looks back. What it says after n characters is a function of these characters:
//! an answer that goes on elsewhere is read on by feeding it what was sent already.

use crate::constraint::{BEFORE_ARGUMENTS, BLOCK_CLOSES, BLOCK_OPENS, ToolFormat};

/// Something about a call. The first delta of a call has its whole name; later ones append to its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCallDelta {
    pub index: u32,
    pub name: String,
    pub arguments: String,
}

/// What a piece of an answer came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub text: String,
    pub calls: Vec<ToolCallDelta>,
}

pub struct ToolCallReader {
    format: ToolFormat,
    place: Place,
    /// Read, but not understood yet: part of a marker or of a call's opening.
    held: String,
    calls: u32,
    /// Of a call that is told when it is whole: `None` where its parts are told as they come.
    whole: Option<Vec<ToolCallDelta>>,
}

#[derive(Clone, Copy)]
enum Place {
    Start,
    /// Text of the answer; a block may follow where the format has one.
    Text,
    /// Between calls, up to the arguments of the next.
    Opening,
    Arguments(Json),
    /// Behind the block, or the only call.
    End,
}

/// Where in a JSON value the reader is.
#[derive(Clone, Copy, Default)]
struct Json {
    depth: u32,
    in_string: bool,
    escaped: bool,
}

impl ToolCallReader {
    pub fn new(format: ToolFormat) -> ToolCallReader {
        ToolCallReader { format, place: Place::Start, held: String::new(), calls: 0, whole: None }
    }

    /// For answers that a stop string may cut: a call is told when it is whole, or at the end of the answer.
    pub fn with_whole_calls(mut self) -> ToolCallReader {
        self.whole = Some(Vec::new());
        self
    }

    pub fn push(&mut self, piece: &str) -> Reading {
        let mut reading = Reading::default();
        for c in piece.chars() {
            self.read(c, &mut reading);
        }
        reading
    }

    /// The answer is over: what looked like a block, but was none, is text; and a call is as whole as it will be.
    pub fn finish(&mut self) -> Reading {
        let text = match self.place {
            Place::Text => std::mem::take(&mut self.held),
            _ => String::new(),
        };
        Reading { text, calls: self.whole.as_mut().map(std::mem::take).unwrap_or_default() }
    }

    fn read(&mut self, c: char, reading: &mut Reading) {
        match self.place {
            Place::Start => {
                let calls = self.format == ToolFormat::Object && c == '{';
                self.place = if calls { Place::Opening } else { Place::Text };
                self.read(c, reading);
            }
            Place::Text if self.format == ToolFormat::Object => reading.text.push(c),
            Place::Text => self.read_text(c, reading),
            Place::Opening => self.read_opening(c, reading),
            Place::Arguments(json) => self.read_arguments(json, c, reading),
            Place::End => {}
        }
    }

    fn read_text(&mut self, c: char, reading: &mut Reading) {
        self.held.push(c);
        if self.held == BLOCK_OPENS {
            self.held.clear();
            self.place = Place::Opening;
            return;
        }
        while !BLOCK_OPENS.starts_with(self.held.as_str()) {
            reading.text.push(self.held.remove(0));
        }
    }

    fn read_opening(&mut self, c: char, reading: &mut Reading) {
        self.held.push(c);
        if self.held.ends_with(BLOCK_CLOSES) {
            self.place = Place::End;
            return;
        }
        let before_name = self.format.before_name();
        let Some(opening) = self.held.strip_suffix(BEFORE_ARGUMENTS) else { return };
        // Before the name may stand the end of the call before it.
        let name = opening.rsplit_once(before_name).map_or("", |(_, name)| name).to_owned();
        let calls = self.whole.as_mut().unwrap_or(&mut reading.calls);
        calls.push(ToolCallDelta { index: self.calls, name, arguments: String::new() });
        self.held.clear();
        self.place = Place::Arguments(Json::default());
    }

    fn read_arguments(&mut self, mut json: Json, c: char, reading: &mut Reading) {
        let index = self.calls;
        let calls = self.whole.as_mut().unwrap_or(&mut reading.calls);
        match calls.last_mut().filter(|call| call.index == index) {
            Some(call) => call.arguments.push(c),
            None => calls.push(ToolCallDelta { index, name: String::new(), arguments: c.into() }),
        }
        json.read(c);
        self.place = Place::Arguments(json);
        if json.depth == 0 {
            self.calls += 1;
            reading.calls.extend(self.whole.iter_mut().flat_map(std::mem::take));
            self.place = match self.format {
                ToolFormat::Object => Place::End,
                ToolFormat::Block => Place::Opening,
            };
        }
    }
}

impl Json {
    fn read(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            '{' | '[' if !self.in_string => self.depth += 1,
            '}' | ']' if !self.in_string => self.depth -= 1,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole, and a character at a time: the same, put together.
    #[track_caller]
    fn check(format: ToolFormat, answer: &str, text: &str, calls: &[(&str, &str)]) {
        let pieces: Vec<String> = answer.chars().map(String::from).collect();
        for pieces in [vec![answer.to_owned()], pieces] {
            let mut reader = ToolCallReader::new(format);
            let (mut got_text, mut got) = (String::new(), Vec::<(String, String)>::new());
            for piece in pieces {
                let reading = reader.push(&piece);
                got_text.push_str(&reading.text);
                for delta in reading.calls {
                    if delta.index as usize == got.len() {
                        assert!(!delta.name.is_empty(), "a call begins with its name");
                        got.push((delta.name, String::new()));
                    } else {
                        assert_eq!((delta.index as usize, delta.name.as_str()), (got.len() - 1, ""));
                    }
                    got[delta.index as usize].1.push_str(&delta.arguments);
                }
            }
            got_text.push_str(&reader.finish().text);
            let got: Vec<(&str, &str)> = got.iter().map(|(n, a)| (n.as_str(), a.as_str())).collect();
            assert_eq!((got_text.as_str(), got.as_slice()), (text, calls), "of {answer}");
        }
    }

    #[test]
    fn an_answer_that_is_an_object_is_a_call() {
        let object = ToolFormat::Object;
        check(object, "Hello {there}", "Hello {there}", &[]);
        check(object, "", "", &[]);
        let call = r#"{"tool": "get-it", "arguments": {"a": "}\"{", "b": [{}, 1]}}"#;
        check(object, call, "", &[("get-it", r#"{"a": "}\"{", "b": [{}, 1]}"#)]);
        check(object, r#"{"tool": "x", "arguments": {"a": "#, "", &[("x", r#"{"a": "#)]);
        check(object, r#"{"tool": "x", "argu"#, "", &[]);
    }

    #[test]
    fn a_call_is_told_whole_where_a_stop_string_may_cut_it() {
        let call =
            |index, arguments: &str| ToolCallDelta { index, name: "a".into(), arguments: arguments.into() };
        let mut reader = ToolCallReader::new(ToolFormat::Block).with_whole_calls();
        let mut reading = reader.push("Hm.<tool_calls>\n{\"name\": \"a\", \"arguments\": {\"x\": 1");
        assert_eq!((reading.text.as_str(), reading.calls.len()), ("Hm.", 0));
        reading = reader.push("}}\n{\"name\": \"a\", \"arguments\": {\"x\"");
        assert_eq!(reading.calls, [call(0, "{\"x\": 1}")]);
        assert_eq!(reader.finish().calls, [call(1, "{\"x\"")]);
    }

    #[test]
    fn a_block_has_one_call_a_line() {
        let block = ToolFormat::Block;
        check(block, "1 < 2 and <tool_ca", "1 < 2 and <tool_ca", &[]);
        check(block, "<<tool_calls", "<<tool_calls", &[]);
        let answer = "Let me see.\n<tool_calls>\n{\"name\": \"a\", \"arguments\": {}}\n{\"name\": \"b\", \"arguments\": \
                      {\"x\": \"</tool_calls>\"}}\n</tool_calls>";
        check(block, answer, "Let me see.\n", &[("a", "{}"), ("b", "{\"x\": \"</tool_calls>\"}")]);
    }
}
