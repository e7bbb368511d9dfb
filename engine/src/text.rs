//! Tables and numbers for people.

use std::fmt::Write as _;

/// Columns that a text takes on a terminal: two for East Asian wide characters, none for combining marks.
pub fn width(text: &str) -> usize {
    text.chars()
        .map(|character| match u32::from(character) {
            0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
            0x1100..=0x115f | 0x2e80..=0xa4cf | 0xac00..=0xd7a3 | 0xf900..=0xfaff | 0xfe30..=0xfe6f | 0xff00..=0xff60 => 2,
            0xffe0..=0xffe6 | 0x1f300..=0x1f64f | 0x1f900..=0x1f9ff | 0x20000..=0x3fffd => 2,
            _ => 1,
        })
        .sum()
}

/// `text` on one line and at most `columns` wide, cut with an ellipsis.
pub fn clip(text: &str, columns: usize) -> String {
    let line: String = text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect();
    if width(&line) <= columns {
        return line;
    }
    let mut cut = String::new();
    for character in line.chars() {
        if width(&cut) + width(character.encode_utf8(&mut [0; 4])) + 1 > columns {
            break;
        }
        cut.push(character);
    }
    cut.push('…');
    cut
}

/// An aligned table, columns two spaces apart, no trailing spaces. Rows may be shorter than the heading.
pub fn table(columns: &[&str], rows: &[Vec<String>]) -> String {
    let cell = |row: &[String], at: usize| row.get(at).map_or(0, |text| width(text));
    let widths: Vec<usize> =
        (0..columns.len()).map(|at| rows.iter().map(|row| cell(row, at)).chain([width(columns[at])]).max().unwrap_or(0)).collect();
    let heading: Vec<String> = columns.iter().map(|column| (*column).to_owned()).collect();
    let mut out = String::new();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (text, columns) in row.iter().zip(&widths) {
            line.push_str(text);
            line.extend(std::iter::repeat_n(' ', columns.saturating_sub(width(text)) + 2));
        }
        let _ = writeln!(out, "{}", line.trim_end());
    }
    out
}

/// A number with four significant digits: `0.1234`, `12.34`, `1,234`, `1.2e-6`.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if value == value.trunc() && size < 1e15 {
        let digits = crate::thousands(size as u64);
        return if value < 0.0 { format!("-{digits}") } else { digits };
    }
    match size {
        _ if !value.is_finite() => value.to_string(),
        _ if size >= 1000.0 => format!("{}{}", if value < 0.0 { "-" } else { "" }, crate::thousands(size.round() as u64)),
        _ if size >= 100.0 => format!("{value:.1}"),
        _ if size >= 10.0 => format!("{value:.2}"),
        _ if size >= 1.0 => format!("{value:.3}"),
        _ if size >= 1e-3 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

/// A duration: `0.03 s`, `12.3 s`, `4 min 10 s`, `2 h 05 min`.
pub fn seconds(value: f64) -> String {
    let whole = value.max(0.0).round() as u64;
    match whole {
        _ if value < 1.0 => format!("{value:.2} s"),
        _ if value < 60.0 => format!("{value:.1} s"),
        _ if whole < 3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A size: `512 B`, `1.5 MiB`.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (0..UNITS.len() - 1).find(|step| value >> (10 * (step + 1)) == 0).unwrap_or(UNITS.len() - 1);
    if step == 0 { format!("{value} B") } else { format!("{:.1} {}", value as f64 / (1u64 << (10 * step)) as f64, UNITS[step]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_characters_keep_columns_aligned() {
        let text = table(&["a", "b"], &[vec!["机器".into(), "x".into()], vec!["ab".into(), "y".into()]]);
        assert_eq!(text, "a     b\n机器  x\nab    y\n");
        assert_eq!(clip("机器学习", 5), "机器…");
        assert_eq!(clip("a\nb", 5), "a b");
    }

    #[test]
    fn numbers_keep_four_digits() {
        let texts = [0.0, 0.123456, 1.23456, 12.3456, 123.456, 1234.56, -1234.0, 1.5e-6, f64::NAN].map(number);
        assert_eq!(texts, ["0", "0.1235", "1.235", "12.35", "123.5", "1,235", "-1,234", "1.5e-6", "NaN"]);
    }

    #[test]
    fn durations_and_sizes() {
        assert_eq!([0.031, 12.34, 250.0, 7500.0].map(seconds), ["0.03 s", "12.3 s", "4 min 10 s", "2 h 05 min"]);
        assert_eq!([0, 1023, 1024, 1 << 20, 3 << 29].map(bytes), ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "1.5 GiB"]);
    }
}
