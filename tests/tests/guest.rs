#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A Linux guest under QEMU, whose own virtio driver uses the disk.

use tests::{Card, CardSettings, Process, boot_guest, qmp, rig};

const DISK: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "256M" }
uuid = "6c1f2a54-8f0e-4b7d-9a4e-0d5f2b9c7e11"
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
queues = 2
"#;

/// Boots a guest with the disk of `card`, to run `job`.
fn boot(card: &Card, job: &str, more: &[&str]) -> Process {
    let device = "vhost-user-blk-pci,chardev=c0,num-queues=2";
    let chardev = format!("socket,id=c0,path={},reconnect-ms=100", card.path("f.sock").display());
    let device = if more.is_empty() { device.to_owned() } else { format!("{device},{}", more.join(",")) };
    boot_guest(card, job, &["-chardev", &chardev, "-device", &device])
}

fn card() -> Card {
    Card::start(&CardSettings { parts: DISK.to_owned(), ..CardSettings::default() })
}

#[test]
fn a_file_system_lives_on_the_disk() {
    if rig().is_none() {
        return;
    }
    for more in [&[][..], &["packed=on"][..]] {
        let card = card();
        let job = "set -e
            cat /sys/block/vda/serial; echo
            [ \"$(cat /sys/block/vda/serial)\" = 6c1f2a548f0e4b7d9a4e ]
            mkfs.ext4 -q /dev/vda
            mount -t ext4 -o discard /dev/vda /mnt
            dd if=/dev/urandom of=/mnt/a bs=1M count=48 2>/dev/null
            md5sum /mnt/a >/tmp/sum
            umount /mnt
            e2fsck -f -n /dev/vda
            mount -t ext4 /dev/vda /mnt
            md5sum -c /tmp/sum
            rm /mnt/a
            fstrim -v /mnt
            umount /mnt
            e2fsck -f -n /dev/vda
            blkdiscard.util-linux -f -z -o 0 -l 1M /dev/vda
            blkdiscard.util-linux -f /dev/vda
            [ \"$(dd if=/dev/vda bs=1M count=8 2>/dev/null | tr -d '\\0' | wc -c)\" = 0 ]";
        boot(&card, job, more).succeed();
        let stats = card.stats();
        assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
        // The discard of the whole disk freed the file's blocks.
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(card.path("disk")).unwrap());
        assert!(blocks * 512 <= 1 << 20, "{blocks} blocks are left of a disk that was discarded");
    }
}

#[test]
fn the_guest_sees_a_resize() {
    if rig().is_none() {
        return;
    }
    let card = card();
    let job = "echo SIZE $(cat /sys/block/vda/size)
        for i in $(seq 600); do [ $(cat /sys/block/vda/size) = 1048576 ] && break; sleep 0.1; done
        echo SIZE $(cat /sys/block/vda/size)
        [ $(cat /sys/block/vda/size) = 1048576 ] && dd if=/dev/urandom of=/dev/vda bs=1M seek=500 count=8 2>/dev/null";
    let mut guest = boot(&card, job, &[]);
    guest.wait_for_output("SIZE 524288");
    card.command(&["volume", "resize", "v", "512M"]);
    let output = guest.succeed();
    assert!(output.contains("SIZE 1048576"), "{output}");
}

#[test]
fn pause_and_reset_lose_nothing() {
    if rig().is_none() {
        return;
    }
    let card = card();
    // Each write is checked; a pause stops the rings and starts them again where they were.
    let job = "for i in $(seq 1 40); do
            dd if=/dev/urandom of=/tmp/a bs=64k count=16 2>/dev/null
            dd if=/tmp/a of=/dev/vda bs=64k seek=$i conv=fsync 2>/dev/null || exit 1
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/vda of=/tmp/b bs=64k skip=$i count=16 2>/dev/null || exit 1
            cmp /tmp/a /tmp/b || exit 1
            echo ROUND $i
        done";
    let mut guest = boot(&card, job, &[]);
    for round in ["ROUND 3\r", "ROUND 8\r", "ROUND 15\r"] {
        guest.wait_for_output(round);
        qmp(&card, "stop", "{}");
        qmp(&card, "cont", "{}");
    }
    guest.succeed();
}
