//! What is taken, what is refused, and with which words.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod net;
mod tunnel;

use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use uuid::Uuid;

use super::quantity::{format_duration, format_size, parse_duration, parse_size};
use super::*;

const FULL: &str = r#"
[reactors]
count = "auto"
poll = "adaptive"

[control]
listen = "unix:/run/dray/card.sock"
metrics = "127.0.0.1:9464"

[[volume]]
name = "root"
uuid = "7f1c1d5e-8b0a-4c7e-9a55-0123456789ab"
backend = { type = "nbd", uri = "nbd://127.0.0.1:10809/root", connections = 2 }
io-timeout = "30s"
read-only = false

[[limit-group]]
name = "gold"
iops = 100000

[[function]]
name = "vm1-disk0"
type = "blk"
link = { type = "vhost-user", socket = "/run/dray/vm1-disk0.sock", mode = "server", socket-mode = "0660", payload = "in-place" }
volume = "root"
queues = 4
queue-size = 256
packed = true
limit = { iops = 50000, bandwidth = "400M" }
limit-group = "gold"
"#;

const NULL: &str = "[[volume]]\nname = \"v\"\nbackend = { type = \"null\", size = \"1G\" }\n";

fn parsed(text: &str) -> Config {
    Config::parse(text, "dray.toml", Path::new("/etc/dray")).unwrap()
}

#[track_caller]
fn refused(text: &str, expected: &str) {
    let error = Config::parse(text, "dray.toml", Path::new("/etc/dray")).unwrap_err().to_string();
    assert_eq!(error, expected);
    assert!(!error.contains('\n'), "one line: {error}");
}

fn blk(function: &FunctionConfig) -> &BlkConfig {
    match &function.device {
        DeviceConfig::Blk(blk) => blk,
        DeviceConfig::Net(_) => panic!("{function:?} is no disk"),
    }
}

#[test]
fn the_full_example_is_taken() {
    let config = parsed(FULL);
    assert_eq!(config.reactors, ReactorsConfig { count: ReactorCount::Auto, poll: PollConfig::Adaptive });
    assert_eq!(config.control.listen.to_string(), "unix:/run/dray/card.sock");
    assert_eq!(config.control.shim.to_string(), "unix:/run/dray/shim.sock");
    assert_eq!(config.control.metrics, Some("127.0.0.1:9464".parse().unwrap()));
    let volume = &config.volumes[0];
    assert_eq!(volume.uuid, Uuid::parse_str("7f1c1d5e-8b0a-4c7e-9a55-0123456789ab").unwrap());
    assert_eq!(volume.serial_text(), "7f1c1d5e8b0a4c7e9a55");
    assert_eq!(volume.io_timeout, Duration::from_secs(30));
    assert_eq!(
        volume.backend,
        BackendConfig::Nbd(NbdConfig {
            uri: "nbd://127.0.0.1:10809/root".to_owned(),
            connections: 2,
            tls_ca: None,
            tls_identity: None,
            tls_hostname: None
        })
    );
    assert_eq!(
        config.functions[0],
        FunctionConfig {
            name: "vm1-disk0".to_owned(),
            link: LinkConfig {
                socket: PathBuf::from("/run/dray/vm1-disk0.sock"),
                socket_mode: 0o660,
                payload: PayloadConfig::InPlace,
                kind: LinkKind::VhostUser { mode: SocketMode::Server },
            },
            queue_size: 256,
            packed: true,
            device: DeviceConfig::Blk(BlkConfig {
                volume: "root".to_owned(),
                queues: 4,
                seg_max: SEG_MAX_DEFAULT,
                block_bytes: None,
                write_cache: true,
                limit: LimitConfig { iops: Some(50_000), bandwidth: Some(400 << 20), ..LimitConfig::NONE },
                limit_group: Some("gold".to_owned()),
            }),
        }
    );
}

#[test]
fn every_key_has_a_default_where_one_makes_sense() {
    let text = format!(
        "{NULL}[[function]]\nname = \"f\"\ntype = \"blk\"\nvolume = \"v\"\nlink = {{ type = \"vhost-user\", socket = \"f.sock\" }}\n"
    );
    let config = parsed(&text);
    assert_eq!(config.control.metrics, None);
    assert_eq!(config.volumes[0].io_timeout, IO_TIMEOUT_DEFAULT);
    assert!(!config.volumes[0].read_only);
    let function = &config.functions[0];
    let disk = blk(function);
    assert_eq!((disk.queues, function.queue_size, function.packed, disk.seg_max), (1, 256, true, 126));
    assert!(disk.limit.is_none() && disk.limit_group.is_none());
    let LinkConfig { socket, socket_mode, payload, kind } = &function.link;
    assert_eq!(socket, Path::new("/etc/dray/f.sock"), "relative paths start from the file's folder");
    assert_eq!((*socket_mode, *payload), (0o660, PayloadConfig::InPlace));
    assert_eq!(*kind, LinkKind::VhostUser { mode: SocketMode::Server });
}

