//! `alight`: the command-line tool of the alight tensor store.
//!
//! It uses the library's public API alone. Standard output carries what was asked for, and with `--json` exactly one
//! JSON document; standard error carries progress and errors. It exits with 0 when all is well, 1 when the store is
//! damaged, a key is missing or anything else failed, and 2 when it was called wrongly.

mod args;
mod bench;
mod commands;
mod failure;
mod interrupt;
mod model;
mod output;
mod pattern;
mod place;
mod progress;
mod safetensors;
mod source;
mod target;
mod units;
mod window;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::Args;
use crate::failure::Failure;
use crate::output::Output;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return answer_unparsed(&error),
    };
    let output = Output::new(args.json, args.quiet);
    let outcome = commands::run(args.command, &output);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            failure.exit_code()
        }
    }
}

/// Help and version as they are; wrong usage with exit code 2, as JSON where the arguments ask for it.
fn answer_unparsed(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        // A reader that went away is no news: `alight --help | head -1`.
        let _ = error.print();
        return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
    }
    let rendered = error.to_string();
    let failure = Failure::usage(rendered.strip_prefix("error: ").unwrap_or(&rendered).trim_end());
    Output::new(std::env::args_os().any(|arg| arg == "--json"), false).failure(&failure);
    failure.exit_code()
}
