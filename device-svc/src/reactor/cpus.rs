//! Which CPUs this process may really use: the affinity mask, and the share that a cgroup's quota leaves.
//!
//! A container on a card is often given two CPUs' worth of time on eight cores; eight spinning reactors would then be
//! stopped most of the time, each in the middle of a request.

use std::path::{Path, PathBuf};

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// The numbers of the CPUs in this thread's affinity mask, ascending.
///
/// # Errors
/// When the kernel does not tell.
pub fn available_cpus() -> std::io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

/// How many whole CPUs the cgroup v2 quotas on the way from this process's group to the root leave, at least 1. `None`
/// without a quota.
#[must_use]
pub fn quota_cpus() -> Option<usize> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    smallest_quota(&cgroup_mount(&mounts)?, group)
}

/// Where the cgroup v2 hierarchy is mounted.
fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (place, kind) = (fields.nth(1)?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(place))
    })
}

/// The smallest quota from `group` upwards; a parent's quota binds its children.
fn smallest_quota(mount: &Path, group: &str) -> Option<usize> {
    let mut smallest: Option<usize> = None;
    let mut at = mount.join(group.trim_start_matches('/'));
    loop {
        if let Some(cpus) = std::fs::read_to_string(at.join("cpu.max")).ok().and_then(|text| parse_quota(&text)) {
            smallest = Some(smallest.map_or(cpus, |least| least.min(cpus)));
        }
        if at == mount || !at.pop() {
            return smallest;
        }
    }
}

/// `cpu.max` holds "quota period" in microseconds, or "max period".
fn parse_quota(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period) = (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?);
    Some(usize::try_from(quota.checked_div(period)?).ok()?.max(1))
}

/// Pins the calling thread; without that right it runs where the kernel puts it.
pub(super) fn pin(cpu: usize) {
    if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        tracing::warn!(cpu, "a reactor could not be pinned to its CPU");
    }
}

#[cfg(test)]
mod tests;
