//! The demo, as a newcomer meets it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

/// Runs the demo with its temporary folder in `folder`; returns what it said.
fn demo(folder: &std::path::Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_device-svc"));
    let output = command.arg("demo").args(arguments).env("TMPDIR", folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 0, "the demo leaves something behind");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn it_verifies_all_bytes_and_shows_how_to_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let text = demo(folder.path(), &[]);
    assert!(text.contains("all 67108864 bytes verified"), "{text}");
    for part in ["depth 1 ", "depth 32 ", "median", "p99", "vhost-user-blk-pci", "share=on", "serve --config"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn its_figures_are_json_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let figures: serde_json::Value = serde_json::from_str(&demo(folder.path(), &["--json"])).unwrap();
    assert_eq!(figures["verified-bytes"], 64 << 20);
    let depths = figures["random-4k-reads"].as_array().unwrap();
    assert_eq!(depths.len(), 2);
    for depth in depths {
        assert!(depth["iops"].as_f64().unwrap() > 0.0, "{figures}");
        assert!(depth["p99-ns"].as_u64() >= depth["median-ns"].as_u64(), "{figures}");
    }
}
