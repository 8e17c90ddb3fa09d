//! Compiles constraints, off the engine's thread and within limits.
//!
//! A grammar comes from whoever sent the request: it may be large, deep or built to explode. Its text is limited before
//! it is read, its nesting before it is parsed, the work of compiling by llguidance's own fuel, and the wait for it by
//! the clock: see `crew`. Threads have a stack that the deepest text allowed cannot exhaust.

use super::crew::{Crew, Job, Relief};
use super::guide::{Mask, Plan};
use super::schema::{check_pattern, enforceable};
use super::tools::ToolFormat;
use super::{Constraint, vocabulary};
use crate::tokenizer::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Map, Value, json};
use std::io;
use std::sync::mpsc::TrySendError;
use std::time::Duration;
use tokio::sync::oneshot;

#[derive(Debug, Clone)]
pub struct ConstraintLimits {
    /// Longest schema, pattern, grammar or list of tools.
    pub source_bytes_max: usize,
    /// How long a request waits for a thread, and then for its grammar.
    pub compile_wait_max: Duration,
    pub compile_threads: usize,
    /// Grammars that wait for a thread.
    pub compile_waiting_max: usize,
    /// Threads at once that overran `compile_wait_max` and were replaced.
    pub compile_given_up_max: usize,
}

/// Brackets open at once, in a pattern or a grammar.
const NESTING_MAX: usize = 100;
/// Fuel of llguidance, in its units: 50,000 are about a millisecond of building a lexer.
const LEXER_FUEL_MAX: u64 = 1_000_000;
/// 14,000 are about a millisecond of computing a mask.
const MASK_FUEL_MAX: u64 = 200_000;
const GRAMMAR_SYMBOLS_MAX: usize = 200_000;
const MASK_ITEMS_MAX: usize = 50_000;
/// An object takes about three for each property that may come next.
const ROW_ITEMS_MAX: usize = 20_000;
const LEXER_STATES_MAX: usize = 50_000;
/// Intersections in a Lark grammar.
const INTERSECTIONS_MAX: usize = 2;
const REASON_CHARS_MAX: usize = 400;

/// A constraint that cannot be had, and why.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refused {
    #[error("{field}: {reason}")]
    Invalid { field: String, reason: String },
    /// Others come first: later it may well be compiled.
    #[error("too many grammars wait to be compiled")]
    Busy,
}

pub(super) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Refused {
    Refused::Invalid { field: field.into(), reason: reason.into() }
}

/// Compiles constraints for one model.
pub struct Grammars {
    limits: ConstraintLimits,
    crew: Crew,
}

impl Grammars {
    /// Starts the threads that compile; they end when this is dropped.
    pub fn start(
        tokenizer: &Tokenizer,
        end_of_sequence: &[u32],
        tool_format: Option<ToolFormat>,
        limits: ConstraintLimits,
    ) -> io::Result<Grammars> {
        let compiler = Compiler {
            factory: factory(tokenizer, end_of_sequence).map_err(io::Error::other)?,
            tool_format,
            source_bytes_max: limits.source_bytes_max,
        };
        Ok(Grammars { crew: Crew::start(compiler, &limits)?, limits })
    }

    /// The constraint, ready for the token after `resume_ids`.
    ///
    /// # Cancel safety
    /// Dropped, the work is done for nobody, within its limits.
    pub async fn plan(&self, constraint: Constraint, resume_ids: Vec<u32>) -> Result<Plan, Refused> {
        let field = constraint.field();
        let (begun, beginning) = oneshot::channel();
        let (done, outcome) = oneshot::channel();
        // What nobody will begin takes no place in the queue.
        if self.crew.relieve() == Relief::NobodyLeft {
            return Err(Refused::Busy);
        }
        self.crew.submit(Job { constraint, resume_ids, begun, done }).map_err(|error| match error {
            TrySendError::Full(_) => Refused::Busy,
            TrySendError::Disconnected(_) => invalid(field, "cannot be compiled"),
        })?;
        let wait = self.limits.compile_wait_max;
        // Time spent behind others says nothing about this grammar.
        self.crew.begun(beginning, wait).await?;
        match tokio::time::timeout(wait, outcome).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(invalid(field, "cannot be compiled")),
            Err(_) => Err(invalid(field, format!("was not compiled within {} ms", wait.as_millis()))),
        }
    }

    #[cfg(test)]
    pub(super) fn given_up(&self) -> usize {
        self.crew.given_up()
    }
}

fn factory(tokenizer: &Tokenizer, end_of_sequence: &[u32]) -> Result<ParserFactory, String> {
    let environment = vocabulary::environment(tokenizer, end_of_sequence);
    let slices = SlicedBiasComputer::general_slices();
    let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        .map_err(|error| error.to_string())?;
    *factory.limits_mut() = ParserLimits {
        max_items_in_row: ROW_ITEMS_MAX,
        initial_lexer_fuel: LEXER_FUEL_MAX,
        step_lexer_fuel: MASK_FUEL_MAX,
        step_max_items: MASK_ITEMS_MAX,
        max_lexer_states: LEXER_STATES_MAX,
        max_grammar_size: GRAMMAR_SYMBOLS_MAX,
        precompute_large_lexemes: true,
        // What is generated is not logged, and no part of an error.
        verbose_errors: false,
    };
    factory.quiet();
    Ok(factory)
}

pub(super) struct Compiler {
    factory: ParserFactory,
    tool_format: Option<ToolFormat>,
    source_bytes_max: usize,
}

