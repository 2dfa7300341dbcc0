#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! A kept state comes back as it was, also in the version before and the next one; whatever is not a whole state is said to be so, and
//! is left as it is.

use std::os::unix::fs::PermissionsExt;

use super::document::{decode, encode, seal};
use super::*;
use crate::config::Config;

/// One of each kind, with every key that can be given.
const ALL: &str = r#"
[reactors]
poll = "always"
[[volume]]
name = "a"
uuid = "7f1c1d5e-8b0a-4c7e-9a55-0123456789ab"
serial = "S-1"
backend = { type = "file", path = "/srv/a,b.img", create = "10G", direct = false }
io-timeout = "1500ms"
read-only = true
recovery = "fail"
[[volume]]
name = "n"
backend = { type = "nbd", uri = "nbds://h:10809/e", connections = 2, tls-ca = "/c", tls-certificate = "/d", tls-key = "/k", tls-hostname = "h" }
[[volume]]
name = "m"
backend = { type = "ram", size = "1M" }
[[uplink]]
name = "tap"
backend = { type = "tap", name = "dray0", netns = "blue", mtu = 1400 }
[[uplink]]
name = "far"
backend = { type = "vxlan", vni = 7, local = "10.9.0.1", remote = ["10.9.0.2", "10.9.0.3"], port = 4790, learn = "any" }
[[uplink]]
name = "lan"
backend = { type = "switch", uplink = "tap" }
[[limit-group]]
name = "gold"
iops = 10
[[function]]
name = "d"
type = "blk"
link = { type = "vhost-user", socket = "/run/d.sock", mode = "client", payload = "copy" }
volume = "a"
queues = 3
queue-size = 64
packed = false
seg-max = 17
block-size = 4096
write-cache = false
limit = { iops = 5, read-bandwidth = "3M", burst = "2s" }
limit-group = "gold"
[[function]]
name = "e"
type = "net"
link = { type = "vfio-user", socket = "/run/e.sock", socket-mode = "0640", notify = "mapped", msix = false }
uplink = "lan"
mac = "52:54:00:12:34:56"
mtu = 1300
queue-pairs = 2
rss = true
vlan = 9
anti-spoofing = { mac = false, vlan = [], ip = ["10.0.0.5", "fd00::5"] }
limit = { packets = 9, transmit-bandwidth = "1M" }
"#;

fn all() -> CardState {
    let config = Config::parse(ALL, "test", std::path::Path::new("/")).unwrap();
    let origin = |name: &str| if name == "a" { Origin::File } else { Origin::Command };
    let functions = config.functions.into_iter().map(|config| {
        let (link_up, origin) = (config.name != "e", origin(&config.name));
        KeptFunction { kept: Kept { config, origin }, link_up }
    });
    CardState {
        running: true,
        volumes: config.volumes.into_iter().map(|config| Kept { origin: origin(&config.name), config }).collect(),
        uplinks: config.uplinks.into_iter().map(|config| Kept { origin: Origin::Command, config }).collect(),
        functions: functions.collect(),
    }
}

#[test]
fn a_state_is_read_by_its_version_the_one_before_and_the_next_one() {
    let state = all();
    for written in [1, 2] {
        let text = encode(&state, written).unwrap();
        for reader in [1, 2] {
            assert_eq!(decode(&text, reader).as_ref(), Ok(&state), "format {written} in version {reader}:\n{text}");
        }
    }
    assert!(encode(&state, 2).unwrap().contains("[more]"), "the formats differ");
    let empty = CardState::default();
    assert_eq!(decode(&encode(&empty, FORMAT).unwrap(), FORMAT), Ok(empty));
}

#[test]
fn other_versions_are_told_apart() {
    let text = encode(&all(), 3).unwrap();
    assert_eq!(decode(&text, 1), Err(DocumentFault::Newer { format: 3 }));
    let text = encode(&all(), 1).unwrap();
    assert_eq!(decode(&text, 3), Err(DocumentFault::Older { format: 1 }));
    // The next version, which says that this one does not understand it.
    let text = encode(&all(), 2).unwrap().replacen("readable-from=1", "readable-from=2", 1);
    assert_eq!(decode(&text, 1), Err(DocumentFault::Newer { format: 2 }));
}

