//! Uplinks and network interfaces: what is taken, what is refused, and with which words.

use super::*;

const UPLINK: &str = "[[uplink]]\nname = \"u\"\nbackend = { type = \"null\" }\n";
const LINK: &str = "link = { type = \"vhost-user\", socket = \"/s\" }\n";

const FULL_NET: &str = r#"
[[uplink]]
name = "wan"
backend = { type = "tap", name = "dray0", netns = "blue", mtu = 9000 }

[[uplink]]
name = "measure"
backend = { type = "loopback" }

[[uplink]]
name = "lan"
backend = { type = "switch", uplink = "wan" }

[[function]]
name = "vm1-net0"
type = "net"
link = { type = "vfio-user", socket = "/run/dray/vm1-net0.sock", payload = "copy" }
uplink = "lan"
rss = true
vlan = 10
anti-spoofing = { mac = false, vlan = [20, 30], ip = ["10.0.0.5", "fd00::5"] }
mac = "52:54:00:12:34:56"
mtu = 1450
queue-pairs = 2
queue-size = 1024
packed = false
limit = { packets = 100000, bandwidth = "125M", transmit-packets = 1, receive-packets = 2, transmit-bandwidth = "1M", receive-bandwidth = "2M", burst = "2s" }
"#;

fn net(function: &FunctionConfig) -> &NetConfig {
    match &function.device {
        DeviceConfig::Net(net) => net,
        DeviceConfig::Blk(_) => panic!("{function:?} is no network interface"),
    }
}

fn function(rest: &str) -> String {
    format!("{UPLINK}[[function]]\nname = \"f\"\ntype = \"net\"\n{LINK}{rest}\n")
}

#[test]
fn the_full_example_is_taken() {
    let config = parsed(FULL_NET);
    let tap = TapConfig { name: "dray0".to_owned(), netns: Some("blue".to_owned()), mtu: Some(9000) };
    assert_eq!(
        config.uplinks,
        [
            UplinkConfig { name: "wan".to_owned(), backend: UplinkBackendConfig::Tap(tap) },
            UplinkConfig { name: "measure".to_owned(), backend: UplinkBackendConfig::Loopback },
            UplinkConfig {
                name: "lan".to_owned(),
                backend: UplinkBackendConfig::Switch { uplink: Some("wan".to_owned()) },
            },
        ]
    );
    let function = &config.functions[0];
    assert_eq!((function.queue_size, function.packed), (1024, false));
    assert_eq!((function.device.type_name(), function.queues()), ("net", 5));
    assert_eq!(function.link.payload, PayloadConfig::Copy);
    assert_eq!(
        *net(function),
        NetConfig {
            uplink: "lan".to_owned(),
            mac: MacAddress::new([0x52, 0x54, 0, 0x12, 0x34, 0x56]).unwrap(),
            mtu: 1450,
            queue_pairs: 2,
            rss: true,
            vlan: Some(10),
            anti_spoofing: Some(AntiSpoofingConfig {
                mac: false,
                vlans: Some(vec![20, 30]),
                addresses: Some(vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]),
            }),
            limit: NetLimitConfig {
                packets: Some(100_000),
                bandwidth: Some(125 << 20),
                transmit_packets: Some(1),
                receive_packets: Some(2),
                transmit_bandwidth: Some(1 << 20),
                receive_bandwidth: Some(2 << 20),
                burst: Duration::from_secs(2),
            },
        }
    );
}

#[test]
fn every_key_has_a_default_where_one_makes_sense() {
    let config = parsed(&function("uplink = \"u\""));
    let function = &config.functions[0];
    let NetConfig { mtu, queue_pairs, limit, .. } = net(function);
    assert_eq!((function.queue_size, function.packed, *mtu, *queue_pairs), (256, true, MTU_DEFAULT, 1));
    assert_eq!(*limit, NetLimitConfig::NONE);
}

#[test]
fn a_function_without_an_address_keeps_its_own_over_restarts() {
    let text = function("uplink = \"u\"");
    let mac = |text: &str| net(&parsed(text).functions[0]).mac;
    assert_eq!(mac(&text), mac(&text));
    assert_ne!(mac(&text), mac(&text.replace("\"f\"", "\"g\"")));
    // Of one interface, and given by no manufacturer.
    assert_eq!(mac(&text).octets()[0] & 3, 2);
    // What is shown can be given.
    let given = function(&format!("uplink = \"u\"\nmac = \"{}\"", mac(&text)));
    assert_eq!(mac(&given), mac(&text));
}

