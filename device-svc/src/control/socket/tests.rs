//! Permissions, sockets left behind, sockets in use.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::*;

fn mode_of(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o777
}

#[test]
fn the_socket_has_its_permissions_and_its_folder_is_made() {
    let folder = tempfile::tempdir().unwrap();
    for mode in [0o600, 0o660] {
        let path = folder.path().join(format!("new/{mode:o}.sock"));
        let socket = ListeningSocket::bind(&path, mode).unwrap();
        assert_eq!(mode_of(&path), mode);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists(), "the name goes away with the socket");
    }
    let expected = if nix::unistd::geteuid().is_root() { 0o755 } else { 0o700 };
    assert_eq!(mode_of(&folder.path().join("new")), expected);
}

#[test]
fn the_socket_never_has_wider_permissions() {
    // Whatever the umask is, the name appears with at most the mode that was set before it had one.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plain.sock");
    let plain = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    fchmod(&plain, Mode::from_bits_truncate(0o600)).unwrap();
    bind(plain.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    assert_eq!(mode_of(&path) & 0o177, 0);
}

#[test]
fn a_socket_left_behind_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let _socket = ListeningSocket::bind(&path, 0o600).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_socket_in_use_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card.sock");
    let first = ListeningSocket::bind(&path, 0o600).unwrap();
    let error = ListeningSocket::bind(&path, 0o600).err().unwrap();
    assert!(matches!(error, SocketError::InUse(_)), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(first);
    let foreign = UnixListener::bind(&path).unwrap();
    let error = ListeningSocket::bind(&path, 0o600).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!("{} is in use by a running service; stop that or choose another address", path.display())
    );
    drop(foreign);
}

#[test]
fn a_file_in_the_way_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card.sock");
    std::fs::write(&path, "precious").unwrap();
    let error = ListeningSocket::bind(&path, 0o600).err().unwrap();
    assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn anothers_socket_is_not_taken_away() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card.sock");
    let first = ListeningSocket::bind(&path, 0o600).unwrap();
    std::fs::remove_file(&path).unwrap();
    // Keeps the inode of the first from being given out again.
    let _others = UnixListener::bind(&path).unwrap();
    drop(first);
    assert!(path.exists());
}