#[test]
fn a_vfio_user_link_has_keys_of_its_own() {
    let with = |poll: &str, link: &str| {
        format!(
            "[reactors]\npoll = \"{poll}\"\n{NULL}[[function]]\nname = \"f\"\ntype = \"blk\"\nvolume = \"v\"\n\
             link = {{ type = \"vfio-user\", socket = \"f.sock\"{link} }}\n"
        )
    };
    let kind = |text: &str| parsed(text).functions[0].link.kind;
    assert_eq!(kind(&with("adaptive", "")), LinkKind::VfioUser { notify: NotifyConfig::Message, msix: true });
    let text = with("always", ", notify = \"mapped\", msix = false");
    assert_eq!(kind(&text), LinkKind::VfioUser { notify: NotifyConfig::Mapped, msix: false });
    assert_eq!(
        parsed(&text).functions[0].link.to_string(),
        "vfio-user,socket=/etc/dray/f.sock,socket-mode=0660,payload=in-place,notify=mapped,msix=false"
    );
    let refused = |text: &str| Config::parse(text, "c.toml", Path::new("/etc/dray")).unwrap_err().to_string();
    let why = refused(&with("adaptive", ", notify = \"mapped\""));
    assert!(why.contains("set `poll = \"always\"` in [reactors]"), "{why}");
    let why = refused(&with("adaptive", ", mode = \"server\""));
    assert!(why.contains("`mode`: only a vhost-user link has it"), "{why}");
    let why = refused(&with("adaptive", "").replace("vfio-user\"", "vhost-user\", msix = true"));
    assert!(why.contains("`msix`: only a vfio-user link has it"), "{why}");
}

#[test]
fn an_empty_file_is_a_card_without_functions() {
    let config = parsed("");
    assert!(config.volumes.is_empty() && config.functions.is_empty());
}

#[test]
fn a_volume_without_a_uuid_keeps_its_identity_over_restarts() {
    let one = parsed(NULL).volumes.remove(0);
    assert_eq!(one, parsed(NULL).volumes.remove(0));
    assert_eq!(one.uuid.get_version_num(), 5);
    let other = parsed(&NULL.replace("\"v\"", "\"w\"")).volumes.remove(0);
    assert_ne!(one.uuid, other.uuid);
    assert_ne!(one.serial, other.serial);
}

#[test]
fn seg_max_leaves_room_for_header_and_status() {
    let text = format!(
        "{NULL}[[function]]\nname = \"f\"\ntype = \"blk\"\nvolume = \"v\"\nqueue-size = 4\nlink = {{ type = \"vhost-user\", socket = \"f.sock\" }}\n"
    );
    assert_eq!(blk(&parsed(&text).functions[0]).seg_max, 2);
}

#[test]
fn syntax_and_unknown_keys() {
    refused("[control\n", "dray.toml:1:9: unclosed table, expected `]`");
    refused(
        "[control]\nlisten = \"unix:/x\"\nmetric = \"127.0.0.1:1\"\n",
        "dray.toml:3:1: unknown key `metric`, expected one of `listen`, `shim`, `metrics`, `state`",
    );
    refused(
        "[[volumes]]\n",
        "dray.toml:1:3: unknown key `volumes`, expected one of `reactors`, `control`, `volume`, `uplink`, `function`, \
         `limit-group`",
    );
    refused(
        "[[volume]]\nname = \"v\"\nbackend = { type = \"null\", sise = \"1G\" }\n",
        "dray.toml:3:28: unknown key `sise`, expected one of `type`, `size`, `path`, `create`, `direct`, `uri`, \
         `connections`, `tls-ca`, `tls-certificate`, `tls-key`, `tls-hostname`",
    );
    refused(
        "[[volume]]\nname = \"v\"\nbackend = \"null\"\n",
        "dray.toml:3:11: invalid type: string \"null\", expected a table like { type = \"file\", path = \"/srv/root.img\" }",
    );
}

