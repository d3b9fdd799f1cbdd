//! What can be asked of the tool: the commands and the options that all of them share.

use std::str::FromStr;

use alight::Device;
use clap::{Parser, Subcommand};

use crate::commands::backup::BackupArgs;
use crate::commands::bench::BenchArgs;
use crate::commands::compact::CompactArgs;
use crate::commands::demo::DemoArgs;
use crate::commands::doctor::DoctorArgs;
use crate::commands::export::ExportArgs;
use crate::commands::get::GetArgs;
use crate::commands::import::ImportArgs;
use crate::commands::load::LoadArgs;
use crate::commands::ls::LsArgs;
use crate::commands::put::PutArgs;
use crate::commands::repair::RepairArgs;
use crate::commands::rm::RmArgs;
use crate::commands::stat::StatArgs;
use crate::commands::verify::VerifyArgs;

/// Put tensors by key, get them by key into GPU memory, verified.
///
/// A store is one directory. Everything works without a GPU too: then a get lands in host memory.
#[derive(Debug, Parser)]
#[command(
    name = "alight",
    version,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 fine, 1 damaged, missing or failed, 2 wrong usage.\nStart with: alight demo"
)]
pub(crate) struct Args {
    /// Print one JSON document on standard output instead of text.
    #[arg(long, global = true)]
    pub(crate) json: bool,

    /// Print nothing but what was asked for: no progress, no confirmations.
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the whole way on this machine: put a small model, open it again, get it, compare every byte.
    Demo(DemoArgs),
    /// Put the tensors of safetensors files, all or nothing.
    Import(ImportArgs),
    /// Write tensors to a safetensors file.
    Export(ExportArgs),
    /// Put a file, or standard input, under a key.
    Put(PutArgs),
    /// Write a value's bytes to a file or to standard output.
    Get(GetArgs),
    /// Get every tensor onto a device, verified, and say how fast that was.
    Load(LoadArgs),
    /// List keys.
    Ls(LsArgs),
    /// Delete keys, all or nothing.
    Rm(RmArgs),
    /// Show how large a store is and what it holds.
    Stat(StatArgs),
    /// Give back the space of what was replaced or deleted, by copying what lives where that is worth it.
    Compact(CompactArgs),
    /// Read everything, check every checksum, and name what is damaged.
    Verify(VerifyArgs),
    /// Make a second store with everything in it, while the first one goes on.
    Backup(BackupArgs),
    /// Salvage what is whole of a damaged store into a new one, and name the rest.
    Repair(RepairArgs),
    /// Measure puts and gets beside what the disk itself gives in the same run.
    Bench(BenchArgs),
    /// Say what this machine can do, and what to do about what it cannot: GPU, cuFile, disk, kernel.
    Doctor(DoctorArgs),
}

/// A device as the command line names it; opened only when the command comes to use it.
#[derive(Debug, Clone)]
pub(crate) struct DeviceName(String);

impl DeviceName {
    pub(crate) fn open(&self) -> alight::Result<Device> {
        self.0.parse()
    }
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let ordinal = name.strip_prefix("cuda:");
        let known = matches!(name, "auto" | "host" | "cpu" | "cuda")
            || ordinal.is_some_and(|ordinal| {
                ordinal.bytes().all(|byte| byte.is_ascii_digit()) && ordinal.parse::<u32>().is_ok()
            });
        if known { Ok(Self(name.to_owned())) } else { Err("use auto, host, cuda or cuda:N".into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_fit_together() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_device_that_cannot_exist_is_refused_before_it_is_opened() {
        for name in ["auto", "host", "cpu", "cuda", "cuda:0", "cuda:12"] {
            assert!(name.parse::<DeviceName>().is_ok(), "{name}");
        }
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:99999999999", "CUDA"] {
            assert!(name.parse::<DeviceName>().is_err(), "{name}");
        }
    }
}
