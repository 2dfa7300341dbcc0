//! What the demo says.

use std::fmt::Write;

use serde_json::json;

use super::stand::Stand;
use super::traffic::Figures;

/// Before the traffic.
pub(super) fn beginning(stand: &Stand) -> String {
    format!(
        "A card runs in this process: one virtio-blk function, no VM, no root, no configuration.\n  \
         volume    {}\n  socket    {} (vhost-user)\n\n",
        stand.volume().display(),
        stand.socket().display()
    )
}

/// The figures as JSON.
pub(super) fn json(figures: &Figures) -> String {
    let depths = figures.depths.iter().map(|depth| {
        json!({
            "depth": depth.depth,
            "iops": depth.iops.round(),
            "median-ns": depth.median_ns,
            "p99-ns": depth.p99_ns,
        })
    });
    let all = json!({ "verified-bytes": figures.verified_bytes, "random-4k-reads": depths.collect::<Vec<_>>() });
    format!("{all:#}\n")
}

/// A time at a length that is read at a glance.
fn time(ns: u64) -> String {
    if ns < 10_000 { format!("{:.2} µs", ns as f64 / 1e3) } else { format!("{:.1} µs", ns as f64 / 1e3) }
}

/// After the traffic: what came of it, and how to go on.
pub(super) fn end(figures: &Figures) -> String {
    let mut text = format!(
        "Wrote {0} MiB through virtqueues, read them back: all {1} bytes verified.\n\n\
         Random 4 KiB reads   {2:>12} {3:>12} {4:>12}\n",
        figures.verified_bytes >> 20,
        figures.verified_bytes,
        "IOPS",
        "median",
        "p99"
    );
    for depth in &figures.depths {
        let (iops, median, p99) = (depth.iops, time(depth.median_ns), time(depth.p99_ns));
        // Writing to a string does not fail.
        let _ = writeln!(text, "  depth {:<12}   {iops:>10.0} {median:>12} {p99:>12}", depth.depth);
    }
    text.push_str(NEXT);
    text
}

const NEXT: &str = r#"
Serve a configuration. Write this to card.toml:

  [[volume]]
  name = "root"
  backend = { type = "file", path = "/var/tmp/root.img", create = "10G" }

  [[function]]
  name = "vm1-disk0"
  type = "blk"
  link = { type = "vhost-user", socket = "/tmp/vm1-disk0.sock" }
  volume = "root"
  queues = 2

then: device-svc serve --config card.toml

Attach a VM. Its memory must be shared (share=on), or the card cannot reach it:

  qemu-system-x86_64 -accel kvm -machine q35,memory-backend=mem -m 1G -smp 2 \
    -object memory-backend-memfd,id=mem,size=1G,share=on \
    -chardev socket,id=disk0,path=/tmp/vm1-disk0.sock \
    -device vhost-user-blk-pci,chardev=disk0,num-queues=2 \
    -drive file=your-system.img,if=virtio

The guest sees the volume as a disk, /dev/vdX. (Without /dev/kvm: -accel tcg.)
What the card does then: device-svc stats --watch
"#;