#[test]
fn reactors_and_control() {
    refused(
        "[reactors]\ncount = 0\n",
        "dray.toml:2:9: reactors: `count`: 0 is not a whole number from 1 to 1024, nor \"auto\"",
    );
    refused(
        "[reactors]\npoll = \"never\"\n",
        "dray.toml:2:8: reactors: `poll`: \"never\" is not known; use \"adaptive\" or \"always\"",
    );
    refused(
        "[control]\nlisten = \"/run/card.sock\"\n",
        "dray.toml:2:10: control: `listen`: \"/run/card.sock\" is not an address; write one like \"unix:/run/dray/card.sock\"",
    );
    refused(
        "[control]\nlisten = \"unix:/a\"\nshim = \"unix:/a\"\n",
        "dray.toml:3:8: control: `shim`: the same socket as `listen`; host-shim needs one of its own",
    );
    refused(
        "[control]\nmetrics = \"9464\"\n",
        "dray.toml:2:11: control: `metrics`: \"9464\" is not an address with a port; write one like \"127.0.0.1:9464\"",
    );
}

#[test]
fn volumes() {
    let volume = |rest: &str| format!("[[volume]]\nname = \"v\"\n{rest}\n");
    refused("[[volume]]\n", "dray.toml:1:1: volume: `name` is missing; add `name = \"…\"`");
    refused(
        "[[volume]]\nname = \"a b\"\n",
        "dray.toml:2:8: volume: `name`: \"a b\" is not a name; use 1 to 63 letters, digits, `.`, `_`, `-`, beginning with a letter or digit",
    );
    refused("[[volume]]\nname = 1\n", "dray.toml:2:8: volume: `name`: 1 is not a text; put it in quotes");
    refused(
        &volume(""),
        "dray.toml:1:1: volume \"v\": `backend` is missing; add `backend = { type = \"file\", path = \"…\" }` or another",
    );
    let null = "backend = { type = \"null\", size = \"1G\" }\n";
    refused(
        &volume(&format!("{null}uuid = \"…\"")),
        "dray.toml:4:8: volume \"v\": `uuid`: \"…\" is not a UUID; `uuidgen` makes one",
    );
    refused(
        &volume(&format!("{null}serial = \"123456789012345678901\"")),
        "dray.toml:4:10: volume \"v\": `serial`: \"123456789012345678901\" is not 1 to 20 printable ASCII characters without spaces",
    );
    refused(
        &volume(&format!("{null}io-timeout = \"30\"")),
        "dray.toml:4:14: volume \"v\": `io-timeout`: \"30\" is not a duration; write a number and a unit, like \"30s\" or \"500ms\"",
    );
    refused(
        &volume(&format!("{null}io-timeout = \"48h\"")),
        "dray.toml:4:14: volume \"v\": `io-timeout`: \"48h\" is not from 1ms to 24h",
    );
    refused(
        &volume(&format!("{null}read-only = \"yes\"")),
        "dray.toml:4:13: volume \"v\": `read-only`: \"yes\" is neither true nor false",
    );
}