#[test]
fn a_state_that_is_cut_or_changed_anywhere_is_not_taken() {
    let text = encode(&all(), FORMAT).unwrap();
    for end in 0..text.len() {
        if text.is_char_boundary(end) {
            assert!(decode(&text[..end], FORMAT).is_err(), "cut at {end}");
        }
    }
    for at in 0..text.len() {
        let mut changed = text.clone().into_bytes();
        changed[at] ^= 1;
        let Ok(changed) = String::from_utf8(changed) else { continue };
        assert!(decode(&changed, FORMAT).is_err(), "changed at {at}");
    }
    assert_eq!(decode(&format!("{text}\n"), FORMAT), Err(DocumentFault::Torn));
    assert_eq!(decode("running = true\n", FORMAT), Err(DocumentFault::Foreign));
    assert_eq!(decode("", FORMAT), Err(DocumentFault::Torn));
}

#[test]
fn a_state_that_is_whole_but_wrong_is_not_taken() {
    let mut twice = all();
    twice.volumes.push(twice.volumes[0].clone());
    let text = encode(&twice, FORMAT).unwrap();
    assert_eq!(decode(&text, FORMAT), Err(DocumentFault::Wrong("\"a\" is there twice".to_owned())));
    // What one format says is no part of the other.
    let body = encode(&all(), 2).unwrap().split_once('\n').unwrap().1.to_owned();
    let text = format!("dray-state format=1 readable-from=1 seal={}\n{body}", seal(1, 1, &body));
    assert!(matches!(decode(&text, 1), Err(DocumentFault::Wrong(_))));
}

#[test]
fn a_folder_is_one_processs_and_keeps_what_is_written() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("deep/state");
    let (folder, state) = StateFolder::open(&path).unwrap();
    assert_eq!(state, CardState::default());
    let error = StateFolder::open(&path).unwrap_err().to_string();
    let expected = format!("the state folder {} is used by process {};", path.display(), std::process::id());
    assert!(error.starts_with(&expected), "{error}");
    folder.write(&all()).unwrap();
    folder.write(&CardState { running: false, ..all() }).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&folder.file())), (0o700, 0o600));
    drop(folder);
    // A process died while it wrote.
    std::fs::write(path.join("card.state.new"), "dray-sta").unwrap();
    let (folder, state) = StateFolder::open(&path).unwrap();
    assert_eq!(state, CardState { running: false, ..all() });
    folder.write(&all()).unwrap();
    // The next one cannot be written, and the last one stays.
    std::fs::create_dir(path.join("card.state.new")).unwrap();
    let error = folder.write(&CardState::default()).unwrap_err().to_string();
    assert!(error.contains("give a folder that can be written with --state"), "{error}");
    drop(folder);
    assert_eq!(StateFolder::open(&path).unwrap().1, all());
}

#[test]
fn what_is_no_state_is_named_and_left_as_it_is() {
    let parent = tempfile::tempdir().unwrap();
    let file = parent.path().join("card.state");
    let whole = encode(&all(), FORMAT).unwrap();
    let newer = whole.replacen("format=", "format=9", 1);
    let texts: [(&[u8], &str); 4] = [
        (&whole.as_bytes()[..whole.len() - 1], "the state is torn, or was changed by hand; put back a copy"),
        (b"[[volume]]\n", "this is no state of a card; move it away"),
        (b"\xff\xfe", "this is no state of a card; move it away"),
        (newer.as_bytes(), "and this version reads up to"),
    ];
    for (bytes, expected) in texts {
        std::fs::write(&file, bytes).unwrap();
        let error = StateFolder::open(parent.path()).unwrap_err().to_string();
        assert!(error.starts_with(&file.display().to_string()) && error.contains(expected), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), bytes);
    }
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let error = StateFolder::open(parent.path()).unwrap_err().to_string();
    assert!(error.contains("this is no state of a card"), "{error}");
}