impl Compiler {
    pub(super) fn compile(&self, constraint: &Constraint, resume_ids: &[u32]) -> Result<Plan, Refused> {
        let field = constraint.field();
        let bytes = constraint.source_bytes();
        if bytes > self.source_bytes_max {
            let reason = format!("holds {bytes} bytes; at most {} are taken", self.source_bytes_max);
            return Err(invalid(field, reason));
        }
        let matcher = match constraint {
            Constraint::JsonSchema(text) => self.matcher(json_schema(text, field)?),
            Constraint::JsonObject => self.matcher(schema_grammar(json!({"type": "object"}))),
            Constraint::Regex(pattern) => {
                check_nesting(pattern, false, field)?;
                check_pattern(pattern).map_err(|reason| invalid(field, reason))?;
                self.matcher(TopLevelGrammar::from_regex(pattern))
            }
            Constraint::Lark(grammar) => {
                check_nesting(grammar, true, field)?;
                check_lark(grammar).map_err(|reason| invalid(field, reason))?;
                self.matcher(TopLevelGrammar::from_lark(grammar.clone()))
            }
            Constraint::ToolCalls(calls) => {
                let grammar = calls.grammar(self.tool_format, |lark| {
                    self.matcher(TopLevelGrammar::from_lark(lark)).map(drop)
                })?;
                self.matcher(TopLevelGrammar::from_lark(grammar))
            }
        };
        let matcher = matcher.map_err(|reason| invalid(field, reason))?;
        Plan::new(matcher, resume_ids, field)
    }

    /// Compiled, and its first mask computed: what explodes, explodes here.
    fn matcher(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(reason(&error)),
            None if matcher.is_stopped() => Ok(matcher),
            None => match Mask::of(&mut matcher) {
                Ok(_) => Ok(matcher),
                Err(error) => Err(error.to_owned()),
            },
        }
    }
}

fn json_schema(text: &str, field: &str) -> Result<TopLevelGrammar, Refused> {
    match serde_json::from_str(text) {
        Ok(Value::Object(schema)) if schema.contains_key(OPTIONS) => {
            Err(invalid(field, format!("holds the keyword {OPTIONS:?}, which is not taken")))
        }
        Ok(schema @ Value::Object(_)) => match enforceable(&schema) {
            Ok(schema) => Ok(schema_grammar(schema)),
            Err(reason) => Err(invalid(field, reason)),
        },
        Ok(_) => Err(invalid(field, "must be a JSON object")),
        Err(error) => Err(invalid(field, format!("is not JSON: {error}"))),
    }
}

/// The keyword under which llguidance takes its own options.
const OPTIONS: &str = "x-guidance";

fn schema_grammar(schema: Value) -> TopLevelGrammar {
    TopLevelGrammar::from_json_schema(with_options(schema))
}

/// Between the parts of a JSON text may be a space, or a new line and its indentation: no model writes more on
/// purpose, and one that is lost in blanks would not come back.
pub(super) fn with_options(schema: Value) -> Value {
    let Value::Object(mut schema) = schema else { return schema };
    let options = json!({"whitespace_flexible": true, "whitespace_pattern": r" |\n[ \t]{0,40}"});
    let mut with_options = Map::from_iter([(OPTIONS.to_owned(), options)]);
    with_options.append(&mut schema);
    Value::Object(with_options)
}

/// Brackets may not nest deeper than a parser that calls itself can follow. In a grammar, those between quotes are text.
fn check_nesting(text: &str, quotes: bool, field: &str) -> Result<(), Refused> {
    let (mut depth, mut deepest, mut escaped, mut quoted) = (0usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' if quotes => quoted = !quoted,
            b'\n' => quoted = false,
            b'(' | b'[' | b'{' if !quoted => depth += 1,
            b')' | b']' | b'}' if !quoted => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    match deepest > NESTING_MAX {
        true => Err(invalid(field, format!("nests deeper than {NESTING_MAX} brackets"))),
        false => Ok(()),
    }
}

/// What in a grammar would pass by the checks of a schema, change llguidance's own settings, or cost too much to
/// intersect. Looked for in all of the text: whatever a comment or a literal hides from one reader, another may find.
fn check_lark(grammar: &str) -> Result<(), String> {
    for (directive, instead) in [("%json", "send a schema as json_schema"), ("%llguidance", "leave it out")] {
        if grammar.contains(directive) {
            return Err(format!(
                "holds {directive}, which is not taken: {instead}; in a literal, write % as \\x25"
            ));
        }
    }
    match grammar.matches('&').count() {
        0..=INTERSECTIONS_MAX => Ok(()),
        count => Err(format!(
            "holds {count} of &, which multiply each other's work; at most {INTERSECTIONS_MAX} are taken; in a \
             literal, write & as \\x26"
        )),
    }
}

/// llguidance's words, without what is only of use to its authors.
pub(super) fn reason(error: &str) -> String {
    if error.starts_with("panic") {
        return "cannot be compiled".to_owned();
    }
    if error.contains("coerce_one_of") {
        return "is refused: the alternatives of a oneOf must exclude each other by type or by a required constant; \
                write anyOf where it does not matter that they overlap"
            .to_owned();
    }
    if error.contains("determine if regex is empty") {
        return "holds a pattern that is too complex together with the lengths, the format or the pattern that it meets: \
                join them into one pattern"
            .to_owned();
    }
    let plain = error.split("\n<").next().unwrap_or(error).trim();
    let mut reason: String = plain.chars().take(REASON_CHARS_MAX).collect();
    if reason.len() < plain.len() {
        reason.push_str("...");
    }
    format!("is refused: {reason}")
}
