//! End-to-end tests: the built programs under real clients, real servers and real guests, seen from outside.
//!
//! The tests find the built programs in `$DRAY_BIN` and the real parts in `$DRAY_RIG`; `tests/run` sets both. Without a rig they
//! say that they are skipped, and only `tests/run --no-rig` does without.

mod archive;
mod capture;
mod card;
mod guest;
mod iperf;
mod late_disk;
mod namespace;
mod process;
mod siege;
mod testpmd;
mod threads;
mod verifier;

pub use archive::Archive;
pub use capture::{Capture, Captured};
pub use card::{Card, CardSettings};
pub use guest::{GuestSettings, boot_guest, qmp, qmp_of, qmp_until};
pub use iperf::{IperfReport, IperfServer};
pub use late_disk::LateDisk;
pub use namespace::Namespace;
pub use process::{Log, Process, wait_for, wait_for_or};
pub use siege::{Besieged, Siege};
pub use testpmd::{Driver, Port, PortCounts, Testpmd, TestpmdSettings};
pub use threads::{signal_thread, threads_of};
pub use verifier::Verifier;

use std::path::PathBuf;

/// The folder of the rig, or `None` where the tests were told to do without one.
///
/// # Panics
/// When there is neither a rig nor word that there shall be none: a test must not pass because it did nothing.
#[must_use]
pub fn rig() -> Option<PathBuf> {
    if std::env::var_os("DRAY_NO_RIG").is_some() {
        eprintln!("skipped: no rig");
        return None;
    }
    let rig = std::env::var_os("DRAY_RIG").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
        Some(home.join("dray/rig"))
    });
    match rig {
        Some(rig) if rig.join("bin/fio").exists() => Some(rig),
        _ => panic!("there is no rig: run tests/rig/make, or tests/run --no-rig"),
    }
}

/// The same for tests that make network namespaces, which only root may.
///
/// # Panics
/// As `rig` does; and when the rig is of a time before such tests.
#[must_use]
pub fn network_rig() -> Option<PathBuf> {
    let rig = rig()?;
    assert!(rig.join("bin/testpmd").exists(), "the rig is of an earlier time: run tests/rig/make");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: not root");
        return None;
    }
    Some(rig)
}

/// How often a loop shall run: by default, in CI, by hand.
#[must_use]
pub fn rounds(default: u32, ci: u32, long: u32) -> u32 {
    if std::env::var_os("DRAY_TEST_LONG").is_some() {
        long
    } else if std::env::var_os("DRAY_TEST_CI").is_some() {
        ci
    } else {
        default
    }
}

/// Whether tests of several minutes shall run: only where the tests were told to run long.
#[must_use]
pub fn long() -> bool {
    let long = std::env::var_os("DRAY_TEST_LONG").is_some();
    if !long {
        eprintln!("skipped: it takes minutes, and runs with tests/run --long");
    }
    long
}

/// A built program.
///
/// # Panics
/// When it is not built.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("DRAY_BIN").map_or_else(
        || {
            // target/debug/deps/test-… → target/release
            let test = std::env::current_exe().expect("a test is a program");
            test.ancestors().nth(3).expect("tests are built in target/PROFILE/deps").join("release")
        },
        PathBuf::from,
    );
    let program = folder.join(name);
    assert!(program.exists(), "{} is not built: tests/run builds all programs", program.display());
    program
}
