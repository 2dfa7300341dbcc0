//! Holds what no lint holds: files of one subject and bearable length, each with a head that says what it is; names that
//! say something; `unsafe` only where a file's head gives the reason.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// A file of about 400 lines holds one subject; at this many it holds two.
const LINES_MAX: usize = 600;

/// Words that name nothing.
const EMPTY_WORDS: [&str; 5] = ["Manager", "Helper", "Handler", "Util", "Context"];

/// All Rust files of the workspace's members.
fn files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["proto", "device-svc", "host-shim", "tests", "bench"].iter().map(|member| root.join(member)).collect();
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_some_and(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

/// Tests of a module, which its own file introduces.
fn is_test(file: &Path) -> bool {
    file.components().skip(1).any(|part| part.as_os_str() == "tests" || part.as_os_str() == "tests.rs")
}

/// Code without comments and the content of plain strings.
fn code(text: &str) -> String {
    let mut code = String::new();
    for line in text.lines() {
        let mut inside = false;
        let mut letters = line.chars().peekable();
        while let Some(letter) = letters.next() {
            match letter {
                '\\' if inside => {
                    letters.next();
                }
                '"' => inside = !inside,
                '/' if !inside && letters.peek() == Some(&'/') => break,
                letter if !inside => code.push(letter),
                _ => {}
            }
        }
        code.push('\n');
    }
    code
}

/// The words of code.
fn words(code: &str) -> Vec<&str> {
    code.split(|letter: char| !letter.is_alphanumeric() && letter != '_').filter(|word| !word.is_empty()).collect()
}

/// What is wrong with a file.
fn faults(file: &Path, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = text.lines().count();
    if lines > LINES_MAX {
        faults.push(format!("has {lines} lines, more than {LINES_MAX}: give its second subject a file"));
    }
    if !is_test(file) && !text.starts_with("//!") {
        faults.push("does not begin by saying what it is (`//!`)".to_owned());
    }
    for part in file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()) {
        if EMPTY_WORDS
            .iter()
            .any(|empty| part.split('_').any(|word| word.trim_end_matches('s') == empty.to_lowercase()))
        {
            faults.push(format!("the name {part} says nothing"));
        }
    }
    let code = code(text);
    let words = words(&code);
    for pair in words.windows(2) {
        if ["struct", "enum", "trait", "type", "union"].contains(&pair[0])
            && EMPTY_WORDS.iter().any(|empty| pair[1].contains(empty))
        {
            faults.push(format!("the name {} says nothing", pair[1]));
        }
    }
    // Attributes, strings aside: where `unsafe` is let in, it is expected, with a reason.
    let compact: String = code.split_whitespace().collect();
    if compact.contains("allow(unsafe_code") {
        faults.push("allows unsafe_code: use `expect` with a reason".to_owned());
    }
    let expected = compact.contains("expect(unsafe_code,reason=");
    if !is_test(file) && words.contains(&"unsafe") && !expected {
        faults.push("has unsafe code, and its head does not say why: `#![expect(unsafe_code, reason = …)]`".to_owned());
    }
    faults.iter().map(|fault| format!("{}: {fault}", file.display())).collect()
}

#[test]
fn files_are_tidy() {
    let files = files();
    assert!(files.len() > 10, "the sources are not where they should be");
    let faults: Vec<String> = files.iter().flat_map(|(file, text)| faults(file, text)).collect();
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn what_is_untidy_is_found() {
    let count = |file: &str, text: &str| faults(Path::new(file), text).len();
    assert_eq!(count("device-svc/src/a.rs", "//! A.\nstruct Lane;\n"), 0);
    assert_eq!(count("device-svc/src/a.rs", "struct Lane;\n"), 1);
    assert_eq!(count("device-svc/src/a/tests.rs", "struct Lane;\n"), 0);
    assert_eq!(count("device-svc/src/a.rs", &format!("//! A.\n{}", "\n".repeat(LINES_MAX))), 1);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\npub(crate) struct LaneManager;\n"), 1);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\nenum Utility { A }\ntype HelperOf<T> = T;\n"), 2);
    assert_eq!(count("device-svc/src/file_utils.rs", "//! A.\n"), 1);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\nfn f() { unsafe { g() } }\n"), 1);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\n#![expect(unsafe_code, reason = \"r\")]\nunsafe fn f() {}\n"), 0);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\n#![allow(unsafe_code)]\nunsafe fn f() {}\n"), 2);
    assert_eq!(count("device-svc/src/a.rs", "//! A.\n// unsafe\nconst A: &str = \"unsafe\";\n"), 0);
}
