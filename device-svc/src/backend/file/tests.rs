#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;

fn settings(path: &Path) -> FileSettings {
    FileSettings { path: path.to_owned(), create_bytes: None, read_only: false, direct: DirectIo::Auto }
}

fn create(path: &Path, bytes: u64) -> FileSettings {
    FileSettings { create_bytes: Some(bytes), ..settings(path) }
}

fn read_only(path: &Path) -> FileSettings {
    FileSettings { read_only: true, ..settings(path) }
}

/// The text of a refusal for good.
fn refusal(settings: &FileSettings) -> String {
    match FileBackend::open(settings).unwrap_err() {
        BackendError::Refused(text) => {
            assert!(text.contains(&*settings.path.to_string_lossy()), "does not name the file: {text}");
            text
        }
        error @ BackendError::Unavailable(_) => panic!("not for good: {error}"),
    }
}

#[test]
fn a_created_file_is_sparse_and_private_and_found_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let backend = FileBackend::open(&create(&path, 10 << 30)).unwrap();
    let info = backend.info();
    assert_eq!((info.size_bytes, info.block_bytes, info.read_only), (10 << 30, 512, false));
    assert!(info.physical_block_bytes.is_power_of_two() && info.physical_block_bytes >= 512);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.blocks() * 512 < 1 << 20);
    assert_eq!(metadata.mode() & 0o777, 0o600);
    drop(backend);
    FileBackend::open(&create(&path, 10 << 30)).unwrap();
    FileBackend::open(&settings(&path)).unwrap();
    let text = refusal(&create(&path, 1 << 30));
    assert!(text.contains("10737418240") && text.contains("1073741824"), "{text}");
}

#[test]
fn an_empty_file_is_filled_in_and_a_failed_one_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    std::fs::write(&path, "").unwrap();
    assert!(refusal(&settings(&path)).contains("empty"));
    assert_eq!(FileBackend::open(&create(&path, 4096)).unwrap().info().size_bytes, 4096);
    let path = folder.path().join("huge");
    // No file system here takes a file of nearly 2^63 bytes.
    assert!(FileBackend::open(&create(&path, (1 << 63) - 512)).is_err());
    assert!(!path.exists(), "a file that could not be made is left behind");
}

#[test]
fn what_cannot_be_a_volume_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    assert!(refusal(&settings(&path)).contains("create"));
    refusal(&create(&path, 0));
    refusal(&create(&path, 1000));
    refusal(&FileSettings { read_only: true, ..create(&path, 512) });
    assert!(!path.exists());
    let directory = folder.path().join("directory");
    std::fs::create_dir(&directory).unwrap();
    refusal(&settings(&directory));
    assert!(refusal(&read_only(&directory)).contains("regular file"));
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refusal(&settings(&fifo)).contains("regular file"));
    assert!(refusal(&settings(Path::new("/dev/null"))).contains("regular file"));
}

#[test]
fn one_writer_or_many_readers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let writer = FileBackend::open(&create(&path, 4096)).unwrap();
    for settings in [settings(&path), read_only(&path)] {
        let error = FileBackend::open(&settings).unwrap_err();
        assert!(matches!(error, BackendError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
    }
    let channel = writer.open_channel().unwrap();
    drop(writer);
    assert!(FileBackend::open(&read_only(&path)).is_err(), "a channel still writes");
    drop(channel);
    let readers = [(); 2].map(|()| FileBackend::open(&read_only(&path)).unwrap());
    assert!(FileBackend::open(&settings(&path)).is_err());
    let info = readers[0].info();
    assert_eq!((info.read_only, info.discard, info.write_zeroes), (true, false, false));
    assert!(readers[0].resize(8192).is_err());
}

#[test]
fn a_file_in_use_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    for next in [settings(&path), read_only(&path)] {
        let writer = FileBackend::open(&create(&path, 4096)).unwrap();
        let channel = writer.open_channel().unwrap();
        drop(writer);
        let gone = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                gone.store(true, Ordering::SeqCst);
                drop(channel);
            });
            FileBackend::open(&next).unwrap();
            assert!(gone.load(Ordering::SeqCst), "the file was taken over while a channel had it");
        });
    }
}

#[test]
fn a_file_grows_and_shrinks() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let backend = FileBackend::open(&create(&path, 4096)).unwrap();
    for bytes in [1 << 20, 512] {
        assert_eq!(backend.resize(bytes).unwrap(), bytes);
        assert_eq!(backend.info().size_bytes, bytes);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), bytes);
    }
    assert!(backend.resize(0).is_err() && backend.resize(513).is_err());
    assert_eq!(backend.info().size_bytes, 512);
}