#[test]
fn uplinks() {
    let uplink = |rest: &str| format!("[[uplink]]\nname = \"u\"\n{rest}\n");
    refused("[[uplink]]\n", "dray.toml:1:1: uplink: `name` is missing; add `name = \"…\"`");
    refused(
        "[[uplink]]\nname = \"a/b\"\n",
        "dray.toml:2:8: uplink: `name`: \"a/b\" is not a name; use 1 to 63 letters, digits, `.`, `_`, `-`, beginning with a letter or digit",
    );
    refused(
        &uplink(""),
        "dray.toml:1:1: uplink \"u\": `backend` is missing; add `backend = { type = \"tap\", name = \"…\" }` or another",
    );
    refused(
        &uplink("backend = { name = \"dray0\" }"),
        "dray.toml:3:11: uplink \"u\": backend: `type` is missing; add `type = \"tap\"` or another",
    );
    refused(
        &uplink("backend = { type = \"token-ring\" }"),
        "dray.toml:3:20: uplink \"u\": backend: `type`: \"token-ring\" is not known; use \"null\" or \"loopback\" or \"tap\" or \"af-packet\" or \"af-xdp\" or \"vxlan\" or \"geneve\" or \"switch\"",
    );
    refused(
        &uplink("backend = { type = \"tap\", path = \"/x\" }"),
        "dray.toml:3:27: unknown key `path`, expected one of `type`, `interface`, `name`, `netns`, `mtu`, `vni`, `local`, `remote`, `port`, `learn`, `queues`, `uplink`",
    );
    refused(
        &uplink("backend = \"tap\""),
        "dray.toml:3:11: invalid type: string \"tap\", expected a table like { type = \"tap\", name = \"dray0\" }",
    );
    refused(
        &uplink("backend = { type = \"loopback\", mtu = 1500 }"),
        "dray.toml:3:38: uplink \"u\": backend: `mtu`: a key of type tap and vxlan and geneve alone; remove it",
    );
    refused(
        &uplink("backend = { type = \"tap\" }"),
        "dray.toml:3:11: uplink \"u\": backend: `name` is missing; add `name = \"dray0\"`, the interface",
    );
    refused(
        &uplink("backend = { type = \"af-packet\" }"),
        "dray.toml:3:11: uplink \"u\": backend: `interface` is missing; add `interface = \"eth1\"`",
    );
    refused(
        &uplink("backend = { type = \"af-packet\", interface = \"eth1\", queues = 2 }"),
        "dray.toml:3:62: uplink \"u\": backend: `queues`: a key of type af-xdp alone; remove it",
    );
    refused(
        &uplink("backend = { type = \"af-xdp\", interface = \"eth1\", queues = 65 }"),
        "dray.toml:3:59: uplink \"u\": backend: `queues`: 65 is not a whole number from 1 to 64",
    );
    for name in ["", ".", "..", "a/b", "a b", "a:b", "dray%d", "sixteen-bytes-16"] {
        refused(
            &uplink(&format!("backend = {{ type = \"tap\", name = \"{name}\" }}")),
            &format!(
                "dray.toml:3:34: uplink \"u\": backend: `name`: \"{name}\" is not an interface's name; use 1 to 15 bytes \
                 without `/`, `:`, `%` and spaces, like \"dray0\""
            ),
        );
    }
    for netns in ["", ".", "..", "../x", "a\\u0000"] {
        refused(
            &uplink(&format!("backend = {{ type = \"tap\", name = \"fifteen-bytes-1\", netns = \"{netns}\" }}")),
            &format!(
                "dray.toml:3:61: uplink \"u\": backend: `netns`: \"{}\" is not a network namespace's name; give one of those \
                 that `ip netns list` shows, like \"blue\"",
                netns.replace("u0000", "0")
            ),
        );
    }
    refused(
        &uplink("backend = { type = \"tap\", name = \"dray0\", mtu = 65522 }"),
        "dray.toml:3:49: uplink \"u\": backend: `mtu`: 65522 is not a whole number from 68 to 65521",
    );
}

