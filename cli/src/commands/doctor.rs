//! `alight doctor`: what this machine can do for alight, and what to do about what it cannot.

use std::io::{self, Write};
use std::path::PathBuf;

use alight::{Answer, Capabilities, Capability};
use clap::Args;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, Report};

/// Lines are broken here, so that they stay whole in a terminal of usual width.
const WIDTH: usize = 100;

/// Arguments of `alight doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// A store, or any path that is to become one: its disk is looked at too.
    store: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Diagnosis {
    command: &'static str,
    store: Option<String>,
    verdict: String,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    answer: &'static str,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

pub(crate) fn run(args: &DoctorArgs, output: &Output) -> Result<(), Failure> {
    let capabilities = Capabilities::probe(args.store.as_deref());
    output.answer(&Diagnosis {
        command: "doctor",
        store: args.store.as_ref().map(|path| path.display().to_string()),
        verdict: capabilities.verdict().to_owned(),
        rows: capabilities.rows().iter().map(row).collect(),
    })
}

fn row(row: &Capability) -> Row {
    let answer = match row.answer {
        Answer::Yes => "yes",
        Answer::No => "no",
        Answer::Unknown => "unknown",
    };
    Row { name: row.name, answer, reason: row.reason.clone(), remedy: row.remedy.clone() }
}

impl Report for Diagnosis {
    fn human(&self, out: &mut dyn Write) -> io::Result<()> {
        let verdict = capitalised(&self.verdict);
        wrapped(out, "", "", &format!("{verdict}."))?;
        writeln!(out)?;
        let name_width = self.rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
        for Row { name, answer, reason, remedy } in &self.rows {
            // A question mark where nobody knows: it is not a no.
            let answer = if *answer == "unknown" { "?" } else { answer };
            let first = format!("{name:name_width$}  {answer:3}  ");
            let next = " ".repeat(name_width + 7);
            wrapped(out, &first, &next, reason)?;
            if let Some(remedy) = remedy {
                wrapped(out, &format!("{next}-> "), &format!("{next}   "), remedy)?;
            }
        }
        if self.store.is_none() {
            writeln!(out)?;
            writeln!(out, "`alight doctor STORE` looks at the disk of a store too.")?;
        }
        Ok(())
    }
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Writes words in lines of at most [`WIDTH`], the first after `first` and the others after `next`. A word is never broken.
fn wrapped(out: &mut dyn Write, first: &str, next: &str, text: &str) -> io::Result<()> {
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in text.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            writeln!(out, "{}", line.trim_end())?;
            next.clone_into(&mut line);
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    writeln!(out, "{}", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_by_people_is_aligned_and_says_what_to_do() {
        let long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen";
        let of = |name, answer, reason: &str, remedy: Option<&str>| Row {
            name,
            answer,
            reason: reason.to_owned(),
            remedy: remedy.map(str::to_owned),
        };
        let diagnosis = Diagnosis {
            command: "doctor",
            store: None,
            verdict: "no GPU can be used".into(),
            rows: vec![
                of("GPU", "no", "no driver", Some("install it")),
                of("O_DIRECT", "yes", long, None),
                of("udev", "unknown", "not asked", None),
            ],
        };
        let mut out = Vec::new();
        diagnosis.human(&mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let expected = "No GPU can be used.\n\n\
            GPU       no   no driver\n               -> install it\n\
            O_DIRECT  yes  one two three four five six seven eight nine ten eleven twelve thirteen fourteen\n               \
            fifteen sixteen\n\
            udev      ?    not asked\n\n`alight doctor STORE`";
        assert!(text.starts_with(expected), "{text}");
    }
}
