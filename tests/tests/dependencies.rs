#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! What `deny.toml` says of licenses, sources and wildcards holds for every crate that is built for a card or its host. The same
//! file serves `cargo deny`, which also knows the advisory database where a network reaches it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn rules() -> toml::Table {
    std::fs::read_to_string(root().join("deny.toml")).unwrap().parse().unwrap()
}

fn list<'a>(rules: &'a toml::Table, part: &str, key: &str) -> BTreeSet<&'a str> {
    rules[part][key].as_array().unwrap().iter().map(|item| item.as_str().unwrap()).collect()
}

/// Every package that is built for one of the targets of `deny.toml`.
fn packages(rules: &toml::Table) -> Vec<Value> {
    let mut packages = Vec::new();
    for target in list(rules, "graph", "targets") {
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked", "--filter-platform", target])
            .current_dir(root())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        packages.extend(metadata["packages"].as_array().unwrap().iter().cloned());
    }
    packages
}

/// What is wrong with a package, if something is.
fn fault(rules: &toml::Table, package: &Value) -> Option<String> {
    let name = format!("{} {}", package["name"], package["version"]);
    let licenses = list(rules, "licenses", "allow");
    let Some(license) = package["license"].as_str() else { return Some(format!("{name} names no license")) };
    // Old packages write a slash for OR.
    let expression = match spdx::Expression::parse_mode(license, spdx::ParseMode::LAX) {
        Ok(expression) => expression,
        Err(error) => return Some(format!("{name}: {license}: {error}")),
    };
    let allowed =
        |requirement: &spdx::LicenseReq| requirement.license.id().is_some_and(|id| licenses.contains(id.name));
    if !expression.evaluate(allowed) {
        return Some(format!("{name}: {license} is not allowed"));
    }
    if let Some(source) = package["source"].as_str()
        && !list(rules, "sources", "allow-registry").contains(source.trim_start_matches("registry+"))
    {
        return Some(format!("{name} comes from {source}"));
    }
    let is_ours = package["source"].is_null();
    let wildcard = package["dependencies"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|dependency| is_ours && dependency["req"] == "*" && dependency["path"].is_null());
    wildcard.map(|dependency| format!("{name} takes any version of {}", dependency["name"]))
}

#[test]
fn every_dependency_is_allowed() {
    let rules = rules();
    let packages = packages(&rules);
    assert!(packages.len() > 100, "only {} packages were looked at", packages.len());
    let faults: BTreeSet<String> = packages.iter().filter_map(|package| fault(&rules, package)).collect();
    assert!(faults.is_empty(), "deny.toml forbids: {faults:#?}");
}

#[test]
fn what_is_forbidden_is_found() {
    let rules = rules();
    let registry = "registry+https://github.com/rust-lang/crates.io-index";
    let package = |license: &str, source: &str| serde_json::json!({ "name": "a", "version": "1.0.0", "license": license, "source": source, "dependencies": [] });
    assert_eq!(fault(&rules, &package("MIT/Apache-2.0", registry)), None);
    assert_eq!(fault(&rules, &package("GPL-3.0 OR MIT", registry)), None);
    for (license, source) in
        [("GPL-3.0", registry), ("MIT AND GPL-2.0", registry), ("", registry), ("MIT", "git+https://example.org/a")]
    {
        assert!(fault(&rules, &package(license, source)).is_some(), "{license:?} from {source}");
    }
    let mut ours = package("MIT", registry);
    ours["source"] = Value::Null;
    ours["dependencies"] = serde_json::json!([{ "name": "b", "req": "*", "path": null }]);
    assert!(fault(&rules, &ours).is_some());
}