#[test]
fn functions() {
    refused(
        &function(""),
        "dray.toml:4:1: function \"f\": `uplink` is missing; add `uplink = \"…\"`, the name of an uplink",
    );
    refused(
        &function("uplink = \"w\""),
        "dray.toml:4:1: function \"f\": `uplink`: there is no uplink \"w\"; add an [[uplink]] of that name",
    );
    let with = |rest: &str| function(&format!("uplink = \"u\"\n{rest}"));
    for mac in
        ["52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "52:54:0:12:34:56", "52:54:00:12:34:+6", ""]
    {
        refused(
            &with(&format!("mac = \"{mac}\"")),
            &format!(
                "dray.toml:9:7: function \"f\": `mac`: \"{mac}\" is not a MAC address; write six octets, like \"52:54:00:12:34:56\""
            ),
        );
    }
    refused(
        &with("mac = \"53:54:00:12:34:56\""),
        "dray.toml:9:7: function \"f\": `mac`: \"53:54:00:12:34:56\" is the address of a group; give one of a single interface, like \"52:54:00:12:34:56\"",
    );
    refused(
        &with("mac = \"00:00:00:00:00:00\""),
        "dray.toml:9:7: function \"f\": `mac`: \"00:00:00:00:00:00\" is no interface's address; give one of a single interface, like \"52:54:00:12:34:56\"",
    );
    refused(&with("mtu = 67"), "dray.toml:9:7: function \"f\": `mtu`: 67 is not a whole number from 68 to 65535");
    refused(
        &with("queue-pairs = 129"),
        "dray.toml:9:15: function \"f\": `queue-pairs`: 129 is not a whole number from 1 to 128",
    );
    assert_eq!(parsed(&with("queue-pairs = 128")).functions[0].queues(), 256, "without the control queue");
    refused(
        &with("queue-size = 100"),
        "dray.toml:9:14: function \"f\": `queue-size`: 100 is not a power of two; use 64 or 128",
    );
    refused(
        &with("limit = { packets = 0 }"),
        "dray.toml:9:21: function \"f\": limit: `packets`: 0 is not a whole number from 1 to 1000000000",
    );
}

#[test]
fn what_a_vm_may_say_it_is() {
    let of = |text: &str| function(&format!("uplink = \"u\"\nanti-spoofing = {text}"));
    let NetConfig { anti_spoofing, rss, vlan, .. } = net(&parsed(&of("{}")).functions[0]).clone();
    assert_eq!(anti_spoofing, Some(AntiSpoofingConfig { mac: true, vlans: None, addresses: None }));
    assert_eq!((rss, vlan), (false, None));
    let none = net(&parsed(&of("{ vlan = [], ip = [] }")).functions[0]).anti_spoofing.clone();
    assert_eq!(none, Some(AntiSpoofingConfig { mac: true, vlans: Some(vec![]), addresses: Some(vec![]) }));
    let place = "function \"f\": anti-spoofing:";
    for (text, message) in [
        ("{ vlan = [4095] }", "`vlan`: \"4095\" is no VLAN; write numbers from 1 to 4094"),
        ("{ vlan = 7 }", "`vlan`: 7 is not a list; write it in brackets"),
        ("{ vlan = [true] }", "`vlan`: \"true\" is no VLAN; write numbers from 1 to 4094"),
        ("{ ip = [\"10.0.0\"] }", "`ip`: \"10.0.0\" is no IP address; write some like \"10.0.0.5\" or \"fd00::5\""),
        ("{ mac = 1 }", "`mac`: 1 is neither true nor false"),
    ] {
        let error = Config::parse(&of(text), "dray.toml", Path::new("/")).unwrap_err().to_string();
        assert!(error.ends_with(&format!("{place} {message}")), "{text}: {error}");
    }
    let many = vec!["\"10.0.0.5\""; 65].join(", ");
    let error = Config::parse(&of(&format!("{{ ip = [{many}] }}")), "dray.toml", Path::new("/")).unwrap_err();
    assert!(error.to_string().contains("more than 64 addresses"), "{error}");
}

#[test]
fn switches_and_their_ports() {
    let switch =
        |name: &str, on: &str| format!("[[uplink]]\nname = \"{name}\"\nbackend = {{ type = \"switch\"{on} }}\n");
    let refused = |text: &str| Config::parse(text, "dray.toml", Path::new("/")).unwrap_err().to_string();
    // In any order.
    let text = format!("{}{UPLINK}", switch("s", ", uplink = \"u\""));
    assert_eq!(parsed(&text).uplinks.len(), 2);
    let error = refused(&switch("s", ", uplink = \"u\""));
    assert!(
        error.ends_with("uplink \"s\": `backend`: there is no uplink \"u\"; add an [[uplink]] of that name"),
        "{error}"
    );
    let error = refused(&format!("{}{}", switch("t", ""), switch("s", ", uplink = \"t\"")));
    assert!(error.ends_with("`backend`: uplink \"t\" is a switch as well; name one of another type"), "{error}");
    let error = refused(&switch("s", ", uplink = \"s\""));
    assert!(error.ends_with("is a switch as well; name one of another type"), "{error}");
    let error = refused(&function("uplink = \"u\"\nvlan = 10"));
    assert!(
        error.ends_with("`vlan`: uplink \"u\" is no switch, and has no ports with a VLAN; leave the key out"),
        "{error}"
    );
    let error = refused(&function("uplink = \"u\"\nrss = true"));
    assert!(
        error.contains("`rss`: over vhost-user the VMM keeps the driver's commands to itself; remove it"),
        "{error}"
    );
    let error = refused(&function("uplink = \"u\"\nvlan = 0"));
    assert!(error.ends_with("`vlan`: 0 is not a whole number from 1 to 4094"), "{error}");
}

#[test]
fn keys_of_the_other_type_are_refused_and_say_what_to_write() {
    let with = |rest: &str| function(&format!("uplink = \"u\"\n{rest}"));
    for (line, column, key, next) in [
        ("volume = \"v\"", 10, "volume", "give an `uplink`"),
        ("queues = 2", 10, "queues", "write `queue-pairs`"),
        ("seg-max = 2", 11, "seg-max", "remove it"),
        ("block-size = 512", 14, "block-size", "remove it"),
        ("write-cache = true", 15, "write-cache", "remove it"),
        ("limit-group = \"gold\"", 15, "limit-group", "give it a `limit` of its own"),
    ] {
        let expected =
            format!("dray.toml:9:{column}: function \"f\": `{key}`: only a function of type \"blk\" has it; {next}");
        refused(&with(line), &expected);
    }
    for (key, next) in [
        ("iops", "packets"),
        ("read-iops", "receive-packets"),
        ("write-iops", "transmit-packets"),
        ("read-bandwidth", "receive-bandwidth"),
        ("write-bandwidth", "transmit-bandwidth"),
    ] {
        let limit = |kind: &str, key: &str| match kind {
            "net" => with(&format!("limit = {{ {key} = 5 }}")),
            _ => format!(
                "{NULL}[[function]]\nname = \"f\"\ntype = \"blk\"\n{LINK}volume = \"v\"\nlimit = {{ {key} = 5 }}"
            ),
        };
        let expected = |key: &str, other: &str, next: &str| {
            let column = "limit = { ".len() + key.len() + " = ".len() + 1;
            format!(
                "dray.toml:9:{column}: function \"f\": limit: `{key}`: only the limit of a function of type \"{other}\" \
                 has it; write `{next}`"
            )
        };
        refused(&limit("net", key), &expected(key, "blk", next));
        refused(&limit("blk", next), &expected(next, "net", key));
    }
    for (line, column, key, next) in [
        ("uplink = \"u\"", 10, "uplink", "remove it"),
        ("mac = \"52:54:00:12:34:56\"", 7, "mac", "remove it"),
        ("mtu = 1500", 7, "mtu", "remove it"),
        ("queue-pairs = 2", 15, "queue-pairs", "write `queues`"),
    ] {
        let text = format!("{NULL}[[function]]\nname = \"f\"\ntype = \"blk\"\n{LINK}volume = \"v\"\n{line}\n");
        let expected =
            format!("dray.toml:9:{column}: function \"f\": `{key}`: only a function of type \"net\" has it; {next}");
        refused(&text, &expected);
    }
}

#[test]
fn tables_beside_each_other() {
    refused(
        &format!("{UPLINK}{UPLINK}"),
        "dray.toml:4:1: uplink \"u\": `name`: there is already an uplink \"u\"; choose another name",
    );
    let tap = |name: &str, more: &str| {
        format!("[[uplink]]\nname = \"{name}\"\nbackend = {{ type = \"tap\", name = \"dray0\"{more} }}\n")
    };
    refused(
        &format!("{}{}", tap("a", ""), tap("b", ", mtu = 1400")),
        "dray.toml:4:1: uplink \"b\": `backend`: uplink \"a\" has interface \"dray0\" already; choose another",
    );
    let blue = ", netns = \"blue\"";
    refused(
        &format!("{}{}", tap("a", blue), tap("b", blue)),
        "dray.toml:4:1: uplink \"b\": `backend`: uplink \"a\" has interface \"dray0\" of network namespace \"blue\" already; choose another",
    );
    assert_eq!(parsed(&format!("{}{}", tap("a", ""), tap("b", blue))).uplinks.len(), 2);
    // Whatever their types are.
    let by = |kind: &str, name: &str| {
        format!("[[uplink]]\nname = \"{name}\"\nbackend = {{ type = \"{kind}\", interface = \"dray0\"{blue} }}\n")
    };
    for two in [tap("a", blue) + &by("af-packet", "b"), by("af-xdp", "a") + &by("af-packet", "b")] {
        refused(
            &two,
            "dray.toml:4:1: uplink \"b\": `backend`: uplink \"a\" has interface \"dray0\" of network namespace \"blue\" already; choose another",
        );
    }

    let function = |name: &str, mac: &str| {
        format!(
            "[[function]]\nname = \"{name}\"\ntype = \"net\"\nuplink = \"u\"\nmac = \"{mac}\"\n\
             link = {{ type = \"vhost-user\", socket = \"/{name}\" }}\n"
        )
    };
    refused(
        &format!("{UPLINK}{}{}", function("f", "52:54:00:ab:cd:ef"), function("g", "52:54:00:AB:CD:EF")),
        "dray.toml:10:1: function \"g\": `mac`: function \"f\" has the address 52:54:00:ab:cd:ef already; give another",
    );
    let several = format!("{UPLINK}{}{}", function("f", "52:54:00:ab:cd:ef"), function("g", "52:54:00:ab:cd:ee"));
    assert_eq!(parsed(&several).functions.len(), 2);
}

#[test]
fn loading_looks_for_the_network_namespace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dray.toml");
    let name = format!("dray-none-{}", Uuid::new_v4().simple());
    let text =
        format!("[[uplink]]\nname = \"u\"\nbackend = {{ type = \"tap\", name = \"dray0\", netns = \"{name}\" }}\n");
    std::fs::write(&path, text).unwrap();
    assert_eq!(
        Config::load(&path).unwrap_err().to_string(),
        format!(
            "{}:1:1: uplink \"u\": `backend`: there is no network namespace \"{name}\"; `ip netns add {name}` makes it",
            path.display()
        )
    );
}