#[test]
fn backends() {
    let backend = |table: &str| format!("[[volume]]\nname = \"v\"\nbackend = {table}\n");
    refused(
        &backend("{ type = \"tape\" }"),
        "dray.toml:3:20: volume \"v\": backend: `type`: \"tape\" is not known; use \"null\" or \"ram\" or \"file\" or \"nbd\"",
    );
    refused(
        &backend("{ size = \"1G\" }"),
        "dray.toml:3:11: volume \"v\": backend: `type` is missing; add `type = \"null\"`, \"ram\", \"file\" or \"nbd\"",
    );
    refused(
        &backend("{ type = \"ram\" }"),
        "dray.toml:3:11: volume \"v\": backend: `size` is missing; add `size = \"1G\"`",
    );
    refused(
        &backend("{ type = \"ram\", size = \"1g\" }"),
        "dray.toml:3:34: volume \"v\": backend: `size`: \"1g\" is not a size; write bytes like 512, or 64K, 10G, 1T",
    );
    refused(
        &backend("{ type = \"ram\", size = 513 }"),
        "dray.toml:3:34: volume \"v\": backend: `size`: 513 is not a multiple of 512 up to 2^63",
    );
    refused(
        &backend("{ type = \"ram\", size = 0 }"),
        "dray.toml:3:34: volume \"v\": backend: `size`: 0 is no size here; leave the key out or write 1 or more",
    );
    refused(
        &backend("{ type = \"file\", path = \"/x\", size = \"1G\" }"),
        "dray.toml:3:48: volume \"v\": backend: `size`: not a key of type \"file\" but of null and ram; remove it",
    );
    refused(
        &backend("{ type = \"file\", path = \"\" }"),
        "dray.toml:3:35: volume \"v\": backend: `path`: an empty path; write where the file is",
    );
    refused(
        &backend("{ type = \"nbd\", uri = \"http://x\" }"),
        "dray.toml:3:33: volume \"v\": backend: `uri`: \"http://x\" does not start with nbd://, nbds://, nbd+unix://, nbds+unix://",
    );
    refused(
        &backend("{ type = \"nbd\", uri = \"nbd://x\", connections = 17 }"),
        "dray.toml:3:58: volume \"v\": backend: `connections`: 17 is not a whole number from 1 to 16",
    );
    refused(
        &backend("{ type = \"nbd\", uri = \"nbds://x\", tls-key = \"k\" }"),
        "dray.toml:3:11: volume \"v\": backend: `tls-key` needs its `tls-certificate` beside it",
    );
    refused(
        &backend("{ type = \"nbd\", uri = \"nbd://x\", tls-ca = \"k\" }"),
        "dray.toml:3:33: volume \"v\": backend: `uri`: the `tls-…` keys need a URI that asks for TLS: nbds:// or nbds+unix://",
    );
}

#[test]
fn functions() {
    let function = |rest: &str| format!("{NULL}[[function]]\nname = \"f\"\n{rest}\n");
    let link = "link = { type = \"vhost-user\", socket = \"/s\" }\n";
    refused(
        &function(""),
        "dray.toml:4:1: function \"f\": `type` is missing; add `type = \"blk\"` or `type = \"net\"`",
    );
    refused(
        &function("type = \"nic\""),
        "dray.toml:6:8: function \"f\": `type`: \"nic\" is not known; use \"blk\" or \"net\"",
    );
    refused(
        &function("type = \"blk\""),
        "dray.toml:4:1: function \"f\": `link` is missing; add `link = { type = \"vhost-user\", socket = \"…\" }`",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"w\"")),
        "dray.toml:4:1: function \"f\": `volume`: there is no volume \"w\"; add a [[volume]] of that name",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"v\"\nqueue-size = 100")),
        "dray.toml:9:14: function \"f\": `queue-size`: 100 is not a power of two; use 64 or 128",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"v\"\nqueues = \"4\"")),
        "dray.toml:9:10: function \"f\": `queues`: \"4\" is not a whole number from 1 to 256",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"v\"\nblock-size = 1024")),
        "dray.toml:9:14: function \"f\": `block-size`: 1024 is neither 512 nor 4096",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"v\"\nlimit = {{ iops = 0 }}")),
        "dray.toml:9:18: function \"f\": limit: `iops`: 0 is not a whole number from 1 to 1000000000",
    );
    refused(
        &function(&format!("type = \"blk\"\n{link}volume = \"v\"\nlimit-group = \"gold\"")),
        "dray.toml:4:1: function \"f\": `limit-group`: there is no limit group \"gold\"; add a [[limit-group]] of that name",
    );
    refused(
        &function(
            "type = \"blk\"\nvolume = \"v\"\nlink = { type = \"vhost-user\", socket = \"/s\", socket-mode = \"0999\" }",
        ),
        "dray.toml:8:60: function \"f\": link: `socket-mode`: \"0999\" is not a file mode; write octal digits, like \"0660\"",
    );
    let long = format!(
        "type = \"blk\"\nvolume = \"v\"\nlink = {{ type = \"vhost-user\", socket = \"/{}\" }}",
        "s".repeat(107)
    );
    let error = Config::parse(&function(&long), "dray.toml", Path::new("/")).unwrap_err().to_string();
    assert!(error.contains("is not a socket's path; it takes at most 107 bytes"), "{error}");
}

