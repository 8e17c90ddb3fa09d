//! How many patterns a string has to match at once.
//!
//! llguidance intersects them; the first look at an intersection costs the product of what its parts allow next, before
//! any fuel is counted. So few may meet in one place, whatever brings them there.
//!
//! ```text
//! {"allOf": [{"properties": {"a": P}}, {"$ref": "#/$defs/b"}]}     adds up, place by place
//! {"anyOf": [{"properties": {"a": P}}, {"properties": {"a": Q}}]}  is as much as its largest
//! ```

use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

/// Patterns and formats that one string has to match.
const TOGETHER_MAX: usize = 2;
/// Alternatives of such a string: each is an intersection of its own.
const WAYS_MAX: usize = 64;
/// Places in which parts of a schema meet.
const MEETINGS_MAX: usize = 100_000;

pub(super) fn check(schema: &Value) -> Result<(), String> {
    let mut count = Count {
        root: schema,
        known: HashMap::new(),
        open: HashSet::new(),
        meetings: 0,
        is_recursive: false,
        uniform: 0,
    };
    let mut load = count.schema(schema)?;
    if count.is_recursive {
        // What a recursion holds may meet at any depth with what is around it.
        count.uniform = load.as_ref().map_or(0, |load| load.most(&mut HashSet::new()));
        count.known.clear();
        load = count.schema(schema)?;
    }
    // Definitions count where they are referred to; those that nobody refers to are never compiled.
    let mut seen = HashSet::new();
    let heaviest = count.known.values().flatten().chain(&load).find_map(|load| load.excess(&mut seen));
    heaviest.map_or(Ok(()), Err)
}

/// What a schema asks of a value, and of the values within.
#[derive(Default, Clone)]
struct Load {
    patterns: usize,
    ways: usize,
    /// The last of the patterns.
    pattern: String,
    names: Members,
    items: Members,
    /// Patterns that may be met anywhere below.
    uniform: usize,
}

#[derive(Default, Clone)]
struct Members {
    of: BTreeMap<String, Rc<Load>>,
    rest: Option<Rc<Load>>,
}

type Sum = Option<Rc<Load>>;

struct Count<'a> {
    root: &'a Value,
    /// By reference.
    known: HashMap<String, Sum>,
    /// References that are being followed.
    open: HashSet<String>,
    meetings: usize,
    is_recursive: bool,
    uniform: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Join {
    Both,
    Either,
}

impl<'a> Count<'a> {
    fn schema(&mut self, schema: &'a Value) -> Result<Sum, String> {
        let Some(keywords) = schema.as_object() else { return Ok(None) };
        let mut sum = self.own(keywords)?;
        for (keyword, value) in keywords {
            let part = match (keyword.as_str(), value) {
                ("allOf", Value::Array(all)) => self.joined(all, Join::Both)?,
                ("anyOf" | "oneOf", Value::Array(any)) => self.joined(any, Join::Either)?,
                ("$ref", Value::String(reference)) => self.reference(reference)?,
                _ => continue,
            };
            sum = self.join(sum, part, Join::Both)?;
        }
        Ok(sum)
    }

    fn joined(&mut self, schemas: &'a [Value], join: Join) -> Result<Sum, String> {
        let mut sum = None;
        for schema in schemas {
            let part = self.schema(schema)?;
            sum = self.join(sum, part, join)?;
        }
        Ok(sum)
    }

    /// Without what applies in place.
    fn own(&mut self, keywords: &'a Map<String, Value>) -> Result<Sum, String> {
        let mut load = Load::default();
        for keyword in ["pattern", "format"] {
            if let Some(pattern) = keywords.get(keyword).and_then(Value::as_str) {
                (load.patterns, load.ways) = (load.patterns + 1, 1);
                load.pattern = pattern.to_owned();
            }
        }
        let members = |keyword: &str| keywords.get(keyword).and_then(Value::as_object);
        let mut by_pattern = None;
        for schema in members("patternProperties").into_iter().flat_map(Map::values) {
            let part = self.schema(schema)?;
            by_pattern = self.join(by_pattern, part, Join::Both)?;
        }
        for (name, schema) in members("properties").into_iter().flatten() {
            let part = self.schema(schema)?;
            let part = self.join(part, by_pattern.clone(), Join::Both)?;
            load.names.of.insert(name.clone(), part.unwrap_or_default());
        }
        let others = self.optional(keywords.get("additionalProperties"))?;
        load.names.rest = self.join(by_pattern, others, Join::Both)?;
        let tuple = ["prefixItems", "items"].iter().find_map(|keyword| keywords.get(*keyword)?.as_array());
        for (index, schema) in tuple.into_iter().flatten().enumerate() {
            let part = self.schema(schema)?;
            load.items.of.insert(index.to_string(), part.unwrap_or_default());
        }
        let rest = keywords.get("items").filter(|items| !items.is_array());
        load.items.rest = self.optional(rest.or(keywords.get("additionalItems")))?;
        let is_empty = |members: &Members| members.of.is_empty() && members.rest.is_none();
        let counts = load.patterns > 0 || !is_empty(&load.names) || !is_empty(&load.items);
        Ok(counts.then(|| Rc::new(load)))
    }

