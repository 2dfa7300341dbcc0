//! A volume, uplink or function written as options of a command, in the words of the file: `--backend file,path=/x,create=10G`.
//!
//! Options are turned into the text of a table and read like one, so that there is one set of rules and messages.

use std::path::Path;

use toml::{Spanned, Value};

use super::field::{Fault, Reading};
use super::raw::RawConfig;
use super::{
    ConfigError, FunctionConfig, LimitConfig, NetChange, UplinkConfig, VolumeConfig, blk, function, net, uplink, volume,
};

/// The options given so far.
#[derive(Default, Debug)]
pub struct Options {
    table: toml::Table,
}

impl Options {
    /// The options as a table of the configuration, all of whose values are texts.
    #[must_use]
    pub fn into_table(self) -> toml::Table {
        self.table
    }

    /// The options of such a table.
    #[must_use]
    pub const fn from_table(table: toml::Table) -> Self {
        Self { table }
    }

    /// Adds `key` with a plain value, if there is one.
    #[must_use]
    pub fn with(mut self, key: &str, value: Option<impl ToString>) -> Self {
        if let Some(value) = value {
            self.table.insert(key.to_owned(), Value::String(value.to_string()));
        }
        self
    }

    /// Adds `key` with a table written as `type,key=value,…`; a comma within a value is written twice.
    ///
    /// # Errors
    /// A part without `=`, or a key given twice.
    pub fn with_typed_table(self, key: &str, text: Option<&str>) -> Result<Self, ConfigError> {
        self.with_parts(key, text, true)
    }

    /// Adds `key` with a table written as `key=value,…`.
    ///
    /// # Errors
    /// As for [`with_typed_table`](Self::with_typed_table).
    pub fn with_table(self, key: &str, text: Option<&str>) -> Result<Self, ConfigError> {
        self.with_parts(key, text, false)
    }

    /// Adds `limit` written as `key=value,…`; an empty text is no limit.
    ///
    /// # Errors
    /// As for [`with_table`](Self::with_table).
    pub fn with_limit(self, text: Option<&str>) -> Result<Self, ConfigError> {
        match text {
            Some("") => Ok(self.with_pairs("limit", [])),
            text => self.with_table("limit", text),
        }
    }

    /// Adds `key` with a table of these pairs, those without a value left out.
    #[must_use]
    pub fn with_pairs(mut self, key: &str, pairs: impl IntoIterator<Item = (&'static str, Option<String>)>) -> Self {
        let given = pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), Value::String(value?))));
        self.table.insert(key.to_owned(), Value::Table(given.collect()));
        self
    }

    fn with_parts(mut self, key: &str, text: Option<&str>, typed: bool) -> Result<Self, ConfigError> {
        let Some(text) = text else { return Ok(self) };
        let mut table = toml::Table::new();
        for (position, part) in split_commas(text).into_iter().enumerate() {
            let (name, value) = match part.split_once('=') {
                Some((name, value)) => (name.to_owned(), value.to_owned()),
                None if typed && position == 0 => ("type".to_owned(), part),
                None => {
                    let message = format!("--{key}: {part:?} has no `=`; write {key} as {}", example(typed));
                    return Err(ConfigError::Options(message));
                }
            };
            if table.insert(name.clone(), Value::String(value)).is_some() {
                return Err(ConfigError::Options(format!("--{key}: `{name}` is given twice; remove one")));
            }
        }
        self.table.insert(key.to_owned(), Value::Table(table));
        Ok(self)
    }

    /// Reads the options as a volume; relative paths start from `folder`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn volume(self, folder: &Path) -> Result<VolumeConfig, ConfigError> {
        self.read("volume", |raw| raw.volume, |raw| volume::volume(raw, options_reading(folder)))
    }

    /// Reads the options as an uplink.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn uplink(self) -> Result<UplinkConfig, ConfigError> {
        self.read("uplink", |raw| raw.uplink, |raw| uplink::uplink(raw, options_reading(Path::new("/"))))
    }

    /// Reads the options as a function; relative paths start from `folder`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn function(self, folder: &Path) -> Result<FunctionConfig, ConfigError> {
        self.read("function", |raw| raw.function, |raw| function::function(raw, options_reading(folder)))
    }

    /// Reads the options as a change of a disk that runs: `name`, and its new `limit`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn blk_change(self) -> Result<LimitConfig, ConfigError> {
        self.read("function", |raw| raw.function, |raw| blk::blk_change(raw, options_reading(Path::new("/"))))
    }

    /// Reads the options as a change of a network interface that runs: `name`, and what changes of `mac`, `mtu` and `limit`.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn net_change(self) -> Result<NetChange, ConfigError> {
        self.read("function", |raw| raw.function, |raw| net::net_change(raw, options_reading(Path::new("/"))))
    }

    fn read<Raw, T>(
        self,
        array: &str,
        pick: impl FnOnce(RawConfig) -> Vec<Spanned<Raw>>,
        check: impl FnOnce(Spanned<Raw>) -> Result<T, Fault>,
    ) -> Result<T, ConfigError> {
        let mut document = toml::Table::new();
        document.insert(array.to_owned(), Value::Array(vec![Value::Table(self.table)]));
        let text = toml::to_string(&document).map_err(|error| ConfigError::Options(error.to_string()))?;
        let raw: RawConfig =
            toml::from_str(&text).map_err(|error| ConfigError::Options(super::from_toml(error).message))?;
        let raw = pick(raw).pop().ok_or_else(|| ConfigError::Options(format!("no {array} given")))?;
        check(raw).map_err(|fault| ConfigError::Options(fault.message))
    }
}

fn options_reading(folder: &Path) -> Reading<'_> {
    Reading { from_options: true, folder }
}

const fn example(typed: bool) -> &'static str {
    if typed { "type,key=value,…" } else { "key=value,…" }
}

/// Splits at single commas; two stand for one within a part.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match (character, parts.last_mut()) {
            (',', Some(last)) if characters.peek() == Some(&',') => {
                characters.next();
                last.push(',');
            }
            (',', _) => parts.push(String::new()),
            (other, Some(last)) => last.push(other),
            (_, None) => {}
        }
    }
    parts
}
