//! Holds the rule of `src/lib.rs`: a module imports only what stands after it in the list there. The order is read from
//! that list, so that it is written once.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// The driver side stands outside the list: who may import it, and what it may import.
const DRIVER: &str = "driver";
const DRIVER_USERS: [&str; 2] = ["control::demo", "driver"];
const DRIVER_IMPORTS: [&str; 5] = ["virtqueue", "dma", "address", "clock", "driver"];
/// Of the links it may import what both ends of a connection are made of.
const DRIVER_LINKS: [&str; 2] = ["crate::link::vfio_user::framing::", "crate::link::vfio_user::message::"];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The modules in the order of `lib.rs`, the driver side excepted.
fn order() -> Vec<String> {
    let text = fs::read_to_string(source().join("lib.rs")).unwrap();
    let modules: Vec<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ")?.strip_suffix(';'))
        .map(str::to_owned)
        .filter(|name| name != DRIVER)
        .collect();
    assert!(modules.len() > 5, "the list of modules in lib.rs cannot be read");
    let mut sorted = modules.clone();
    sorted.sort();
    assert_ne!(
        modules, sorted,
        "lib.rs lists its modules by the alphabet, not in the order in which a request meets them: rustfmt does that unless \
         rustfmt.toml says `reorder_modules = false`"
    );
    modules
}

/// All Rust files below, with their paths from there.
fn files(folder: &Path) -> Vec<(PathBuf, String)> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(folder).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// The module that a file is: `a/b.rs` and `a/b/mod.rs` are both `a::b`.
fn module(file: &Path) -> Vec<String> {
    let mut path: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    path
}

/// The text without comments.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

fn identifier(text: &str) -> &str {
    let end = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_').unwrap_or(text.len());
    &text[..end]
}

/// The first names after a path's `crate::`: one, or all of a group in braces.
fn heads(text: &str) -> Vec<&str> {
    let text = text.trim_start();
    let Some(group) = text.strip_prefix('{') else { return vec![identifier(text)] };
    let (mut depth, mut start, mut heads) = (0, true, Vec::new());
    for (at, letter) in group.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => start = true,
            letter if start && !letter.is_whitespace() => {
                heads.push(identifier(&group[at..]));
                start = false;
            }
            _ => {}
        }
    }
    heads
}

/// The names at the crate's root that a file refers to.
fn referred(module: &[String], text: &str) -> Vec<String> {
    let code = code(text);
    let mut names: Vec<String> = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        // `$crate` and `my_crate` are other things.
        if !code[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_') {
            names.extend(heads(&code[at + "crate::".len()..]).into_iter().map(str::to_owned));
        }
    }
    // `super::super::x` that climbs to the root.
    let climb = "super::".repeat(module.len());
    if !module.is_empty() {
        for (at, _) in code.match_indices(&climb) {
            let follows_path =
                code[..at].ends_with(|letter: char| letter.is_alphanumeric() || letter == '_' || letter == ':');
            let rest = &code[at + climb.len()..];
            if !follows_path && !rest.starts_with("super::") {
                names.extend(heads(rest).into_iter().map(str::to_owned));
            }
        }
    }
    names.sort();
    names.dedup();
    names
}

/// What is wrong with a file's imports.
fn upward(order: &[String], file: &Path, text: &str) -> Vec<String> {
    let module = module(file);
    if module.iter().any(|part| part == "tests") || ["lib", "main", "command"].contains(&module[0].as_str()) {
        return Vec::new();
    }
    let rank = |name: &str| order.iter().position(|other| other == name);
    let full = module.join("::");
    let mut wrong = Vec::new();
    for name in referred(&module, text) {
        let allowed = if name == DRIVER {
            DRIVER_USERS.iter().any(|user| full == *user || full.starts_with(&format!("{user}::")))
        } else if rank(&name).is_none() {
            true
        } else if module[0] == DRIVER {
            let code = code(text);
            let mut links = code.match_indices("crate::link");
            DRIVER_IMPORTS.contains(&name.as_str())
                || name == "link" && links.all(|(at, _)| DRIVER_LINKS.iter().any(|link| code[at..].starts_with(link)))
        } else {
            rank(&name) >= rank(&module[0])
        };
        if !allowed {
            wrong.push(format!("{}: {full} imports crate::{name}", file.display()));
        }
    }
    wrong
}

#[test]
fn imports_run_downward() {
    let order = order();
    let files = files(&source());
    assert!(files.len() > 10, "the sources are not where they should be");
    let wrong: Vec<String> = files.iter().flat_map(|(file, text)| upward(&order, file, text)).collect();
    assert!(wrong.is_empty(), "a module may import only what stands after it in src/lib.rs:\n{}", wrong.join("\n"));
}

#[test]
fn every_module_of_the_list_is_a_file_and_every_file_in_the_list() {
    let order = order();
    for (file, _) in files(&source()) {
        let first = module(&file)[0].clone();
        assert!(
            order.contains(&first) || [DRIVER, "lib", "main", "command"].contains(&first.as_str()),
            "{} is in no module of lib.rs",
            file.display()
        );
    }
}

#[test]
fn a_planted_upward_import_is_found() {
    let order = order();
    let found = |file: &str, text: &str| upward(&order, Path::new(file), text).len();
    assert_eq!(found("backend/ram.rs", "use crate::clock::Moment;\nuse crate::backend::Tag;\n"), 0);
    assert_eq!(found("backend/ram.rs", "use crate::reactor::Turn;\n"), 1);
    assert_eq!(found("backend/ram.rs", "fn f(turn: &crate::reactor::Turn) {}\n"), 1);
    assert_eq!(found("backend/ram.rs", "use crate::{clock::Moment, device::{blk, Device}};\n"), 1);
    assert_eq!(found("backend/ram.rs", "use crate::{\n    reactor,\n    volume::{self, clock},\n};\n"), 2);
    assert_eq!(found("backend/file/open.rs", "use super::super::super::control::Inventory;\n"), 1);
    assert_eq!(found("backend/file/open.rs", "use super::super::control::Inventory;\n"), 0, "backend's own");
    assert_eq!(found("backend/file/mod.rs", "use super::super::control::Inventory;\n"), 1);
    assert_eq!(found("address.rs", "use super::clock::Moment;\n"), 0);
    assert_eq!(found("clock.rs", "use super::address::Iova;\n"), 1);
    assert_eq!(found("backend/ram.rs", "//! See [`crate::reactor`].\n// crate::control\n"), 0);
    assert_eq!(found("backend/ram/tests.rs", "use crate::driver::Guest;\n"), 0);
    assert_eq!(found("device/blk.rs", "use crate::driver::Guest;\n"), 1);
    assert_eq!(found("control/demo.rs", "use crate::driver::Guest;\n"), 0);
    assert_eq!(found("driver/ring.rs", "use crate::virtqueue::split;\nuse crate::driver::Memory;\n"), 0);
    assert_eq!(found("driver/ring.rs", "use crate::link::HostLink;\n"), 1);
    assert_eq!(found("driver/ring.rs", "use crate::link::vfio_user::framing::Header;\n"), 0);
}
