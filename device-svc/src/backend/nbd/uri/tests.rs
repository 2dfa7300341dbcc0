#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::{NbdAddress, NbdUri};

fn uri(text: &str) -> NbdUri {
    text.parse().unwrap()
}

#[test]
fn tcp_with_and_without_port() {
    let parsed = uri("nbd://storage.example:1234/root");
    assert_eq!(parsed.address, NbdAddress::Tcp { host: "storage.example".into(), port: 1234 });
    assert_eq!((parsed.export.as_str(), parsed.tls), ("root", false));
    assert_eq!(uri("nbds://[::1]").address, NbdAddress::Tcp { host: "::1".into(), port: 10809 });
    assert!(uri("nbds://[::1]").tls);
    assert_eq!(uri("nbd://h//a/b%20c").export, "/a/b c");
}

#[test]
fn unix_needs_its_socket() {
    let parsed = uri("nbds+unix:///disk?socket=/run/a%20b.sock");
    assert_eq!(parsed.address, NbdAddress::Unix("/run/a b.sock".into()));
    assert_eq!((parsed.export.as_str(), parsed.tls), ("disk", true));
    assert_eq!(uri("nbd+unix://?socket=/s").export, "");
}

#[test]
fn wrong_ones_are_refused_with_the_text() {
    for text in [
        "",
        "nbd:/x",
        "http://h/x",
        "nbd:///x",
        "nbd://h:0/x",
        "nbd://h:99999/x",
        "nbd://u@h/x",
        "nbd://[::1/x",
        "nbd://[::1]x/y",
        "nbd://h/%zz",
        "nbd://h/%00",
        "nbd://h/x?socket=/s",
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=/s",
        "nbd+unix:///x?socket=/s&socket=/t",
        "nbd+unix:///x?sock=/s",
        "nbd://h/x#y",
    ] {
        let error = text.parse::<NbdUri>().unwrap_err();
        assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
    }
    assert!(format!("nbd://h/{}", "x".repeat(4097)).parse::<NbdUri>().is_err());
}

proptest! {
    #[test]
    fn any_text_is_answered(text in "(nbds?(\\+unix)?://)?[\\[\\]:/?=&%@#a-z0-9é]{0,40}") {
        let _ = text.parse::<NbdUri>();
    }
}