    fn optional(&mut self, schema: Option<&'a Value>) -> Result<Sum, String> {
        schema.map_or(Ok(None), |schema| self.schema(schema))
    }

    fn reference(&mut self, reference: &str) -> Result<Sum, String> {
        if let Some(known) = self.known.get(reference) {
            return Ok(known.clone());
        }
        let Some(target) = self.target(reference) else { return Ok(None) };
        if !self.open.insert(reference.to_owned()) {
            self.is_recursive = true;
            return Ok((self.uniform > 0).then(|| Rc::new(Load::uniform(self.uniform))));
        }
        let sum = self.schema(target)?;
        self.open.remove(reference);
        self.known.insert(reference.to_owned(), sum.clone());
        Ok(sum)
    }

    fn target(&self, reference: &str) -> Option<&'a Value> {
        match reference.strip_prefix('#')? {
            "" => Some(self.root),
            fragment if fragment.starts_with('/') => {
                self.root.pointer(&super::schema::percent_decoded(fragment))
            }
            anchor => anchored(self.root, anchor),
        }
    }

    fn join(&mut self, a: Sum, b: Sum, join: Join) -> Result<Sum, String> {
        let (a, b) = match (a, b) {
            (Some(a), Some(b)) => (a, b),
            (one, other) => return Ok(one.or(other)),
        };
        self.meetings += 1;
        if self.meetings > MEETINGS_MAX {
            return Err("the schema has too many parts that apply in the same place".to_owned());
        }
        let mut load = Load {
            names: self.members(&a, &b, |load| &load.names, join)?,
            items: self.members(&a, &b, |load| &load.items, join)?,
            ..Load::default()
        };
        load.pattern = if b.patterns > 0 { b.pattern.clone() } else { a.pattern.clone() };
        (load.patterns, load.uniform, load.ways) = match join {
            Join::Both => {
                let ways = a.ways.max(1).saturating_mul(b.ways.max(1));
                (a.patterns + b.patterns, a.uniform + b.uniform, ways)
            }
            Join::Either => (a.patterns.max(b.patterns), a.uniform.max(b.uniform), a.ways + b.ways),
        };
        Ok(Some(Rc::new(load)))
    }

    fn members(
        &mut self,
        a: &Load,
        b: &Load,
        of: impl Fn(&Load) -> &Members,
        join: Join,
    ) -> Result<Members, String> {
        let (a_members, b_members) = (of(a), of(b));
        let mut joined = Members::default();
        for name in a_members.of.keys().chain(b_members.of.keys()) {
            if !joined.of.contains_key(name) {
                let sum = self.join(a.member(a_members, name), b.member(b_members, name), join)?;
                joined.of.insert(name.clone(), sum.unwrap_or_default());
            }
        }
        joined.rest = self.join(a_members.rest.clone(), b_members.rest.clone(), join)?;
        Ok(joined)
    }
}

impl Load {
    fn uniform(patterns: usize) -> Load {
        Load { patterns, ways: 1, uniform: patterns, ..Load::default() }
    }

    fn member(&self, of: &Members, name: &str) -> Sum {
        let uniform = || (self.uniform > 0).then(|| Rc::new(Load::uniform(self.uniform)));
        of.of.get(name).or(of.rest.as_ref()).cloned().or_else(uniform)
    }

    fn within(&self) -> impl Iterator<Item = &Rc<Load>> {
        [&self.names, &self.items].into_iter().flat_map(|members| members.of.values().chain(&members.rest))
    }

    /// `seen`: parts that several places share are looked at once.
    fn most(&self, seen: &mut HashSet<*const Load>) -> usize {
        if !seen.insert(self) {
            return 0;
        }
        self.within().map(|load| load.most(seen)).max().unwrap_or(0).max(self.patterns)
    }

