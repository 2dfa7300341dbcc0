//! The text of a kept state: one line that says what it is, then the tables of the configuration file with two keys more.
//!
//! ```text
//!   dray-state format=1 readable-from=1 seal=8a6e0804-2bd0-4672-b79d-d97027f9071a
//!   running = true
//!   [[volume]]
//!   origin = "command"
//!   settings = { name = "data", backend = { type = "file", path = "/srv/data.img" }, … }
//! ```
//!
//! `seal` is a digest of the two numbers and of all that follows the line, so that a file that was cut or changed is known as such. Versions: each writes its
//! own format N, and reads N - 1, N and N + 1. It can read N + 1 because the next version puts what is new into tables called `more`,
//! which a version that does not know them leaves out, as `readable-from` promises; a version that cannot promise it says a higher
//! `readable-from` and so is refused. Whatever else is not known is wrong. The feature `state-next` makes a build that writes the
//! next format, with which tests go to and fro.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{CardState, DocumentFault, Kept, KeptFunction, Origin};
use crate::config::{ConfigError, FunctionConfig, Options, UplinkConfig, VolumeConfig};

/// The first format with `more`: which version has written the state.
const FORMAT_WITH_MORE: u32 = 2;

/// What the first line starts with.
const MARK: &str = "dray-state ";
/// Digests of states are of this name space.
const SEAL_SPACE: Uuid = Uuid::from_u128(0x5d0c_4b3e_9e57_4d1c_8b1a_64f2_7c91_e0a3);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Document {
    running: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<More>,
    #[serde(default)]
    volume: Vec<Entry>,
    #[serde(default)]
    uplink: Vec<Entry>,
    #[serde(default)]
    function: Vec<Entry>,
}

/// What format 2 says beyond format 1.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct More {
    written_by: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    origin: Word,
    /// Of a network interface whose link was set down.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    link_down: bool,
    /// As the options of a command.
    settings: toml::Table,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Word {
    File,
    Command,
}

fn word(origin: Origin) -> Word {
    match origin {
        Origin::File => Word::File,
        Origin::Command => Word::Command,
    }
}

fn entry(origin: Origin, written: Result<Options, ConfigError>, link_down: bool) -> Result<Entry, DocumentFault> {
    let settings = written.map_err(|error| DocumentFault::Wrong(error.to_string()))?.into_table();
    Ok(Entry { origin: word(origin), link_down, settings })
}

/// The text of `state` in `format`.
///
/// # Errors
/// Never in practice: what was parsed can be written.
pub(super) fn encode(state: &CardState, format: u32) -> Result<String, DocumentFault> {
    let volumes = state.volumes.iter().map(|kept| entry(kept.origin, kept.config.written(), false));
    let uplinks = state.uplinks.iter().map(|kept| entry(kept.origin, kept.config.written(), false));
    let functions = state.functions.iter().map(|KeptFunction { kept, link_up }| {
        entry(kept.origin, kept.config.written(), !link_up) //
    });
    let document = Document {
        running: state.running,
        more: (format >= FORMAT_WITH_MORE).then(|| More { written_by: env!("CARGO_PKG_VERSION").to_owned() }),
        volume: volumes.collect::<Result<_, _>>()?,
        uplink: uplinks.collect::<Result<_, _>>()?,
        function: functions.collect::<Result<_, _>>()?,
    };
    let body = toml::to_string(&document).map_err(|error| DocumentFault::Wrong(error.to_string()))?;
    let readable_from = format.saturating_sub(1).max(1);
    let seal = seal(format, readable_from, &body);
    Ok(format!("{MARK}format={format} readable-from={readable_from} seal={seal}\n{body}"))
}

pub(super) fn seal(format: u32, readable_from: u32, body: &str) -> Uuid {
    Uuid::new_v5(&SEAL_SPACE, format!("{format} {readable_from}\n{body}").as_bytes())
}

/// The first line.
struct Head {
    format: u32,
    readable_from: u32,
    seal: Uuid,
}

