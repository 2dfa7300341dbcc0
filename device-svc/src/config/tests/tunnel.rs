//! Tunnels: what is taken, what is refused, and with which words.

use std::net::IpAddr;

use super::*;

fn uplink(name: &str, backend: &str) -> String {
    format!("[[uplink]]\nname = \"{name}\"\nbackend = {{ {backend} }}\n")
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn read(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, "dray.toml", Path::new("/etc/dray"))
}

fn least() -> TunnelConfig {
    TunnelConfig {
        vni: 0,
        local: ip("10.9.0.1"),
        remotes: Vec::new(),
        mtu: None,
        port: 4789,
        netns: None,
        learn: LearnConfig::Listed,
    }
}

fn full() -> TunnelConfig {
    TunnelConfig {
        vni: 0xff_ffff,
        local: ip("2001:db8::1"),
        remotes: vec![ip("2001:db8::3"), ip("2001:db8::2")],
        mtu: Some(1430),
        port: 7000,
        netns: Some("x,y".to_owned()),
        learn: LearnConfig::Any,
    }
}

#[test]
fn a_tunnel_of_either_type_is_taken() {
    let backend = |text: &str| parsed(&uplink("u", text)).uplinks.remove(0).backend;
    let vxlan = backend("type = \"vxlan\", vni = 0, local = \"10.9.0.1\"");
    assert_eq!(vxlan, UplinkBackendConfig::Vxlan(least()));
    let geneve = backend("type = \"geneve\", vni = 0, local = \"::ffff:10.9.0.1\", remote = []");
    assert_eq!(geneve, UplinkBackendConfig::Geneve(TunnelConfig { port: 6081, ..least() }));
    let all = "type = \"geneve\", vni = 16777215, local = \"2001:db8::1\", remote = [\"2001:db8::3\", \"2001:DB8:0::2\"], \
               mtu = 1430, port = 7000, netns = \"x,y\", learn = \"any\"";
    assert_eq!(backend(all), UplinkBackendConfig::Geneve(full()));
}

#[test]
fn options_say_the_same_as_a_file() {
    for tunnel in [least(), full(), TunnelConfig { remotes: vec![ip("10.9.0.2")], learn: LearnConfig::None, ..least() }]
    {
        for backend in [UplinkBackendConfig::Vxlan(tunnel.clone()), UplinkBackendConfig::Geneve(tunnel)] {
            let options = Options::default().with("name", Some("u"));
            let uplink = options.with_typed_table("backend", Some(&backend.to_string())).unwrap().uplink().unwrap();
            assert_eq!(uplink.backend, backend);
        }
    }
}

