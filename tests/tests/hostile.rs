#![allow(missing_docs, reason = "tests")]
//! Front ends that mean harm: thousands of half-right conversations over vhost-user, while a neighbour on the same reactor goes on
//! undisturbed.

use device_svc::driver::client::Through;
use device_svc::driver::hostile::{converse, truncate_memory};
use tests::{Besieged, Siege};

/// The functions that are attacked.
const ATTACKED: [Besieged; 5] = [
    ("null", r#"{ type = "null", size = "64M" }"#, "", ""),
    ("ram", r#"{ type = "ram", size = "8M" }"#, "", ""),
    ("file", r#"{ type = "file", path = "@/disk", create = "8M" }"#, "", ""),
    ("ram-copy", r#"{ type = "ram", size = "8M" }"#, r#", payload = "copy""#, "queue-size = 1024"),
    ("file-copy", r#"{ type = "file", path = "@/disk-copy", create = "8M" }"#, r#", payload = "copy""#, ""),
];

const SIEGE: Siege = Siege {
    link: "vhost-user",
    through: Through::VhostUser,
    attacked: &ATTACKED,
    converse,
    truncate_memory,
    attached: "a front end is attached",
};

#[test]
fn thousands_of_hostile_conversations_disturb_nobody() {
    SIEGE.lay();
}

#[test]
fn a_memory_file_cut_short_ends_that_function_only() {
    SIEGE.cut_memory();
}
