//! `sluice-node cache inspect`: what lies in a `--cache-dir`.

use crate::state::disk::{Contents, Found, inspect};
use anyhow::{Context, bail};
use clap::Subcommand;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List what lies in a cache folder, every file read whole and verified; a node may be using it meanwhile
    Inspect(InspectArgs),
}

#[derive(Debug, clap::Args)]
struct InspectArgs {
    /// Folder that a node was given as --cache-dir
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,

    /// Print one JSON object: files, totals
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let Command::Inspect(args) = args.command;
    let found = survey(&args.dir)?;
    let totals = Totals::of(&found);
    if args.json {
        println!("{}", serde_json::json!({ "files": json_of(&found), "totals": totals }));
        return Ok(());
    }
    println!(
        "{:16} {:>11} {:>19} {:>13} {:16} {:18} {:5} {:>9} VALID",
        "NAME", "KIND", "TOKENS", "BYTES", "MODEL", "KERNEL", "DTYPE", "AGE"
    );
    for file in &found {
        println!("{}", line_of(file));
    }
    let Totals { checkpoints, pages, invalid, bytes } = totals;
    println!("{checkpoints} checkpoints, {pages} files of pages, {invalid} invalid; {bytes} bytes");
    Ok(())
}

fn survey(dir: &Path) -> anyhow::Result<Vec<Found>> {
    let found = inspect(dir).map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!(
            "--dir {}: there is no such folder; name the one that a node was given as --cache-dir",
            dir.display()
        ),
        ErrorKind::NotADirectory => anyhow::anyhow!(
            "--dir {}: is a file; name the folder that a node was given as --cache-dir",
            dir.display()
        ),
        ErrorKind::PermissionDenied => anyhow::anyhow!(
            "--dir {}: not allowed; a cache folder is open to the node's own user only, run this as that user",
            dir.display()
        ),
        _ => anyhow::Error::new(error).context(format!("--dir {}", dir.display())),
    })?;
    let is_one = || std::fs::read_dir(dir).map(|mut entries| entries.next().is_none());
    if found.is_empty() && !dir.join("lock").is_file() && !is_one().context("the folder cannot be read")? {
        bail!(
            "--dir {}: holds other things and no cache; name the folder that a node was given as --cache-dir",
            dir.display()
        );
    }
    Ok(found)
}

#[derive(Debug, Default, PartialEq, Eq, serde::Serialize)]
struct Totals {
    checkpoints: usize,
    pages: usize,
    invalid: usize,
    bytes: u64,
}

impl Totals {
    fn of(found: &[Found]) -> Totals {
        let mut totals = Totals::default();
        for file in found {
            totals.bytes += file.bytes;
            match &file.contents {
                Err(_) => totals.invalid += 1,
                Ok(contents) if contents.is_checkpoint => totals.checkpoints += 1,
                Ok(_) => totals.pages += 1,
            }
        }
        totals
    }
}

fn kind_of(contents: &Contents) -> &'static str {
    if contents.is_checkpoint { "checkpoint" } else { "pages" }
}

fn json_of(found: &[Found]) -> Vec<serde_json::Value> {
    let json = |file: &Found| {
        let mut json = serde_json::json!({
            "file": file.name,
            "bytes": file.bytes,
            "age_s": file.age.as_secs(),
            "valid": file.contents.is_ok(),
        });
        match &file.contents {
            Err(reason) => json["reason"] = reason.clone().into(),
            Ok(contents) => {
                json["kind"] = kind_of(contents).into();
                json["tokens_from"] = contents.tokens_from.into();
                json["tokens"] = contents.tokens.into();
                json["model"] = contents.identity.model.clone().into();
                json["kernel"] = contents.identity.kernel.clone().into();
                json["dtype"] = contents.identity.dtype.clone().into();
            }
        }
        json
    };
    found.iter().map(json).collect()
}

fn line_of(file: &Found) -> String {
    let name: String = file.name.chars().take(12).collect();
    let age = age_of(file.age);
    match &file.contents {
        Err(reason) => {
            let extension = file.name.rsplit('.').next().unwrap_or_default();
            format!("{name:16} {extension:>11} {:>19} {:>13} {:41} {age:>9} no: {reason}", "", file.bytes, "")
        }
        Ok(contents) => {
            let tokens = format!("{}..{}", contents.tokens_from, contents.tokens);
            let model: String = contents.identity.model.chars().take(12).collect();
            format!(
                "{name:16} {:>11} {tokens:>19} {:>13} {model:16} {:18} {:5} {age:>9} yes",
                kind_of(contents),
                file.bytes,
                contents.identity.kernel,
                contents.identity.dtype
            )
        }
    }
}

/// In the largest unit that leaves a whole number.
fn age_of(age: Duration) -> String {
    match age.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_folder_is_an_error_that_teaches() {
        let folder = tempfile::tempdir().expect("a folder");
        let check = |path: &Path, hint: &str| {
            let error = survey(path).map(|_| ()).expect_err("it holds no cache").to_string();
            assert!(error.contains(hint) && error.contains("--cache-dir"), "{error}");
        };
        assert_eq!(Totals::of(&survey(folder.path()).expect("empty is a cache too")), Totals::default());
        check(&folder.path().join("nowhere"), "no such folder");
        std::fs::write(folder.path().join("notes.txt"), "").expect("written");
        check(&folder.path().join("notes.txt"), "is a file");
        check(folder.path(), "holds other things");
    }

    #[test]
    fn ages_are_short() {
        for (seconds, expect) in
            [(0, "0 s"), (119, "119 s"), (3600, "60 min"), (7200, "2 h"), (864_000, "10 d")]
        {
            assert_eq!(age_of(Duration::from_secs(seconds)), expect);
        }
    }
}
