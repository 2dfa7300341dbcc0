//! Signals to single threads of a program under test.
#![expect(unsafe_code, reason = "neither the standard library nor nix sends a signal to one thread of another process")]

use nix::sys::signal::Signal;

/// The threads of a process; none once it has ended.
#[must_use]
pub fn threads_of(process: u32) -> Vec<i32> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
    let number = |task: std::io::Result<std::fs::DirEntry>| task.ok()?.file_name().to_str()?.parse().ok();
    tasks.into_iter().flatten().filter_map(number).collect()
}

/// Sends a signal to one thread; nothing happens if it has ended.
pub fn signal_thread(process: u32, thread: i32, signal: Signal) {
    // SAFETY: the call takes three numbers and touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_tgkill, process.cast_signed(), thread, signal as libc::c_int) };
}
