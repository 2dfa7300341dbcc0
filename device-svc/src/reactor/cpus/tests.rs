#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
use super::*;

#[test]
fn a_quota_counts_whole_cpus() {
    assert_eq!(parse_quota("max 100000\n"), None);
    assert_eq!(parse_quota("250000 100000\n"), Some(2));
    assert_eq!(parse_quota("50000 100000\n"), Some(1));
    assert_eq!(parse_quota("1 0"), None);
    assert_eq!(parse_quota(""), None);
}

#[test]
fn the_tightest_group_on_the_way_up_binds() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("pod/container")).unwrap();
    std::fs::write(folder.path().join("pod/cpu.max"), "200000 100000").unwrap();
    std::fs::write(folder.path().join("pod/container/cpu.max"), "max 100000").unwrap();
    assert_eq!(smallest_quota(folder.path(), "/pod/container"), Some(2));
    std::fs::write(folder.path().join("pod/container/cpu.max"), "100000 100000").unwrap();
    assert_eq!(smallest_quota(folder.path(), "/pod/container"), Some(1));
    assert_eq!(smallest_quota(folder.path(), "/"), None);
}

#[test]
fn the_mount_is_found_among_others() {
    let mounts = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
    assert_eq!(cgroup_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    assert_eq!(cgroup_mount("proc /proc proc rw 0 0"), None);
}

#[test]
fn this_process_has_a_cpu() {
    assert!(!available_cpus().unwrap().is_empty());
}
