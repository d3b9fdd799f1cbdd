//! What the tool says, to people or to programs.
//!
//! With `--json`, standard output carries exactly one document, an error's included; without, it carries what was asked
//! for. Progress and errors go to standard error.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::json;

use crate::failure::Failure;

/// How this run speaks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

/// What a command found out or did.
pub(crate) trait Report: Serialize {
    /// The report for people.
    fn human(&self, out: &mut dyn Write) -> io::Result<()>;
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Whether one JSON document is expected.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Whether a progress bar may be drawn.
    pub(crate) fn wants_progress(&self) -> bool {
        !self.quiet && !self.json
    }

    /// What was asked for: always shown.
    pub(crate) fn answer(&self, report: &impl Report) -> Result<(), Failure> {
        let mut out = io::BufWriter::new(io::stdout().lock());
        self.write(report, &mut out).map_err(stdout_failed)
    }

    /// That something was done: not shown when quiet, but for the JSON document.
    pub(crate) fn confirm(&self, report: &impl Report) -> Result<(), Failure> {
        if self.quiet && !self.json { Ok(()) } else { self.answer(report) }
    }

    fn write(&self, report: &impl Report, out: &mut dyn Write) -> io::Result<()> {
        if self.json {
            serde_json::to_writer_pretty(&mut *out, report)?;
            writeln!(out)?;
        } else {
            report.human(out)?;
        }
        out.flush()
    }

    /// Why the command failed and what to do next.
    pub(crate) fn failure(&self, failure: &Failure) {
        if matches!(failure, Failure::BrokenPipe | Failure::Reported) {
            return;
        }
        if self.json {
            let document = json!({ "error": error_value(failure) });
            let _ = writeln!(io::stdout(), "{document:#}");
        }
        let _ = writeln!(io::stderr(), "alight: {failure}");
        if let Some(remedy) = failure.remedy() {
            let _ = writeln!(io::stderr(), "  {remedy}");
        }
    }
}

/// A failure as programs read it.
pub(crate) fn error_value(failure: &Failure) -> serde_json::Value {
    json!({ "kind": failure.kind(), "message": failure.to_string(), "remedy": failure.remedy() })
}

/// The failure of a write to standard output.
pub(crate) fn stdout_failed(error: io::Error) -> Failure {
    Failure::io("write to", "standard output", error)
}

/// A key as programs read it: text, with the bytes in hexadecimal beside it where it is not UTF-8.
#[derive(Debug, Serialize)]
pub(crate) struct JsonKey {
    pub(crate) key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key_hex: Option<String>,
}

impl JsonKey {
    pub(crate) fn new(key: &[u8]) -> Self {
        match std::str::from_utf8(key) {
            Ok(text) => Self { key: text.to_owned(), key_hex: None },
            Err(_) => {
                let hex = key.iter().map(|byte| format!("{byte:02x}")).collect();
                Self { key: String::from_utf8_lossy(key).into_owned(), key_hex: Some(hex) }
            }
        }
    }
}

/// A key as people read it in a list: as it is, or quoted and escaped where it would confuse a terminal or a line.
pub(crate) fn plain_key(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => alight::DisplayKey::from(key).to_string(),
    }
}

/// Rows of text in columns; the first column to the left, the others to the right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Table {
    /// A table of which the first `left` columns hold words and the others figures.
    pub(crate) fn new(left: usize) -> Self {
        Self { rows: Vec::new(), left }
    }

    pub(crate) fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                if column < self.left {
                    line += &format!("{cell:width$}  ");
                } else {
                    line += &format!("{cell:>width$}  ");
                }
            }
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up_words_left_and_figures_right() {
        let mut table = Table::new(1);
        for row in [["what", "rate"], ["a longer one", "1"], ["é", "12345"]] {
            table.row(row);
        }
        let mut out = Vec::new();
        table.write(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "what           rate\na longer one      1\né             12345\n");
    }

    #[test]
    fn a_key_that_is_not_text_is_shown_escaped() {
        assert_eq!(plain_key("layers.0.w é".as_bytes()), "layers.0.w é");
        assert_eq!(plain_key(b"a\nb"), r#""a\nb""#);
        assert_eq!(plain_key(&[0xff]), r#""\xff""#);
        assert_eq!(JsonKey::new(&[0xff, 1]).key_hex.as_deref(), Some("ff01"));
        assert_eq!(JsonKey::new(b"a").key_hex, None);
    }
}