fn head(line: &str) -> Option<Head> {
    let mut words = line.strip_prefix(MARK)?.split(' ');
    let mut value = |key: &str| words.next()?.strip_prefix(key)?.strip_prefix('=');
    let format = value("format")?.parse().ok()?;
    let readable_from = value("readable-from")?.parse().ok()?;
    let seal = value("seal")?.parse().ok()?;
    // What a later format says on this line beyond it is not ours to judge.
    Some(Head { format, readable_from, seal })
}

/// The state in `text`, as a version reads it that writes `known`.
///
/// # Errors
/// What the text is instead.
pub(super) fn decode(text: &str, known: u32) -> Result<CardState, DocumentFault> {
    if !text.starts_with(MARK) {
        return Err(if MARK.starts_with(text) { DocumentFault::Torn } else { DocumentFault::Foreign });
    }
    let (line, body) = text.split_once('\n').ok_or(DocumentFault::Torn)?;
    let Head { format, readable_from, seal: said } = head(line).ok_or(DocumentFault::Torn)?;
    if readable_from > known || format > known + 1 {
        return Err(DocumentFault::Newer { format });
    }
    if said != seal(format, readable_from, body) {
        return Err(DocumentFault::Torn);
    }
    if format == 0 || format + 1 < known {
        return Err(DocumentFault::Older { format });
    }
    let wrong = |error: toml::de::Error| DocumentFault::Wrong(error.message().replace('\n', ", "));
    let mut table: toml::Table = toml::from_str(body).map_err(wrong)?;
    if format > known {
        leave_out_more(&mut table);
    }
    let document: Document = table.try_into().map_err(wrong)?;
    if document.more.is_some() != (format >= FORMAT_WITH_MORE && format <= known) {
        return Err(DocumentFault::Wrong(format!("format {format} has `more`, and no other")));
    }
    read(document)
}

/// Takes away what the next version says beyond this one, wherever it stands.
fn leave_out_more(table: &mut toml::Table) {
    table.remove("more");
    for value in table.iter_mut().map(|(_, value)| value) {
        match value {
            toml::Value::Table(table) => leave_out_more(table),
            toml::Value::Array(values) => {
                values.iter_mut().filter_map(toml::Value::as_table_mut).for_each(leave_out_more);
            }
            _ => {}
        }
    }
}

fn read(document: Document) -> Result<CardState, DocumentFault> {
    let root = Path::new("/");
    let volumes = entries(document.volume, |options| options.volume(root), |volume: &VolumeConfig| &volume.name)?;
    let uplinks = entries(document.uplink, Options::uplink, |uplink: &UplinkConfig| &uplink.name)?;
    let functions =
        entries(document.function, |options| options.function(root), |function: &FunctionConfig| &function.name)?;
    Ok(CardState {
        running: document.running,
        volumes: volumes.into_iter().map(|(kept, _)| kept).collect(),
        uplinks: uplinks.into_iter().map(|(kept, _)| kept).collect(),
        functions: functions.into_iter().map(|(kept, link_down)| KeptFunction { kept, link_up: !link_down }).collect(),
    })
}

/// Reads tables by the rules of the configuration. Each comes with whether its link was set down.
fn entries<T>(
    entries: Vec<Entry>,
    read: impl Fn(Options) -> Result<T, ConfigError>,
    name: impl Fn(&T) -> &str,
) -> Result<Vec<(Kept<T>, bool)>, DocumentFault> {
    let wrong = |message: String| DocumentFault::Wrong(message);
    let mut names = BTreeSet::new();
    let mut all = Vec::with_capacity(entries.len());
    for Entry { origin, link_down, settings } in entries {
        let config = read(Options::from_table(settings)).map_err(|error| wrong(error.to_string()))?;
        if !names.insert(name(&config).to_owned()) {
            return Err(wrong(format!("{:?} is there twice", name(&config))));
        }
        let origin = match origin {
            Word::File => Origin::File,
            Word::Command => Origin::Command,
        };
        all.push((Kept { config, origin }, link_down));
    }
    Ok(all)
}
