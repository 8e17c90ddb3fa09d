//! Reads the fields of a JSON object, and knows where it is: an error names `messages[2].content`, not "body".
//!
//! An explicit null is an absent field; fields nobody asks for are ignored.

use serde_json::{Map, Value};

use crate::{
    error::{ApiError, Fault},
    request::Expected,
};

/// A JSON object at a path of the request.
#[derive(Clone)]
pub struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: String,
}

impl<'a> Fields<'a> {
    /// `path` is empty for the body itself.
    pub fn of(value: &'a Value, path: impl Into<String>) -> Result<Fields<'a>, ApiError> {
        let path = path.into();
        match value {
            Value::Object(map) => Ok(Fields { map, path }),
            other => Err(wrong_type(path, "an object", other)),
        }
    }

    /// The full name of a field of this object.
    pub fn path(&self, name: &str) -> String {
        match self.path.is_empty() {
            true => name.to_owned(),
            false => format!("{}.{name}", self.path),
        }
    }

    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| ApiError::field(Fault::Missing, self.path(name), "is required"))
    }

    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub fn number(&self, name: &str) -> Result<Option<f64>, ApiError> {
        self.read(name, "a number", Value::as_f64)
    }

    pub fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    /// Whole numbers beyond an i64 become its ends, which are out of range for every field there is.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        self.read(name, "an integer", as_integer)
    }

    pub fn array(&self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        self.read(name, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.get(name).map(|value| Fields::of(value, self.path(name))).transpose()
    }

    /// Gives a refused value the name of its field.
    pub fn check<T>(&self, name: &str, value: Result<T, Expected>) -> Result<T, ApiError> {
        value.map_err(|expected| ApiError::field(Fault::Value, self.path(name), expected.to_string()))
    }

    /// This version does not do what the field asks for, whatever its value.
    pub fn unsupported(&self, name: &str) -> ApiError {
        ApiError::field(Fault::UnsupportedParameter, self.path(name), "is not supported")
    }

    /// This version does only what `supported` says.
    pub fn unsupported_value(&self, name: &str, supported: &str) -> ApiError {
        let message = format!("is not supported with this value; {supported}");
        ApiError::field(Fault::UnsupportedValue, self.path(name), message)
    }

    pub fn wrong_type(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        wrong_type(self.path(name), expected, found)
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong_type(name, expected, value))
    }
}

pub fn wrong_type(path: String, expected: &str, found: &Value) -> ApiError {
    let found = match found {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(number) if number.is_f64() => "a fraction",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    };
    ApiError::field(Fault::Type, path, format!("must be {expected}, but is {found}"))
}

fn as_integer(value: &Value) -> Option<i64> {
    let float =
        |value: &Value| value.as_f64().filter(|number| number.fract() == 0.0).map(|number| number as i64);
    value.as_i64().or_else(|| value.as_u64().map(|_| i64::MAX)).or_else(|| float(value))
}