#[test]
fn tables_beside_each_other() {
    refused(
        &format!("{NULL}{NULL}"),
        "dray.toml:4:1: volume \"v\": `name`: there is already a volume \"v\"; choose another name",
    );
    let uuid = "uuid = \"7f1c1d5e-8b0a-4c7e-9a55-0123456789ab\"\n";
    let w = NULL.replace("\"v\"", "\"w\"");
    refused(
        &format!("{NULL}{uuid}{w}{uuid}"),
        "dray.toml:5:1: volume \"w\": `uuid`: volume \"v\" has the UUID 7f1c1d5e-8b0a-4c7e-9a55-0123456789ab already; give another",
    );
    // Other UUIDs, but alike in the digits that the guest sees.
    refused(
        &format!("{NULL}{uuid}{w}{}", uuid.replace("6789ab", "6789ac")),
        "dray.toml:5:1: volume \"w\": `serial`: volume \"v\" has the serial \"7f1c1d5e8b0a4c7e9a55\" already; \
         give another `uuid` or `serial`",
    );
    let file = |name: &str, rest: &str| {
        format!("[[volume]]\nname = \"{name}\"\nbackend = {{ type = \"file\", path = \"/x\" }}\n{rest}")
    };
    refused(
        &format!("{}{}", file("v", ""), file("w", "")),
        "dray.toml:4:1: volume \"w\": `backend`: /x is used by volume \"v\" already and would be written twice; \
         set `read-only = true` on both or use one volume",
    );
    let read_only = "read-only = true\n";
    assert_eq!(parsed(&format!("{}{}", file("v", read_only), file("w", read_only))).volumes.len(), 2);

    let function = |name: &str, socket: &str| {
        format!(
            "[[function]]\nname = \"{name}\"\ntype = \"blk\"\nvolume = \"v\"\nlink = {{ type = \"vhost-user\", socket = \"{socket}\" }}\n"
        )
    };
    refused(
        &format!("{NULL}{}{}", function("f", "/a"), function("f", "/b")),
        "dray.toml:9:1: function \"f\": `name`: there is already a function \"f\"; choose another name",
    );
    refused(
        &format!("{NULL}{}{}", function("f", "/a"), function("g", "/./a")),
        "dray.toml:9:1: function \"g\": `link`: function \"f\" has the socket /a already; choose another",
    );
    refused(
        &format!("{NULL}{}{}", function("f", "/a"), function("g", "/b")),
        "dray.toml:9:1: function \"g\": `volume`: volume \"v\" is used by function \"f\" already and would be written \
         twice; give each its own volume, or set the volume's `read-only = true`",
    );
    let shared = format!("{NULL}{read_only}{}{}", function("f", "/a"), function("g", "/b"));
    assert_eq!(parsed(&shared).functions.len(), 2);
    refused(
        "[[limit-group]]\nname = \"g\"\niops = 1\n[[limit-group]]\nname = \"g\"\niops = 1\n",
        "dray.toml:4:1: limit-group \"g\": `name`: there is already a limit-group \"g\"; choose another name",
    );
    refused(
        "[[limit-group]]\nname = \"g\"\n",
        "dray.toml:1:1: limit-group \"g\": limits nothing; add `iops = …` or `bandwidth = \"…\"`",
    );
}

#[test]
fn loading_looks_for_files_and_folders() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dray.toml");
    let load = |text: &str| {
        std::fs::write(&path, text).unwrap();
        Config::load(&path)
    };
    let shown = folder.path().display();
    let missing = folder.path().join("missing.toml");
    assert_eq!(
        Config::load(&missing).unwrap_err().to_string(),
        format!("{shown}/missing.toml: no such file; check the path given with --config")
    );
    let volume = "[[volume]]\nname = \"v\"\nbackend = { type = \"file\", path = \"root.img\" }\n";
    assert_eq!(
        load(volume).unwrap_err().to_string(),
        format!(
            "{shown}/dray.toml:1:1: volume \"v\": `backend`: {shown}/root.img does not exist; check the path, or add \
             `create = \"10G\"`"
        )
    );
    std::fs::write(folder.path().join("root.img"), [0; 512]).unwrap();
    load(volume).unwrap();
    let function = "[[function]]\nname = \"f\"\ntype = \"blk\"\nvolume = \"v\"\nlink = { type = \"vhost-user\", socket = \"none/f.sock\" }\n";
    assert_eq!(
        load(&format!("{volume}{function}")).unwrap_err().to_string(),
        format!("{shown}/dray.toml:4:1: function \"f\": `link`: the folder {shown}/none does not exist; make it first")
    );
    let control = "[control]\nlisten = \"unix:none/card.sock\"\n";
    load(&format!("{control}{volume}{function}")).unwrap();
    assert_eq!(
        load(&format!("{control}{volume}{}", function.replace("f.sock", "card.sock"))).unwrap_err().to_string(),
        format!(
            "{shown}/dray.toml:6:1: function \"f\": `link`: {shown}/none/card.sock is a socket of [control]; choose another"
        )
    );
}