#[test]
fn what_is_wrong_is_named() {
    let least = "type = \"vxlan\", vni = 1, local = \"10.9.0.1\"";
    for (backend, message) in [
        ("type = \"vxlan\"", "`vni` is missing; add `vni = 42`, the number of the network"),
        ("type = \"vxlan\", vni = 16777216", "`vni`: 16777216 is not a whole number from 0 to 16777215"),
        ("type = \"geneve\", vni = 1", "`local` is missing; add `local = \"10.9.0.1\"`, an address of the card"),
        (
            "type = \"vxlan\", vni = 1, local = \"card1\"",
            "`local`: \"card1\" is not an IP address; write one like \"10.9.0.1\" or \"2001:db8::1\"",
        ),
        ("type = \"vxlan\", vni = 1, local = \"0.0.0.0\"", "`local`: 0.0.0.0 is not the address of one machine"),
        ("type = \"vxlan\", vni = 1, local = \"ff02::1\"", "`local`: ff02::1 is not the address of one machine"),
        (
            "type = \"vxlan\", vni = 1, local = \"fe80::1\"",
            "`local`: fe80::1 is good on one link only; use a unique local or global address",
        ),
        (&format!("{least}, remote = \"10.9.0.2\""), "`remote`: \"10.9.0.2\" is not a list; write it in brackets"),
        (
            &format!("{least}, remote = [1]"),
            "`remote`: \"1\" is not an IP address; write one like \"10.9.0.1\" or \"2001:db8::1\"",
        ),
        (
            &format!("{least}, remote = [\"x\"]"),
            "`remote`: \"x\" is not an IP address; write one like \"10.9.0.1\" or \"2001:db8::1\"",
        ),
        (&format!("{least}, remote = [\"224.0.0.1\"]"), "`remote`: 224.0.0.1 is not the address of one machine"),
        (
            &format!("{least}, remote = [\"255.255.255.255\"]"),
            "`remote`: 255.255.255.255 is not the address of one machine",
        ),
        (
            &format!("{least}, remote = [\"2001:db8::1\"]"),
            "`remote`: 2001:db8::1 and `local`, 10.9.0.1, are of two versions of IP; use one",
        ),
        (
            &format!("{least}, remote = [\"10.9.0.1\"]"),
            "`remote`: 10.9.0.1 is `local`; give the other end points' addresses alone",
        ),
        (
            &format!("{least}, remote = [\"10.9.0.2\", \"::ffff:10.9.0.2\"]"),
            "`remote`: 10.9.0.2 is given twice; remove one",
        ),
        (&format!("{least}, mtu = 67"), "`mtu`: 67 is not a whole number from 68 to 65465"),
        (&format!("{least}, port = 0"), "`port`: 0 is not a whole number from 1 to 65535"),
        (&format!("{least}, learn = \"all\""), "`learn`: \"all\" is not known; use \"listed\" or \"any\" or \"none\""),
        (
            &format!("{least}, learn = \"none\""),
            "`learn`: without `remote` nothing could be sent; add `remote`, or leave this key out",
        ),
        (&format!("{least}, name = \"dray0\""), "`name`: a key of type tap alone; remove it"),
        ("type = \"tap\", name = \"dray0\", vni = 1", "`vni`: a key of type vxlan and geneve alone; remove it"),
    ] {
        let error = read(&uplink("u", backend)).unwrap_err().to_string();
        assert!(error.ends_with(&format!("uplink \"u\": backend: {message}")), "{backend}: {error}");
    }
    let many: Vec<String> = (0..257).map(|number| format!("\"10.{}.{}.1\"", 10 + number / 256, number % 256)).collect();
    let error = read(&uplink("u", &format!("{least}, remote = [{}]", many.join(",")))).unwrap_err().to_string();
    assert!(error.ends_with("`remote`: 257 addresses are more than 256"), "{error}");
}

#[test]
fn networks_share_an_end_point_if_they_can_be_told_apart() {
    let two = |first: &str, second: &str| read(&(uplink("a", first) + &uplink("b", second)));
    let tunnel = |kind: &str, vni: u32, rest: &str| {
        format!("type = \"{kind}\", vni = {vni}, local = \"10.9.0.1\", netns = \"none\"{rest}")
    };
    let refused = |first: &str, second: &str| two(first, second).unwrap_err().to_string();
    assert!(two(&tunnel("vxlan", 1, ""), &tunnel("vxlan", 2, "")).is_ok());
    assert!(two(&tunnel("vxlan", 1, ""), &tunnel("geneve", 1, "")).is_ok());
    assert!(two(&tunnel("vxlan", 1, ""), &tunnel("vxlan", 1, ", port = 9")).is_ok());
    let error = refused(&tunnel("vxlan", 1, ""), &tunnel("vxlan", 1, ", mtu = 99"));
    let what = "VNI 1 of port 4789 of 10.9.0.1 of network namespace \"none\"";
    assert!(error.ends_with(&format!("uplink \"a\" has {what} already; choose another")), "{error}");
    let error = refused(&tunnel("geneve", 1, ""), &tunnel("vxlan", 2, ", port = 6081"));
    let what = "port 6081 of 10.9.0.1 of network namespace \"none\"";
    assert!(
        error.contains(&format!("uplink \"a\" of type geneve has {what} already, and datagrams do not say")),
        "{error}"
    );
}
