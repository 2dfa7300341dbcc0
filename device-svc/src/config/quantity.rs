//! Sizes, durations and rates as people write them: `64K`, `"30s"`, `"400M"`.
//!
//! One spelling per value on the way out, so that what is shown can be pasted back. Units are binary (`K` is 1024), as
//! with the tools that make disk images; a rate in bytes uses the same letters per second.

use std::time::Duration;

/// The letters of a size, with how many bits each shifts.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// Units of a duration with their nanoseconds, the longest first.
const DURATION_UNITS: [(&str, u64); 5] =
    [("h", 3_600_000_000_000), ("m", 60_000_000_000), ("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)];

/// Parses a size in bytes: digits, then at most one of `K`, `M`, `G`, `T`.
///
/// # Errors
/// What is wrong with the text and how to write it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size; write bytes like 512, or 64K, 10G, 1T");
    let (digits, shift) = match text.chars().last() {
        Some(last) if !last.is_ascii_digit() => {
            let (_, shift) = UNITS.iter().find(|(letter, _)| *letter == last).ok_or_else(wrong)?;
            (&text[..text.len() - 1], *shift)
        }
        _ => (text, 0),
    };
    let count = parse_digits(digits).ok_or_else(wrong)?;
    count.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is beyond what 64 bits of bytes can count"))
}

/// A size in the largest unit that divides it.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    for (letter, shift) in UNITS {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{letter}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// Parses a duration: digits, then one of `us`, `ms`, `s`, `m`, `h`.
///
/// # Errors
/// What is wrong with the text and how to write it.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration; write a number and a unit, like \"30s\" or \"500ms\"");
    let unit_at = text.find(|character: char| !character.is_ascii_digit()).ok_or_else(wrong)?;
    let (digits, unit) = text.split_at(unit_at);
    let (_, unit_ns) = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
    let count = parse_digits(digits).ok_or_else(wrong)?;
    let nanoseconds = count.checked_mul(*unit_ns).ok_or_else(|| format!("{text:?} is too long a time"))?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// A duration in the largest unit that divides it; below a microsecond it rounds down, as nothing here is that short.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    for (name, unit_ns) in DURATION_UNITS {
        if nanoseconds != 0 && nanoseconds % unit_ns == 0 {
            return format!("{}{name}", nanoseconds / unit_ns);
        }
    }
    if nanoseconds == 0 { "0s".to_owned() } else { format!("{}us", nanoseconds / 1_000) }
}

/// Digits alone: `u64::from_str` would also take a sign.
fn parse_digits(digits: &str) -> Option<u64> {
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}
