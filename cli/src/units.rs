//! Bytes, seconds and rates as people write and read them.

use std::time::Duration;

/// Reads `1GiB`, `64M`, `1.5 GB`, `4096`. `K`, `M`, `G`, `T` alone mean powers of 1024, as `KiB` does; `KB` means 1000.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(format!("{unit:?} is no unit; write for example 64MiB or 1GiB")),
    };
    let no_size = || format!("{text:?} is no size; write for example 64MiB or 1GiB");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(no_size);
    }
    let value = number.parse::<f64>().map_err(|_| no_size())? * factor as f64;
    // Above 2^53 a fraction of a unit means nothing, and a cast would round.
    if value.is_finite() && (0.0..9.0e15).contains(&value) { Ok(value as u64) } else { Err(no_size()) }
}

/// [`parse_bytes`], at least one byte.
pub(crate) fn parse_some_bytes(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("at least 1 byte is needed".into()),
        bytes => Ok(bytes),
    }
}

/// `1.50 GiB`, `17 B`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.995 would be shown as 1024.00.
    while value >= 1023.995 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.2} {}", UNITS[unit])
}

/// `1.53 GB/s`, `17.2 MB/s`: powers of 1000, as disks and buses are rated.
pub(crate) fn rate(count: u64, time: Duration) -> String {
    match gb_per_s(count, time) {
        rate if rate >= 0.1 => format!("{rate:.2} GB/s"),
        rate => format!("{:.1} MB/s", rate * 1e3),
    }
}

/// Bytes per nanosecond; 0 where no time passed.
pub(crate) fn gb_per_s(count: u64, time: Duration) -> f64 {
    let nanoseconds = time.as_nanos() as f64;
    if nanoseconds > 0.0 { count as f64 / nanoseconds } else { 0.0 }
}

/// `12.3 s`, `0.61 s`, `1.20 ms`, `850 ns`.
pub(crate) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 0.1 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s if s >= 1e-6 => format!("{:.1} µs", s * 1e6),
        s => format!("{:.0} ns", s * 1e9),
    }
}

/// `1 tensor`, `84 tensors`, `12,345 keys`.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(number), if number == 1 { "" } else { "s" })
}

/// `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, expected) in [
            ("0", 0),
            ("4096", 4096),
            ("1GiB", 1 << 30),
            ("1 gib", 1 << 30),
            ("64M", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("2GB", 2_000_000_000),
            ("0.5k", 512),
        ] {
            assert_eq!(parse_bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "GiB", "-1", "1XB", "1..5G", "1e3", "99999999999T", "nan", "inf"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
        assert!(parse_some_bytes("0").is_err());
    }

    #[test]
    fn sizes_times_and_counts_are_shown_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 20), "1.00 MiB");
        assert_eq!(bytes((1 << 20) - 1), "1.00 MiB");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
        assert_eq!(rate(1_500_000_000, Duration::from_secs(1)), "1.50 GB/s");
        assert_eq!(rate(17_200_000, Duration::from_secs(1)), "17.2 MB/s");
        assert_eq!(rate(1, Duration::ZERO), "0.0 MB/s");
        assert_eq!(seconds(Duration::from_micros(1500)), "1.50 ms");
        assert_eq!(seconds(Duration::from_nanos(850)), "850 ns");
        assert_eq!(count(1, "key"), "1 key");
        assert_eq!(count(1_234_567, "key"), "1,234,567 keys");
        assert_eq!(grouped(100), "100");
    }
}