    /// What is too much, in words that begin with a place.
    fn excess(&self, seen: &mut HashSet<*const Load>) -> Option<String> {
        if !seen.insert(self) {
            return None;
        }
        let pattern: String = self.pattern.chars().take(60).collect();
        if self.patterns > TOGETHER_MAX {
            return Some(format!(
                "pattern {pattern:?} meets {} others in one string; at most {TOGETHER_MAX} patterns and formats may apply \
                 to a string: join them into one",
                self.patterns - 1
            ));
        }
        if self.patterns > 1 && self.ways > WAYS_MAX {
            return Some(format!(
                "pattern {pattern:?} meets others in {} ways; at most {WAYS_MAX} are taken: join alternatives into one \
                 pattern",
                self.ways
            ));
        }
        self.within().find_map(|load| load.excess(seen))
    }
}

fn anchored<'a>(schema: &'a Value, anchor: &str) -> Option<&'a Value> {
    match schema {
        Value::Object(members) if members.get("$anchor").and_then(Value::as_str) == Some(anchor) => {
            Some(schema)
        }
        Value::Object(members) => members.values().find_map(|value| anchored(value, anchor)),
        Value::Array(items) => items.iter().find_map(|value| anchored(value, anchor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn takes(schema: Value) {
        assert_eq!(check(&schema), Ok(()), "{schema}");
    }

    #[track_caller]
    fn refuses(schema: Value) {
        let reason = check(&schema).expect_err("it is refused");
        assert!(reason.starts_with("pattern \"") && reason.contains(" meets "), "{schema}: {reason}");
    }

    fn of(name: &str) -> Value {
        json!({"properties": {name: {"type": "string", "pattern": name}}})
    }

    #[test]
    fn patterns_add_up_where_they_meet_and_nowhere_else() {
        let p = |name: &str| json!({"pattern": name});
        takes(json!({"pattern": "a", "format": "date"}));
        takes(json!({"allOf": [p("a"), p("b")]}));
        refuses(json!({"allOf": [p("a"), p("b"), p("c")]}));
        refuses(json!({"pattern": "a", "format": "date", "allOf": [p("a")]}));
        takes(json!({"anyOf": [p("a"), p("b"), p("c"), p("d")]}));
        takes(json!({"allOf": [of("a"), of("b"), of("c"), of("d")]}));
        refuses(json!({"allOf": [of("a"), of("b"), of("a"), of("a")]}));
        takes(json!({"anyOf": [of("a"), of("a"), of("a")], "allOf": [of("a")]}));
        refuses(json!({"anyOf": [of("a")], "oneOf": [of("a")], "allOf": [of("a")]}));
        refuses(json!({"allOf": [{"items": p("a")}, {"items": p("b")}, {"prefixItems": [true, p("c")]}]}));
        takes(json!({"allOf": [{"items": p("a")}, {"prefixItems": [p("c")], "items": true}]}));
        refuses(
            json!({"properties": {"a": {"allOf": [p("a"), p("b")]}}, "patternProperties": {"^a": p("c")}}),
        );
        let any = |from: u8| json!({"anyOf": (0..9).map(|n| p(&format!("{from}{n}"))).collect::<Vec<_>>()});
        refuses(json!({"allOf": [any(1), any(2)]}));
    }

    #[test]
    fn references_bring_what_they_lead_to() {
        let defs = json!({"a": {"pattern": "a"}, "b": {"allOf": [{"$ref": "#/$defs/a"}, {"pattern": "b"}]}});
        takes(json!({"$ref": "#/$defs/b", "$defs": defs}));
        refuses(json!({"$ref": "#/$defs/b", "pattern": "c", "$defs": defs}));
        refuses(json!({"properties": {"x": {"$ref": "#/$defs/b", "format": "uuid"}}, "$defs": defs}));
        refuses(
            json!({"allOf": [{"$ref": "#p"}, {"$ref": "#p"}, {"$ref": "#p"}], "$defs": {"p": {"$anchor": "p", "pattern": "p"}}}),
        );
        let tree = |name: &str| json!({"properties": {"x": {"pattern": name}, "child": {"$ref": format!("#/$defs/{name}")}}});
        takes(json!({"$ref": "#/$defs/a", "$defs": {"a": tree("a")}}));
        let below = json!({"properties": {"child": {"properties": {"child": {"$ref": "#/$defs/b"}}}}});
        let deeper = json!({"properties": {"child": {"properties": {"child": {"properties": {"child": {"$ref": "#/$defs/c"}}}}}}});
        let defs = json!({"a": tree("a"), "b": tree("b"), "c": tree("c")});
        refuses(json!({"allOf": [{"$ref": "#/$defs/a"}, below, deeper], "$defs": defs}));
    }
}
