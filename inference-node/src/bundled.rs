//! The bundled model: a small real checkpoint inside the binary, so that a first start needs no download.
//!
//! It is unpacked once and then memory-mapped like any other model directory.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// The name requests use.
pub const NAME: &str = "sluice-demo";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../models/sluice-demo/", $name)).as_slice())),*]
    };
}

const FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "model.safetensors"
];

/// Writes the model under `models_dir` and returns its directory. Files that are there and whole are left alone;
/// a torn or changed one is replaced in one step, so a crash leaves either the old file or the new one.
pub fn unpack(models_dir: &Path) -> io::Result<PathBuf> {
    let directory = models_dir.join(NAME);
    fs::create_dir_all(&directory)?;
    for (name, bytes) in FILES {
        let path = directory.join(name);
        if fs::read(&path).is_ok_and(|found| found == *bytes) {
            continue;
        }
        let partial = directory.join(format!(".{name}.partial"));
        fs::write(&partial, bytes)?;
        fs::rename(&partial, &path)?;
    }
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_file_is_replaced() {
        let folder = tempfile::tempdir().expect("a folder");
        let directory = unpack(folder.path()).expect("unpacked");
        let weights = directory.join("model.safetensors");
        let whole = fs::read(&weights).expect("weights");
        fs::write(&weights, &whole[..1000]).expect("torn");
        unpack(folder.path()).expect("unpacked again");
        assert!(fs::read(&weights).expect("weights") == whole);
    }
}