#[test]
fn a_tail_of_less_than_a_block_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    std::fs::write(&path, vec![7; 1000]).unwrap();
    assert_eq!(FileBackend::open(&settings(&path)).unwrap().info().size_bytes, 1024);
}

#[test]
fn direct_where_it_can() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let never = FileSettings { direct: DirectIo::Never, ..create(&path, 4096) };
    assert_eq!(FileBackend::open(&never).unwrap().file.geometry().direct, None);
    let status =
        |backend: &FileBackend| nix::fcntl::fcntl(backend.file.as_fd(), nix::fcntl::FcntlArg::F_GETFL).unwrap();
    let auto = FileBackend::open(&settings(&path)).unwrap();
    let is_direct = auto.file.geometry().direct.is_some();
    assert_eq!(status(&auto) & libc::O_DIRECT != 0, is_direct);
    assert_eq!(status(&auto) & libc::O_NONBLOCK, 0, "io_uring would answer EAGAIN");
    drop(auto);
    let always = FileSettings { direct: DirectIo::Always, ..settings(&path) };
    match FileBackend::open(&always) {
        Ok(backend) => assert!(backend.file.geometry().direct.is_some()),
        Err(error) => assert!(!is_direct && error.to_string().contains("direct"), "{error}"),
    }
}

/// `DRAY_TEST_BLOCK_DEVICE=/dev/loop0 cargo test -p device-svc --lib a_block_device -- --ignored`: its content goes.
#[test]
#[ignore = "needs root and a block device to overwrite"]
fn a_block_device_is_a_volume() {
    use crate::backend::{BlockOperation, BlockRequest, Segments, Tag};
    use crate::clock::Moment;

    let path = PathBuf::from(std::env::var_os("DRAY_TEST_BLOCK_DEVICE").expect("DRAY_TEST_BLOCK_DEVICE names one"));
    let backend = FileBackend::open(&settings(&path)).unwrap();
    println!("{:?}, {:?}", backend.info(), backend.file.geometry());
    assert!(FileBackend::open(&settings(&path)).is_err(), "it is in use");
    let size_bytes = backend.info().size_bytes;
    assert_eq!(backend.resize(1).unwrap(), size_bytes);
    let mut channel = backend.open_channel().unwrap();
    let mut memory = vec![5_u8; 64 << 10];
    let list = libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: memory.len() };
    let mut run = |operation, with_memory: bool| {
        #[expect(unsafe_code, reason = "lends a test's memory")]
        // SAFETY: list and memory outlive the request, which has ended when this returns.
        let segments = if with_memory { unsafe { Segments::new(&raw const list, 1) } } else { Segments::NONE };
        let tag = Tag { lane: 0, row: 0 };
        channel.submit(BlockRequest { tag, operation, offset: 4096, length: 64 << 10, segments }).unwrap();
        let mut completions = Vec::new();
        while completions.is_empty() {
            channel.poll(Moment(0), &mut completions);
        }
        completions[0].result
    };
    assert_eq!(run(BlockOperation::Write, true), Ok(()));
    assert_eq!(run(BlockOperation::Flush, false), Ok(()));
    for operation in [BlockOperation::WriteZeroes { unmap: true }, BlockOperation::WriteZeroes { unmap: false }] {
        assert_eq!(run(BlockOperation::Write, true), Ok(()));
        assert_eq!(run(operation, false), Ok(()));
        let mut file = std::fs::File::open(&path).unwrap();
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(4096)).unwrap();
        let mut content = vec![1; 64 << 10];
        std::io::Read::read_exact(&mut file, &mut content).unwrap();
        assert_eq!(content, vec![0; 64 << 10]);
    }
    assert_eq!(run(BlockOperation::Discard, false).is_ok(), backend.info().discard);
    assert_eq!(run(BlockOperation::Read, true), Ok(()));
}

#[test]
fn what_is_shared_with_others_is_never_read_into_a_vms_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let own = FileBackend::open(&create(&path, 4096)).unwrap();
    assert_eq!(own.info().payload, PayloadPlace::InPlace);
    drop(own);
    // Nobody waits for its reads when we are killed.
    let shared = [FileBackend::open(&read_only(&path)).unwrap(), FileBackend::open(&read_only(&path)).unwrap()];
    assert!(shared.iter().all(|shared| shared.info().payload == PayloadPlace::Card));
}
