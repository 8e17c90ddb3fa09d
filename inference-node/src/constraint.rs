//! What an output must conform to: a JSON schema, a regular expression, a grammar, calls of declared tools.
//!
//! ```text
//!  request --> Grammars (own threads): compile, replay what was generated elsewhere --> Plan
//!                                                                                        |  submitted
//!  engine step:  forward pass      | mask ready? | sample | consume the token            v
//!  mask thread:  compute the mask -+             +---------- next mask --------------- Guide
//! ```
//! The work is llguidance's: an Earley parser over a lexer of regular expressions, walked along a trie of all tokens.
//! Here are the limits around it. A grammar is compiled on threads of its own, before the engine hears of the
//! sequence; masks are computed beside the step. A state is a function of the grammar and the tokens so far, so a
//! sequence continues elsewhere by replaying them.

mod compile;
mod crew;
mod guide;
mod masks;
mod numbers;
mod patterns;
mod schema;
mod tools;
mod vocabulary;

pub use self::compile::{ConstraintLimits, Grammars, Refused};
pub use self::guide::{Guide, Plan};
pub use self::masks::Masks;
pub use self::tools::{BEFORE_ARGUMENTS, BLOCK_CLOSES, BLOCK_OPENS, ToolCalls, ToolChoice, ToolFormat};

/// What an output must conform to, as it was asked for.
#[derive(Debug, Clone)]
pub enum Constraint {
    /// JSON text.
    JsonSchema(String),
    JsonObject,
    Regex(String),
    Lark(String),
    ToolCalls(ToolCalls),
}

impl Constraint {
    /// Bytes that someone else wrote and this node has to read.
    fn source_bytes(&self) -> usize {
        match self {
            Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Lark(text) => text.len(),
            Constraint::JsonObject => 0,
            Constraint::ToolCalls(calls) => calls.tools_json.len(),
        }
    }

    /// Its name in the contract.
    fn field(&self) -> &'static str {
        match self {
            Constraint::JsonSchema(_) => "constraint.json_schema",
            Constraint::JsonObject => "constraint.json_object",
            Constraint::Regex(_) => "constraint.regex",
            Constraint::Lark(_) => "constraint.lark",
            Constraint::ToolCalls(_) => "constraint.tool_calls.tools_json",
        }
    }
}

#[cfg(test)]
#[path = "constraint_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "constraint_generation_tests.rs"]
mod generation_tests;
