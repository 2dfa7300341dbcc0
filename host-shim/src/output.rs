//! What is printed: lines for people, one JSON object a line for programs.

use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};
use proto::v1::{Event, EventKind, FunctionView, Missed, State};
use serde_json::{Value, json};

/// Writes to standard output at once. A reader that has seen enough (`| head`) ends the program, and is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("standard output"),
    }
}

fn state(function: &FunctionView) -> &'static str {
    match State::try_from(function.state).unwrap_or_default() {
        State::Unspecified => "unknown",
        State::Waiting => "waiting",
        State::Attached => "attached",
        State::NeedsReset => "needs-reset",
        State::Failed => "failed",
    }
}

/// Whether a network interface's link is up; `None` for a disk.
fn link_state(function: &FunctionView) -> Option<&'static str> {
    let link = function.link_state.as_ref()?;
    Some(if link.set_up && link.carrier { "up" } else { "down" })
}

fn view(function: &FunctionView) -> Value {
    let (name, kind, state, link) = (&function.name, &function.r#type, state(function), &function.link);
    match link_state(function) {
        None => json!({
            "name": name, "type": kind, "state": state, "link": link,
            "volume-uuid": function.volume_uuid, "serial": function.serial, "size-bytes": function.size_bytes,
        }),
        Some(link_state) => json!({
            "name": name, "type": kind, "state": state, "link": link, "mac": function.mac, "link-state": link_state,
        }),
    }
}

/// All functions.
pub(crate) fn list(functions: &[FunctionView], json: bool) -> String {
    if json {
        let all = Value::Array(functions.iter().map(view).collect());
        return format!("{all:#}\n");
    }
    let head = ["NAME", "TYPE", "STATE", "SERIAL", "SIZE", "MAC", "LINK"].map(str::to_owned);
    let rows = functions.iter().map(|function| {
        let none = || "-".to_owned();
        let (serial, size, mac) = match link_state(function) {
            None => (function.serial.clone(), function.size_bytes.to_string(), none()),
            Some(_) => (none(), none(), function.mac.clone()),
        };
        let (name, kind, link) = (function.name.clone(), function.r#type.clone(), function.link.clone());
        [name, kind, state(function).to_owned(), serial, size, mac, link]
    });
    let rows: Vec<[String; 7]> = std::iter::once(head).chain(rows).collect();
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let padded = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(padded.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A function that is there when following starts.
pub(crate) fn present(function: &FunctionView, json: bool) -> String {
    if json {
        let mut value = view(function);
        value["event"] = "present".into();
        return format!("{value}\n");
    }
    let identity = match link_state(function) {
        None => format!("serial {}", function.serial),
        Some(link_state) => format!("mac {}, link {link_state}", function.mac),
    };
    format!("present {} ({}, {}, {identity})\n", function.name, state(function), function.link)
}

/// One event.
pub(crate) fn event(event: &Event, json: bool) -> String {
    let kind = match EventKind::try_from(event.kind).unwrap_or_default() {
        EventKind::Unspecified => "unknown",
        EventKind::Created => "created",
        EventKind::Deleted => "deleted",
        EventKind::Attached => "attached",
        EventKind::Detached => "detached",
        EventKind::NeedsReset => "needs-reset",
        EventKind::Recovered => "recovered",
        EventKind::Resized => "resized",
        EventKind::LinkUp => "link-up",
        EventKind::LinkDown => "link-down",
    };
    if json {
        let mut value = json!({
            "event": kind, "function": event.function, "sequence": event.sequence, "unix-ms": event.unix_ms,
        });
        // A network interface has none.
        if !event.volume_uuid.is_empty() {
            value["volume-uuid"] = event.volume_uuid.clone().into();
        }
        if event.size_bytes != 0 {
            value["size-bytes"] = event.size_bytes.into();
        }
        if !event.reason.is_empty() {
            value["reason"] = event.reason.clone().into();
        }
        return format!("{value}\n");
    }
    let more = match (event.size_bytes, event.reason.as_str()) {
        (0, "") => String::new(),
        (0, reason) => format!(" ({reason})"),
        (bytes, _) => format!(" ({bytes} bytes)"),
    };
    format!("{kind} {}{more}\n", event.function)
}

/// Events that this follower will not see.
pub(crate) fn missed(missed: &Missed, json: bool) -> String {
    let text = match missed.events {
        0 => "the card was restarted; its functions are listed anew".to_owned(),
        1 => "1 event was missed; the functions are listed anew".to_owned(),
        count => format!("{count} events were missed; the functions are listed anew"),
    };
    if json {
        return format!("{}\n", json!({ "event": "missed", "missed": missed.events, "message": text }));
    }
    format!("missed: {text}\n")
}

/// Something about the card itself.
pub(crate) fn note(kind: &str, text: &str, json: bool) -> String {
    if json { format!("{}\n", json!({ "event": kind, "message": text })) } else { format!("{kind}: {text}\n") }
}