#[test]
fn options_say_the_same_as_a_file() {
    let folder = Path::new("/srv");
    let volume = Options::default()
        .with("name", Some("v"))
        .with("io-timeout", Some("5s"))
        .with("read-only", Some(true))
        .with("uuid", None::<String>)
        .with_typed_table("backend", Some("file,path=a,,b.img,create=10G,direct=true"))
        .unwrap()
        .volume(folder)
        .unwrap();
    assert_eq!(
        volume.backend,
        BackendConfig::File { path: PathBuf::from("/srv/a,b.img"), create_bytes: Some(10 << 30), direct: Some(true) }
    );
    assert!(volume.read_only);
    let function = Options::default()
        .with("name", Some("f"))
        .with("type", Some("blk"))
        .with("volume", Some("v"))
        .with("queues", Some(4))
        .with_table("limit", Some("iops=5,burst=2s"))
        .unwrap()
        .with_typed_table("link", Some("vhost-user,socket=f.sock,payload=copy"))
        .unwrap()
        .function(folder)
        .unwrap();
    let disk = blk(&function);
    assert_eq!(disk.queues, 4);
    assert_eq!(disk.limit, LimitConfig { iops: Some(5), burst: Duration::from_secs(2), ..LimitConfig::NONE });
    let error = Options::default().with_typed_table("backend", Some("file,path")).unwrap_err().to_string();
    assert_eq!(error, "--backend: \"path\" has no `=`; write backend as type,key=value,…");
    let error = Options::default().with_table("limit", Some("iops=1,iops=2")).unwrap_err().to_string();
    assert_eq!(error, "--limit: `iops` is given twice; remove one");
    let change = |limit| Options::default().with("name", Some("f")).with_limit(limit).unwrap().blk_change();
    let error = change(Some("iop=1")).unwrap_err().to_string();
    assert!(error.starts_with("unknown key `iop`, expected one of `iops`"), "{error}");
    assert!(change(Some("")).unwrap().is_none());
    let error = change(None).unwrap_err().to_string();
    assert_eq!(
        error,
        "function \"f\": `limit` is missing; add `limit = { iops = … }`, what can be changed of a disk that runs"
    );
}

#[test]
fn differences_name_the_key() {
    let config = parsed(FULL);
    let function = &config.functions[0];
    assert_eq!(function.first_difference(function), None);
    let other = DeviceConfig::Blk(BlkConfig { queues: 5, ..blk(function).clone() });
    assert_eq!(function.first_difference(&FunctionConfig { device: other, ..function.clone() }), Some("queues"));
    let volume = &config.volumes[0];
    assert_eq!(volume.first_difference(&VolumeConfig { read_only: true, ..volume.clone() }), Some("read-only"));
}

proptest! {
    #[test]
    fn sizes_come_back(bytes: u64) {
        prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
    }

    #[test]
    fn round_sizes_come_back(count in 0_u64..1 << 20, shift in 0_u32..44) {
        let bytes = count << shift;
        prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
    }

    #[test]
    fn durations_come_back(us in 0_u64..1 << 50) {
        let duration = Duration::from_micros(us);
        prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
    }

    #[test]
    fn no_text_panics(text in "\\PC*") {
        let _ = parse_size(&text);
        let _ = parse_duration(&text);
        let _ = Config::parse(&text, "x", Path::new("/"));
    }

    #[test]
    fn a_damaged_file_is_refused_or_taken_but_never_panics(at in 0_usize..FULL.len(), with: char) {
        let mut text = FULL.to_owned();
        if text.is_char_boundary(at) {
            text.insert(at, with);
        }
        let _ = Config::parse(&text, "x", Path::new("/"));
    }

    #[test]
    fn backends_come_back_from_their_options(size in 1_u64..1 << 40, direct: Option<bool>) {
        let backends = [
            BackendConfig::Null { size_bytes: size * 512 },
            BackendConfig::Ram { size_bytes: size * 512 },
            BackendConfig::File { path: PathBuf::from("/x,y=z"), create_bytes: Some(size * 512), direct },
        ];
        for backend in backends {
            let volume = Options::default()
                .with("name", Some("v"))
                .with_typed_table("backend", Some(&backend.to_string()))
                .unwrap()
                .volume(Path::new("/"))
                .unwrap();
            prop_assert_eq!(volume.backend, backend);
        }
    }
}