#[test]
fn options_say_the_same_as_a_file() {
    for backend in [
        UplinkBackendConfig::Null,
        UplinkBackendConfig::Loopback,
        UplinkBackendConfig::Switch { uplink: None },
        UplinkBackendConfig::Switch { uplink: Some("wan".to_owned()) },
        UplinkBackendConfig::Tap(TapConfig { name: "a,b=c".to_owned(), netns: None, mtu: None }),
        UplinkBackendConfig::Tap(TapConfig { name: "d".to_owned(), netns: Some("x,y".to_owned()), mtu: Some(68) }),
        UplinkBackendConfig::AfPacket(AfPacketConfig { interface: "a,b".to_owned(), netns: Some("x,y".to_owned()) }),
        UplinkBackendConfig::AfXdp(AfXdpConfig {
            interface: "e,f".to_owned(),
            netns: Some("x,y".to_owned()),
            queues: 3,
        }),
        UplinkBackendConfig::AfXdp(AfXdpConfig { interface: "e".to_owned(), netns: None, queues: 1 }),
    ] {
        let options = Options::default().with("name", Some("u"));
        let uplink = options.with_typed_table("backend", Some(&backend.to_string())).unwrap().uplink().unwrap();
        assert_eq!(uplink.backend, backend);
    }
    let function = Options::default()
        .with("name", Some("f"))
        .with("type", Some("net"))
        .with("uplink", Some("u"))
        .with("mtu", Some("9000"))
        .with("queue-pairs", Some("3"))
        .with_table("anti-spoofing", Some("vlan=20,,30,ip=10.0.0.5,,fd00::5"))
        .unwrap()
        .with_limit(Some("transmit-packets=7"))
        .unwrap()
        .with_typed_table("link", Some("vhost-user,socket=f.sock"))
        .unwrap()
        .function(Path::new("/srv"))
        .unwrap();
    let NetConfig { mtu, queue_pairs, limit, anti_spoofing, .. } = net(&function);
    assert_eq!((*mtu, *queue_pairs, limit.transmit_packets), (9000, 3, Some(7)));
    let full = net(&parsed(FULL_NET).functions[0]).anti_spoofing.clone().unwrap();
    assert_eq!(*anti_spoofing, Some(AntiSpoofingConfig { mac: true, ..full }));
}

