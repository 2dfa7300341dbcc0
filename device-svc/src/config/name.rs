//! What a volume, function or limit group may be called.

/// Names appear in metrics labels, log lines and commands, so they hold nothing that any of these would have to quote.
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
