#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A Linux guest under QEMU, into which the function is plugged as a PCI device over vfio-user.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tests::{Card, CardSettings, GuestSettings, Process, boot_guest, long, qmp, qmp_until, rig, wait_for_or};

/// A card with one disk of 256 MiB; `link` are further keys of its link.
fn card(link: &str) -> Card {
    card_with(link, CardSettings { keeper: true, ..CardSettings::default() })
}

fn card_with(link: &str, settings: CardSettings) -> Card {
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
    Card::start(&CardSettings { parts, ..settings })
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

/// Two CPUs, so that the driver uses both queues.
const CPUS: [&str; 2] = ["-smp", "2"];

/// A file system is made, used, checked, used again; then each CPU writes a part of the disk in pieces of many sizes, sixteen at
/// a time, reads it back, and compares every one.
const USE_THE_DISK: &str = "grep virtio0 /proc/interrupts
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
    fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=4k-64k \
        --numjobs=2 --cpus_allowed=0-1 --cpus_allowed_policy=split --offset_increment=128M --size=${MIB}M \
        --verify=crc32c --verify_fatal=1 --group_reporting";

/// A job that uses the disk; each CPU writes `mib` MiB in pieces.
fn use_the_disk(mib: u64) -> String {
    format!("set -e\nMIB={mib}\n{USE_THE_DISK}")
}

/// Both queues were used for so much, and QEMU said nothing that the card refused.
fn has_used_both_queues(card: &Card, mib: u64) {
    let stats: serde_json::Value = serde_json::from_str(&card.command(&["stats", "--json", "--queues"])).unwrap();
    let queues: Vec<_> =
        stats["functions"].as_array().unwrap().iter().filter(|line| !line["queue"].is_null()).collect();
    assert_eq!(queues.len(), 2, "{stats}");
    for queue in queues {
        assert_eq!(queue["errors"], 0, "{stats}");
        // Pieces of 64 KiB at most; the guest may make one of two that are neighbours.
        let least = mib * 8;
        assert!(queue["writes"].as_u64().unwrap() >= least && queue["reads"].as_u64().unwrap() >= least, "{stats}");
    }
    assert!(!card.output().contains("refused"), "{}", card.output());
}

fn uses_the_disk(card: &Card, interrupts: &str) {
    let output = boot(card, &use_the_disk(16), &CPUS).succeed();
    assert!(output.contains(interrupts), "{output}");
    has_used_both_queues(card, 16);
}

#[test]
fn the_disk_is_used_with_msix() {
    if rig().is_some() {
        uses_the_disk(&card(""), "PCI-MSIX");
    }
}

#[test]
fn the_disk_is_used_with_intx_only() {
    if rig().is_some() {
        uses_the_disk(&card(", msix = false"), "IO-APIC");
    }
}

#[test]
fn the_disk_is_used_through_card_memory() {
    if rig().is_some() {
        uses_the_disk(&card(r#", payload = "copy""#), "PCI-MSIX");
    }
}

/// Boots a guest that has an IOMMU, before which the function stands.
/// Boots a guest whose memory is behind an IOMMU.
fn boot_behind_an_iommu(card: &Card, settings: GuestSettings<'_>, more: &str) -> Process {
    let append = format!("console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on {more}");
    let iommu = "intel-iommu,intremap=on,caching-mode=on";
    let device = device(card, "");
    // The IOMMU stands before what is behind it.
    let machine = ["-machine", "q35,kernel-irqchip=split", "-device", iommu, "-append", &append, "-device", &device];
    let arguments = [&machine, settings.arguments].concat();
    GuestSettings { arguments: &arguments, ..settings }.boot()
}

/// Every page that the driver shows the device is a map of its own, made before and taken away after each request; with
/// `iommu=pt` the guest's memory is mapped as it is.
#[test]
fn the_disk_is_used_behind_an_iommu() {
    if rig().is_none() {
        return;
    }
    for (more, link, interrupts) in [
        ("iommu.strict=1", "", "IR-PCI-MSIX"),
        ("iommu=pt", "", "IR-PCI-MSIX"),
        ("iommu.strict=1", ", msix = false", "IR-IO-APIC"),
    ] {
        let card = card(link);
        // Each page of it costs messages.
        let job = use_the_disk(4);
        let output = boot_behind_an_iommu(&card, GuestSettings::new(card.folder(), &job, &CPUS), more).succeed();
        assert!(output.contains(interrupts), "{output}");
        has_used_both_queues(&card, 4);
    }
}

/// Doorbell messages that a VMM has sent: writes to the notify registers, as the card's log shows them.
fn doorbell_messages(card: &Card) -> usize {
    let log = card.output();
    assert!(log.contains("a request"), "the log shows requests");
    let body = |line: &str| -> Option<Vec<u8>> {
        let (header, body) = line.split_once("body=[")?;
        // VFIO_USER_REGION_WRITE
        header.contains("command: 10,").then_some(())?;
        body.split_once(']')?.0.split(", ").map(|byte| byte.parse().ok()).collect()
    };
    let is_doorbell = |body: &Vec<u8>| {
        let offset = u64::from_le_bytes(body[..8].try_into().unwrap());
        body[8..12] == [0; 4] && (0x3000..0x4000).contains(&offset)
    };
    log.lines().filter_map(body).filter(is_doorbell).count()
}

/// QEMU maps the notify registers where it may: then no doorbell is a message.
#[test]
fn a_mapped_doorbell_is_no_message() {
    if rig().is_none() {
        return;
    }
    let job = "dd if=/dev/urandom of=/dev/vda bs=4k count=100 oflag=direct 2>/dev/null";
    let messages = [r#", notify = "message""#, r#", notify = "mapped""#].map(|link| {
        let log = "info,device_svc::link::vfio_user::session=trace".to_owned();
        let card =
            card_with(link, CardSettings { poll: "always".to_owned(), log, keeper: true, ..CardSettings::default() });
        boot(&card, job, &[]).succeed();
        let stats = card.stats();
        assert!(stats["functions"][0]["writes"].as_u64().unwrap() >= 100, "{stats}");
        doorbell_messages(&card)
    });
    assert!(messages[0] > 0 && messages[1] == 0, "{messages:?}");
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

/// A guest is reset while it writes, as by a button: the function is clean for the next kernel, behind an IOMMU too.
#[test]
fn a_reset_in_the_middle_of_io_leaves_a_clean_function() {
    if rig().is_none() {
        return;
    }
    // The same job each time; the disk says how often it ran.
    let job = "set -e
        if ! mount -t ext4 /dev/vda /mnt 2>/dev/null; then
            mkfs.ext4 -qF /dev/vda
            mount -t ext4 /dev/vda /mnt
            dd if=/dev/urandom of=/mnt/a bs=1M count=4 2>/dev/null
            md5sum /mnt/a >/mnt/sum
        fi
        md5sum -c /mnt/sum
        echo boot >>/mnt/boots
        sync
        echo BOOT $(wc -l </mnt/boots)
        if [ $(wc -l </mnt/boots) -lt 2 ]; then
            fio --name=busy --filename=/mnt/busy --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bs=4k \
                --size=4M --io_size=64G --norandommap
            false
        fi
        umount /mnt
        e2fsck -f -n /dev/vda";
    for behind_an_iommu in [false, true] {
        let card = card("");
        // Two boots, and each of its I/O's pages costs messages.
        let reset = ["-action", "reboot=reset"];
        let settings =
            GuestSettings { limit: Duration::from_secs(300), ..GuestSettings::new(card.folder(), job, &reset) };
        let mut guest = if behind_an_iommu {
            boot_behind_an_iommu(&card, settings, "iommu.strict=1")
        } else {
            let device = device(&card, "");
            let arguments = [&["-device", &device], &reset[..]].concat();
            GuestSettings { arguments: &arguments, ..settings }.boot()
        };
        guest.wait_for_output("BOOT 1\r");
        let writes = || card.stats()["functions"][0]["writes"].as_u64().unwrap();
        let before = writes();
        wait_for_or(|| writes() > before + 200, || guest.output());
        qmp(&card, "system_reset", "{}");
        let output = guest.succeed();
        assert!(output.contains("BOOT 2\r"), "{output}");
        assert!(!card.output().contains("refused"), "{}", card.output());
        assert_eq!(card.stats()["functions"][0]["errors"], 0, "{}", card.stats());
    }
}

/// An archive that brings a second kernel into the guest, and what it starts with: the same, with the same job.
fn second_kernel(folder: &Path, rig: &Path, job: &str) -> PathBuf {
    let script = "set -e
        mkdir -p tree/kexec start
        cp \"$RIG/guest/vmlinuz\" tree/kexec/vmlinuz
        mv second.sh start/job.sh
        (cd start && echo job.sh | cpio -o -H newc --quiet) >start.cpio
        cat \"$RIG/guest/initramfs.cpio\" start.cpio >tree/kexec/initramfs
        (cd tree && find . | cpio -o -H newc --quiet) >second.cpio
        truncate -s %512 second.cpio";
    std::fs::write(folder.join("second.sh"), job).unwrap();
    let status = Command::new("sh").args(["-c", script]).current_dir(folder).env("RIG", rig).status().unwrap();
    assert!(status.success(), "the second kernel's archive: {status}");
    folder.join("second.cpio")
}

/// A kernel starts another in its place while I/O is under way: nobody resets the function but the second kernel's driver.
#[test]
fn another_kernel_takes_over_in_the_middle_of_io() {
    let Some(rig) = rig() else { return };
    let job = "set -e
        if grep -q second-kernel /proc/cmdline; then
            mount -t ext4 /dev/vda /mnt
            md5sum -c /mnt/sum
            umount /mnt
            e2fsck -f -n /dev/vda
            echo SECOND
            exit
        fi
        mkfs.ext4 -qF /dev/vda
        mount -t ext4 /dev/vda /mnt
        dd if=/dev/urandom of=/mnt/a bs=1M count=4 2>/dev/null
        md5sum /mnt/a >/mnt/sum
        sync
        kexec --load /kexec/vmlinuz --initrd=/kexec/initramfs \
            --append='console=ttyS0 quiet panic=-1 no_timer_check second-kernel'
        fio --name=busy --filename=/mnt/busy --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bs=4k \
            --size=4M --io_size=64G --norandommap >/dev/null &
        until [ $(awk '{ print $5 }' /sys/block/vda/stat) -gt 1000 ]; do sleep 0.1; done
        echo BUSY
        kexec --exec";
    let card = card("");
    let archive = second_kernel(card.folder(), &rig, job);
    let device = device(&card, "");
    let arguments = ["-device", &device];
    let settings = GuestSettings { memory_mib: 1024, ..GuestSettings::new(card.folder(), job, &arguments) };
    let mut guest = GuestSettings { archive: Some(&archive), limit: Duration::from_secs(300), ..settings }.boot();
    guest.wait_for_output("BUSY");
    let output = guest.succeed();
    assert_eq!(output.matches("DRAY-GUEST-READY").count(), 2, "{output}");
    assert!(output.contains("SECOND"), "{output}");
    assert!(!card.output().contains("refused"), "{}", card.output());
    assert_eq!(card.stats()["functions"][0]["errors"], 0, "{}", card.stats());
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

/// Plugs a function in behind a root port, uses it, plugs it out, and all of that again. False if QEMU aborts while it takes a
/// function with MSI-X away, as QEMU 11.1 does.
fn plug_in_and_out(card: &Card, interrupts: &str) -> bool {
    let job = "for round in 1 2; do
            for i in $(seq 600); do [ -e /sys/block/vda/size ] && break; sleep 0.1; done
            grep virtio0 /proc/interrupts
            dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null && echo IN $round
            for i in $(seq 600); do [ -e /sys/block/vda ] || break; sleep 0.1; done
            # The driver is gone before the slot's power is, and only then is the function.
            for i in $(seq 600); do [ $(cat /sys/bus/pci/slots/*/power) = 0 ] && break; sleep 0.1; done
            [ ! -e /sys/block/vda ] && echo OUT $round
        done";
    let mut guest = boot_guest(card, job, &["-device", "pcie-root-port,id=rp0,chassis=1,hotplug=on"]);
    guest.wait_for_output("DRAY-GUEST-READY");
    for round in 1..=2 {
        qmp(card, "device_add", &device(card, r#","bus":"rp0""#));
        guest.wait_for_output(&format!("IN {round}\r"));
        assert!(guest.output().contains(interrupts), "{}", guest.output());
        if !qmp_until(card, "device_del", r#"{"id":"f"}"#, "DEVICE_DELETED") {
            let status = guest.end();
            // A guest that is through may power off before QEMU has told of the removal.
            if status.success() && guest.output().contains("OUT 2\r") {
                return true;
            }
            // Any other end is a failure.
            assert!(guest.output().contains("memory_region_del_subregion: Assertion"), "{}", guest.output());
            return false;
        }
        guest.wait_for_output(&format!("OUT {round}\r"));
    }
    guest.succeed();
    true
}

#[test]
fn a_function_is_plugged_in_and_out_behind_a_root_port() {
    if rig().is_some() {
        assert!(plug_in_and_out(&card(", msix = false"), "IO-APIC"), "QEMU takes a function with INTx away");
    }
}

#[test]
fn a_function_with_msix_is_plugged_in_and_out_behind_a_root_port() {
    if rig().is_none() {
        return;
    }
    let card = card("");
    if !plug_in_and_out(&card, "PCI-MSIX") {
        eprintln!(
            "skipped: plugging out; this QEMU aborts (memory_region_del_subregion) when a function with MSI-X goes"
        );
        assert_eq!(card.stats()["functions"][0]["errors"], 0, "{}", card.stats());
    }
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

/// A guest is the physical host: its Linux gives the function to vfio-pci, and a VM of its own, emulated within the emulation,
/// finds the disk with its own virtio driver. So the card is seen as a host sees hardware: by its registers, through an IOMMU.
#[test]
fn a_host_passes_the_function_on_to_a_vm_of_its_own() {
    if rig().is_none() || !long() {
        return;
    }
    let archive = Process::start(&mut Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/chain"))).succeed();
    let job = r#"set -e
        while read -r module; do insmod /lib/modules/$module; done </etc/modules-vfio
        address=$(basename $(readlink -f /sys/block/vda/device/..))
        cd /sys/bus/pci/devices/$address
        echo vfio-pci >driver_override
        echo $address >driver/unbind
        echo $address >/sys/bus/pci/drivers_probe
        [ $(basename $(readlink -f driver)) = vfio-pci ]
        [ ! -e /sys/block/vda ]
        echo HOST-BOUND
        mkdir /inner/job
        cat >/inner/job/job.sh <<'INNER'
set -e
echo INNER-READY
grep virtio0 /proc/interrupts
[ "$(cat /sys/block/vda/serial)" = 6c1f2a548f0e4b7d9a4e ]
yes 'written by the inner VM' | dd of=/dev/vda bs=4k count=256 iflag=fullblock conv=fsync 2>/dev/null
echo 3 >/proc/sys/vm/drop_caches
yes 'written by the inner VM' | dd bs=4k count=256 iflag=fullblock 2>/dev/null | md5sum >/tmp/sum
[ "$(dd if=/dev/vda bs=4k count=256 2>/dev/null | md5sum)" = "$(cat /tmp/sum)" ]
echo INNER-VERIFIED
INNER
        (cd /inner/job && echo job.sh | cpio -o -H newc) >>/inner/initramfs.cpio
        qemu-system-x86_64 -L /usr/share/qemu -machine q35 -accel tcg -cpu max -m 192 -nodefaults -nographic -no-reboot \
            -kernel /inner/vmlinuz -initrd /inner/initramfs.cpio -append 'console=ttyS0 quiet panic=-1 no_timer_check' \
            -serial stdio -device vfio-pci,host=$address </dev/null"#;
    let card = card("");
    let settings = GuestSettings {
        memory_mib: 1024,
        archive: archive.lines().rev().find(|line| line.starts_with('/')).map(Path::new),
        limit: Duration::from_secs(1800),
        ..GuestSettings::new(card.folder(), job, &CPUS)
    };
    let mut host = boot_behind_an_iommu(&card, settings, "");
    host.wait_for_output("HOST-BOUND\r");
    let requests = |kind: &str| card.stats()["functions"][0][kind].as_u64().unwrap();
    let (reads, writes) = (requests("reads"), requests("writes"));
    host.wait_for_output("INNER-READY\r");
    let output = host.succeed();
    assert!(output.contains("INNER-VERIFIED\r"), "{output}");
    // A MiB each way, in pieces that a guest's kernel makes of it.
    assert!(requests("writes") > writes && requests("reads") > reads, "{}", card.stats());
    assert_eq!(requests("errors"), 0, "{}", card.stats());
    assert!(!card.output().contains("refused"), "{}", card.output());
    // What is on the disk is what the inner VM wrote.
    let line = b"written by the inner VM\n";
    let disk = std::fs::read(card.path("disk")).unwrap();
    assert!(disk[..1 << 20].iter().eq(line.iter().cycle().take(1 << 20)), "the disk holds something else");
}
