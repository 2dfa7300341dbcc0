#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

#[test]
fn a_service_that_never_served_is_not_started_again() {
    assert_eq!(Restarts::default().pause(false), None);
}

#[test]
fn restarts_are_never_hot() {
    let mut restarts = Restarts::default();
    restarts.served();
    for _ in 0..AT_ONCE {
        assert_eq!(restarts.pause(true), Some(Duration::ZERO));
    }
    assert_eq!(restarts.pause(true), Some(PAUSE));
    let pauses: Vec<_> = (0..40).map(|_| restarts.pause(false).unwrap()).collect();
    assert!(pauses.is_sorted() && pauses[0] == PAUSE_FIRST && pauses[1] == 2 * PAUSE_FIRST && pauses[39] == PAUSE_LAST);
    restarts.served();
    assert_eq!(restarts.pause(false), Some(PAUSE_FIRST));
}

#[test]
fn what_became_of_a_service_is_said_and_passed_on() {
    let killed = ExitStatus::from_raw(9);
    assert_eq!((describe(killed).as_str(), exit_code(killed)), ("killed by SIGKILL", ExitCode::from(137)));
    let failed = ExitStatus::from_raw(3 << 8);
    assert_eq!((describe(failed).as_str(), exit_code(failed)), ("exit status: 3", ExitCode::from(3)));
}

#[test]
fn a_program_is_a_file() {
    assert!(Program::open(Path::new("/")).is_err());
    assert!(Program::open(Path::new("/does-not-exist")).is_err());
    assert!(Program::own().unwrap().to_string().starts_with('/'));
}
