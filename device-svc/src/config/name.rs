//! What things may be called, and the identities that are made from names.

use uuid::Uuid;

/// Names the identities that are derived from names; any fixed UUID would do.
pub(super) const IDENTITY_SPACE: Uuid = Uuid::from_u128(0x6f2b_7a10_53c1_4b8e_9d24_6472_6179_0001);

/// An interface's name with its NUL fits `IFNAMSIZ` (16).
const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// The name of a file (`NAME_MAX`).
const FILE_NAME_BYTES_MAX: usize = 255;

/// Names of volumes, uplinks, functions and limit groups appear in metrics labels, log lines and commands, so they hold nothing
/// that any of these would have to quote.
///
/// # Errors
/// What is wrong with the name.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let starts_well = name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric());
    let continues_well = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if starts_well && continues_well && name.len() <= 63 {
        return Ok(());
    }
    Err(format!("{name:?} is not a name; use 1 to 63 letters, digits, `.`, `_`, `-`, beginning with a letter or digit"))
}

/// Whether the kernel lets a network interface be called so. A `%` it would take as a pattern for numbers.
///
/// # Errors
/// What is wrong with the name.
pub(super) fn check_interface_name(name: &str) -> Result<(), String> {
    let has_bad = name.chars().any(|character| character.is_whitespace() || "/:%\0".contains(character));
    if !(1..=INTERFACE_NAME_BYTES_MAX).contains(&name.len()) || has_bad || [".", ".."].contains(&name) {
        return Err(format!(
            "{name:?} is not an interface's name; use 1 to 15 bytes without `/`, `:`, `%` and spaces, like \"dray0\""
        ));
    }
    Ok(())
}

/// Whether a network namespace can be called so (`ip netns`): it is a file in one folder.
///
/// # Errors
/// What is wrong with the name.
pub(super) fn check_netns_name(name: &str) -> Result<(), String> {
    let has_bad = name.contains(['/', '\0']) || [".", ".."].contains(&name);
    if !(1..=FILE_NAME_BYTES_MAX).contains(&name.len()) || has_bad {
        return Err(format!(
            "{name:?} is not a network namespace's name; give one of those that `ip netns list` shows, like \"blue\""
        ));
    }
    Ok(())
}

/// Empty where the machine has no id: then only names and paths tell identities apart.
pub(super) fn machine_id() -> String {
    std::fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_owned()
}