#[test]
fn a_change_is_of_what_it_names() {
    let before = NetConfig { mtu: 1400, queue_pairs: 2, ..net(&parsed(FULL_NET).functions[0]).clone() };
    let read = |options: Options| options.with("name", Some("f")).net_change();
    assert_eq!(read(Options::default()).unwrap().of(&before), before);
    let mac = MacAddress::new([2, 0, 0, 0, 0, 1]).unwrap();
    let change = read(Options::default().with("mac", Some(mac))).unwrap();
    assert_eq!(change, NetChange { mac: Some(mac), ..NetChange::default() });
    assert_eq!(change.of(&before), NetConfig { mac, ..before.clone() });
    let change = read(Options::default().with("mtu", Some(68)).with_limit(Some("")).unwrap()).unwrap();
    assert_eq!(change.of(&before), NetConfig { mtu: 68, limit: NetLimitConfig::NONE, ..before.clone() });
    let error = read(Options::default().with("mtu", Some(1))).unwrap_err().to_string();
    assert_eq!(error, "function \"f\": `mtu`: \"1\" is not a whole number from 68 to 65535");
    let error = read(Options::default().with_limit(Some("iops=1")).unwrap()).unwrap_err().to_string();
    assert!(error.contains("only the limit of a function of type \"blk\" has it; write `packets`"), "{error}");
    let disk = Options::default().with("name", Some("f")).with("mtu", Some(1500)).blk_change();
    assert_eq!(
        disk.unwrap_err().to_string(),
        "function \"f\": `mtu`: only a function of type \"net\" has it; remove it"
    );
}

