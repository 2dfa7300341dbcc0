#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A Linux guest under QEMU, into which the function is plugged as a PCI device over vfio-user.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::{Card, CardSettings, Process, boot_guest, qmp, rig};

/// A card with one disk of 256 MiB; `link` are further keys of its link.
fn card(link: &str) -> Card {
    let parts = format!(
        r#"
[[volume]]
name = "v"
backend = {{ type = "file", path = "@/disk", create = "256M" }}
uuid = "6c1f2a54-8f0e-4b7d-9a4e-0d5f2b9c7e11"
[[function]]
name = "f"
type = "blk"
link = {{ type = "vfio-user", socket = "@/f.sock"{link} }}
volume = "v"
queues = 2
"#
    );
    Card::start(&CardSettings { parts, ..CardSettings::default() })
}

/// The device as QEMU's command line and `device_add` name it.
fn device(card: &Card, more: &str) -> String {
    let path = card.path("f.sock");
    let path = path.display();
    format!(r#"{{"driver":"vfio-user-pci","id":"f","socket":{{"type":"unix","path":"{path}"}}{more}}}"#)
}

fn boot(card: &Card, job: &str, arguments: &[&str]) -> Process {
    boot_guest(card, job, &[&["-device", &device(card, "")], arguments].concat())
}

/// A file system is made, used, checked, used again; blocks all over the disk are written and compared.
const USE_THE_DISK: &str = "set -e
    grep virtio0 /proc/interrupts
    [ \"$(cat /sys/block/vda/serial)\" = 6c1f2a548f0e4b7d9a4e ]
    mkfs.ext4 -qF /dev/vda
    mount -t ext4 -o discard /dev/vda /mnt
    dd if=/dev/urandom of=/mnt/a bs=1M count=32 2>/dev/null
    md5sum /mnt/a >/tmp/sum
    umount /mnt
    e2fsck -f -n /dev/vda
    mount -t ext4 /dev/vda /mnt
    md5sum -c /tmp/sum
    umount /mnt
    dd if=/dev/urandom of=/tmp/blocks bs=4k count=64 2>/dev/null
    for i in $(seq 64); do
        dd if=/tmp/blocks of=/dev/vda bs=4k skip=$((i - 1)) seek=$((i * 997 % 65536)) count=1 conv=notrunc 2>/dev/null
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    for i in $(seq 64); do
        dd if=/dev/vda of=/tmp/block bs=4k skip=$((i * 997 % 65536)) count=1 2>/dev/null
        dd if=/tmp/blocks bs=4k skip=$((i - 1)) count=1 2>/dev/null | cmp - /tmp/block
    done";

fn uses_the_disk(card: &Card, arguments: &[&str], interrupts: &str) {
    let output = boot(card, USE_THE_DISK, arguments).succeed();
    assert!(output.contains(interrupts), "{output}");
    let stats = card.stats();
    let function = &stats["functions"][0];
    assert_eq!(function["errors"], 0, "{stats}");
    assert!(function["writes"].as_u64().unwrap() > 64 && function["reads"].as_u64().unwrap() > 64, "{stats}");
}

#[test]
fn the_disk_is_used_with_msix() {
    if rig().is_some() {
        uses_the_disk(&card(""), &[], "PCI-MSIX");
    }
}

#[test]
fn the_disk_is_used_with_intx_only() {
    if rig().is_some() {
        uses_the_disk(&card(", msix = false"), &[], "IO-APIC");
    }
}

#[test]
fn the_disk_is_used_through_card_memory() {
    if rig().is_some() {
        uses_the_disk(&card(r#", payload = "copy""#), &[], "PCI-MSIX");
    }
}

/// Every page that the driver shows the device is a map of its own, made before and taken away after each request; with
/// `iommu=pt` the guest's memory is mapped as it is.
#[test]
fn the_disk_is_used_behind_an_iommu() {
    if rig().is_none() {
        return;
    }
    for more in ["iommu.strict=1", "iommu=pt"] {
        let append = format!("console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on {more}");
        let iommu = "intel-iommu,intremap=on,caching-mode=on";
        let card = card("");
        let device = device(&card, "");
        let arguments =
            ["-machine", "q35,kernel-irqchip=split", "-device", iommu, "-append", &append, "-device", &device];
        // The IOMMU stands before what is behind it.
        let output = boot_guest(&card, USE_THE_DISK, &arguments).succeed();
        assert!(output.contains("IR-PCI-MSIX"), "{output}");
        assert_eq!(card.stats()["functions"][0]["errors"], 0, "{more}");
    }
}

#[test]
fn a_reboot_starts_with_a_clean_function() {
    if rig().is_none() {
        return;
    }
    let card = card("");
    // The same job each time; the disk says how often it ran.
    let job = "set -e
        if ! mount -t ext4 /dev/vda /mnt 2>/dev/null; then
            mkfs.ext4 -qF /dev/vda
            mount -t ext4 /dev/vda /mnt
        fi
        [ ! -e /mnt/sum ] || md5sum -c /mnt/sum
        dd if=/dev/urandom of=/mnt/a bs=64k count=64 2>/dev/null
        md5sum /mnt/a >/mnt/sum
        echo boot >>/mnt/boots
        echo BOOT $(wc -l </mnt/boots)
        umount /mnt
        mount -t ext4 /dev/vda /mnt
        if [ $(wc -l </mnt/boots) -lt 3 ]; then
            umount /mnt
            # While reads are on their way.
            dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null &
            reboot -f
            sleep 60
        fi";
    let output = boot(&card, job, &["-action", "reboot=reset"]).succeed();
    for boot in ["BOOT 1", "BOOT 2", "BOOT 3"] {
        assert!(output.contains(boot), "{output}");
    }
}

#[test]
fn the_guest_sees_a_resize() {
    if rig().is_none() {
        return;
    }
    for link in ["", ", msix = false"] {
        let card = card(link);
        let job = "echo SIZE $(cat /sys/block/vda/size)
            for i in $(seq 600); do [ $(cat /sys/block/vda/size) = 1048576 ] && break; sleep 0.1; done
            echo SIZE $(cat /sys/block/vda/size)
            [ $(cat /sys/block/vda/size) = 1048576 ] &&
                dd if=/dev/urandom of=/dev/vda bs=1M seek=500 count=8 2>/dev/null";
        let mut guest = boot(&card, job, &[]);
        guest.wait_for_output("SIZE 524288");
        card.command(&["volume", "resize", "v", "512M"]);
        let output = guest.succeed();
        assert!(output.contains("SIZE 1048576"), "{output}");
    }
}

/// Kills the QEMU that has the card's function.
fn kill_vmm(card: &Card) {
    let socket = card.path("f.sock").display().to_string();
    for process in std::fs::read_dir("/proc").unwrap() {
        let process = process.unwrap();
        let Ok(number) = process.file_name().to_string_lossy().parse::<i32>() else { continue };
        // A process may end meanwhile; the script that starts QEMU names the socket too.
        let words = std::fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
        if words.contains(&socket) && words.contains("qemu-system") {
            let _ = kill(Pid::from_raw(number), Signal::SIGKILL);
        }
    }
}

/// A VMM is killed while its guest writes; the next one finds the function as new, and the disk as it was flushed.
#[test]
fn one_vmm_comes_after_another() {
    if rig().is_none() {
        return;
    }
    let card = card("");
    let job = "set -e
        mkfs.ext4 -qF /dev/vda
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/a bs=1M count=8 conv=fsync 2>/dev/null
        md5sum /mnt/a >/mnt/sum
        sync
        echo WRITTEN
        while :; do dd if=/dev/urandom of=/mnt/b bs=64k count=64 conv=fsync 2>/dev/null; done";
    let mut first = boot(&card, job, &[]);
    first.wait_for_output("WRITTEN");
    // A second VMM is told that the function has one.
    let mut second = boot(&card, "true", &[]);
    assert!(!second.end().success());
    assert!(second.output().contains("Device or resource busy"), "{}", second.output());
    kill_vmm(&card);
    first.end();
    let job = "set -e
        mount -t ext4 /dev/vda /mnt
        md5sum -c /mnt/sum
        umount /mnt
        e2fsck -f -n /dev/vda";
    boot(&card, job, &[]).succeed();
}

#[test]
fn a_function_is_plugged_in_and_out_behind_a_root_port() {
    if rig().is_none() {
        return;
    }
    // QEMU 11.1 aborts when a function with MSI-X is unplugged, so this one has none.
    let card = card(", msix = false");
    let job = "for i in $(seq 600); do [ -e /sys/block/vda/size ] && break; sleep 0.1; done
        dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null && echo IN
        for i in $(seq 600); do [ -e /sys/block/vda ] || break; sleep 0.1; done
        [ ! -e /sys/block/vda ] && echo OUT";
    let mut guest = boot_guest(&card, job, &["-device", "pcie-root-port,id=rp0,chassis=1,hotplug=on"]);
    guest.wait_for_output("DRAY-GUEST-READY");
    qmp(&card, "device_add", &device(&card, r#","bus":"rp0""#));
    guest.wait_for_output("IN\r");
    qmp(&card, "device_del", r#"{"id":"f"}"#);
    guest.wait_for_output("OUT\r");
    guest.succeed();
}

/// What a person sees who looks for hardware.
#[test]
fn lspci_shows_a_device() {
    if rig().is_none() {
        return;
    }
    let card = card("");
    // Where the firmware puts it is not the card's doing.
    let job = "lspci.pciutils -vv -d 1af4: |
        sed 's/Memory at [0-9a-f]*/Memory at …/; s/routed to IRQ [0-9]*/routed to IRQ …/; s/^/LSPCI /'";
    let port = ["-device", "pcie-root-port,id=rp0,chassis=1"];
    let device = device(&card, r#","bus":"rp0""#);
    let output = boot_guest(&card, job, &[&port[..], &["-device", &device]].concat()).succeed();
    let shown: String = output
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("LSPCI "))
        .map(|line| format!("{}\n", line.trim_end()))
        .collect();
    let golden = include_str!("golden/lspci.txt");
    assert_eq!(shown, golden, "{shown}");
}
