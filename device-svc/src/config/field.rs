//! One key's value, read into the type it must have, with errors that name the place, the key and what to write.
//!
//! The shape of a file (which keys there are) is serde's to check; the type of each value is checked here, because only
//! here the key and the name of the volume or function around it are known.

use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Spanned, Value};

use super::quantity::{format_duration, parse_duration, parse_size};

/// A key that may be there, with its value still untyped.
pub(super) type Field = Option<Spanned<Value>>;

/// What is wrong, and where in the text.
#[derive(Debug)]
pub(super) struct Fault {
    /// Bytes of the text.
    pub(super) span: Range<usize>,
    /// Place, key, what is wrong, next step.
    pub(super) message: String,
}

/// How a text is to be read.
#[derive(Clone, Copy)]
pub(super) struct Reading<'a> {
    /// Whether numbers and truth values may be written as text: options of a command have no other form.
    pub(super) from_options: bool,
    /// The folder that relative paths start from: a path that is shown or compared must not depend on who asks from where.
    pub(super) folder: &'a Path,
}

/// Reads the values of one table.
pub(super) struct Table<'a> {
    /// How messages call it: `volume "root"`.
    pub(super) place: String,
    /// Where it stands in the text.
    pub(super) span: Range<usize>,
    /// How the text around it is to be read.
    pub(super) reading: Reading<'a>,
}

impl Table<'_> {
    /// A fault of the whole table.
    pub(super) fn fault(&self, message: impl std::fmt::Display) -> Fault {
        Fault { span: self.span.clone(), message: format!("{}: {message}", self.place) }
    }

    /// A fault of one key's value.
    pub(super) fn fault_at(&self, key: &str, field: &Field, message: impl std::fmt::Display) -> Fault {
        let span = field.as_ref().map_or_else(|| self.span.clone(), Spanned::span);
        Fault { span, message: format!("{}: `{key}`: {message}", self.place) }
    }

    /// What a key that must be there holds.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>, example: &str) -> Result<T, Fault> {
        value.ok_or_else(|| self.fault(format_args!("`{key}` is missing; add {example}")))
    }

    /// A text.
    pub(super) fn text<'f>(&self, key: &str, field: &'f Field) -> Result<Option<&'f str>, Fault> {
        match field.as_ref().map(Spanned::get_ref) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.fault_at(key, field, format_args!("{other} is not a text; put it in quotes"))),
        }
    }

    /// A path, made absolute.
    pub(super) fn path(&self, key: &str, field: &Field) -> Result<Option<PathBuf>, Fault> {
        match self.text(key, field)? {
            Some("") => Err(self.fault_at(key, field, "an empty path; write where the file is")),
            Some(text) if text.contains('\0') => Err(self.fault_at(key, field, "a path holds no NUL")),
            // Without asking the file system, so that `/a/./b` and `/a/b` are one path whether it exists or not.
            Some(text) => Ok(Some(self.reading.folder.join(text).components().collect())),
            None => Ok(None),
        }
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(&self, key: &str, field: &Field, words: &[(&str, T)]) -> Result<Option<T>, Fault> {
        let Some(text) = self.text(key, field)? else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => Ok(Some(*value)),
            None => {
                let known: Vec<String> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
                Err(self.fault_at(key, field, format_args!("{text:?} is not known; use {}", known.join(" or "))))
            }
        }
    }

    /// A truth value.
    pub(super) fn boolean(&self, key: &str, field: &Field) -> Result<Option<bool>, Fault> {
        match field.as_ref().map(Spanned::get_ref) {
            None => Ok(None),
            Some(Value::Boolean(value)) => Ok(Some(*value)),
            Some(Value::String(text)) if self.reading.from_options && text == "true" => Ok(Some(true)),
            Some(Value::String(text)) if self.reading.from_options && text == "false" => Ok(Some(false)),
            Some(other) => Err(self.fault_at(key, field, format_args!("{other} is neither true nor false"))),
        }
    }

    /// A whole number within `range`.
    pub(super) fn integer(&self, key: &str, field: &Field, range: RangeInclusive<u64>) -> Result<Option<u64>, Fault> {
        let Some(value) = field.as_ref().map(Spanned::get_ref) else { return Ok(None) };
        let number = match value {
            Value::Integer(number) => u64::try_from(*number).ok(),
            Value::String(text) if self.reading.from_options => text.parse().ok(),
            _ => None,
        };
        match number {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.fault_at(
                key,
                field,
                format_args!("{value} is not a whole number from {} to {}", range.start(), range.end()),
            )),
        }
    }

    /// A list, each item of which `parse` reads as text; options write commas between them.
    pub(super) fn list<T>(
        &self,
        key: &str,
        field: &Field,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Result<Option<Vec<T>>, Fault> {
        let items: Vec<String> = match field.as_ref().map(Spanned::get_ref) {
            None => return Ok(None),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| match item {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
                .collect(),
            Some(Value::String(text)) if self.reading.from_options => {
                text.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect()
            }
            Some(other) => {
                return Err(self.fault_at(key, field, format_args!("{other} is not a list; write it in brackets")));
            }
        };
        let items = items.iter().map(|item| parse(item)).collect::<Result<_, _>>();
        items.map(Some).map_err(|message| self.fault_at(key, field, message))
    }

    /// A size or a rate in bytes, not 0.
    pub(super) fn size(&self, key: &str, field: &Field) -> Result<Option<u64>, Fault> {
        let size = match field.as_ref().map(Spanned::get_ref) {
            None => return Ok(None),
            Some(Value::Integer(number)) => {
                u64::try_from(*number).map_err(|_| self.fault_at(key, field, format_args!("{number} is below 0")))?
            }
            Some(Value::String(text)) => parse_size(text).map_err(|message| self.fault_at(key, field, message))?,
            Some(other) => {
                return Err(self.fault_at(key, field, format_args!("{other} is not a size; write 512 or \"64K\"")));
            }
        };
        if size == 0 {
            return Err(self.fault_at(key, field, "0 is no size here; leave the key out or write 1 or more"));
        }
        Ok(Some(size))
    }

    /// A duration within `range`.
    pub(super) fn duration(
        &self,
        key: &str,
        field: &Field,
        range: RangeInclusive<Duration>,
    ) -> Result<Option<Duration>, Fault> {
        let Some(value) = field.as_ref().map(Spanned::get_ref) else { return Ok(None) };
        let Value::String(text) = value else {
            return Err(self.fault_at(
                key,
                field,
                format_args!("{value} is not a duration; write a text with a unit, like \"30s\" or \"500ms\""),
            ));
        };
        let duration = parse_duration(text).map_err(|message| self.fault_at(key, field, message))?;
        if !range.contains(&duration) {
            return Err(self.fault_at(
                key,
                field,
                format_args!(
                    "{text:?} is not from {} to {}",
                    format_duration(*range.start()),
                    format_duration(*range.end())
                ),
            ));
        }
        Ok(Some(duration))
    }
}