#[test]
fn differences_name_the_key() {
    let config = parsed(FULL_NET);
    let (function, network) = (&config.functions[0], net(&config.functions[0]));
    let differs = |device: DeviceConfig| function.first_difference(&FunctionConfig { device, ..function.clone() });
    assert_eq!(differs(DeviceConfig::Net(network.clone())), None);
    let mtu = NetConfig { mtu: 1400, ..network.clone() };
    assert_eq!(differs(DeviceConfig::Net(mtu)), Some("mtu"));
    let pairs = NetConfig { queue_pairs: 1, ..network.clone() };
    assert_eq!(differs(DeviceConfig::Net(pairs)), Some("queue-pairs"));
    assert_eq!(differs(parsed(FULL).functions[0].device.clone()), Some("type"));
    assert_eq!(config.uplinks[0].first_difference(&config.uplinks[1]), Some("name"));
}

proptest! {
    #[test]
    fn addresses_come_back(octets: [u8; 6]) {
        if let Some(mac) = MacAddress::new(octets) {
            let text = function(&format!("uplink = \"u\"\nmac = \"{mac}\""));
            prop_assert_eq!(net(&parsed(&text).functions[0]).mac, mac);
        }
    }

    #[test]
    fn a_damaged_file_is_refused_or_taken_but_never_panics(at in 0_usize..FULL_NET.len(), with: char) {
        let mut text = FULL_NET.to_owned();
        if text.is_char_boundary(at) {
            text.insert(at, with);
        }
        let _ = Config::parse(&text, "x", Path::new("/"));
    }
}
