//! One file of the disk tier.
//!
//! ```text
//! "SLUICEKV" | version u32 | header length u32 | header, JSON | floats, little-endian f32 | SHA-256 of all before
//! ```
//!
//! Two kinds: `KEY.state` is a checkpoint without its full pages, `KEY.pages` the full pages of some consecutive blocks, which name
//! those before them. So a long session that is parked turn after turn writes each page once. Files are written under another name
//! and renamed: a file that is torn all the same, by a crash of the machine, fails its checksum. No file holds tokens.

use super::super::chain::{Identity, Key};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"SLUICEKV";
const VERSION: u32 = 1;
/// Magic, version, length of the header.
const PREFIX_BYTES: usize = 16;
const CHECKSUM_BYTES: u64 = 32;
/// A header is a few hundred bytes; more is damage.
const HEADER_BYTES_MAX: u32 = 4096;
const BUFFER_FLOATS: usize = 1 << 16;
pub(crate) const UNFINISHED: &str = "unfinished";

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    State,
    Pages,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    pub kind: Kind,
    #[serde(with = "hexadecimal")]
    pub key: Key,
    /// Of a state: names the whole blocks before its open one.
    #[serde(with = "hexadecimal")]
    pub base: Key,
    /// Of a state: the checkpoint before it. Of pages: the pages before them.
    #[serde(with = "maybe_hexadecimal")]
    pub parent: Option<Key>,
    /// Of a state: its last full pages.
    #[serde(with = "maybe_hexadecimal")]
    pub pages: Option<Key>,
    /// Of pages: where they start. 0 for a state.
    pub tokens_from: usize,
    /// Where it ends.
    pub tokens: usize,
    pub floats: usize,
    pub identity: Identity,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error("is empty")]
    Empty,
    #[error("does not begin as a checkpoint does")]
    Magic,
    #[error("has format version {0}; this program reads {VERSION}")]
    Version(u32),
    #[error("has a damaged header: {0}")]
    Header(String),
    #[error("has {found} bytes where its header implies {expected}: torn or truncated")]
    Length { expected: u64, found: u64 },
    #[error("fails its checksum")]
    Checksum,
    #[error("bears another name than its contents")]
    Name,
    #[error("is of another {0}")]
    Foreign(&'static str),
    #[error("has other sizes than this model's")]
    Shape,
    #[error("needs pages that are gone or damaged")]
    Pages,
}

impl Kind {
    pub fn extension(self) -> &'static str {
        match self {
            Kind::State => "state",
            Kind::Pages => "pages",
        }
    }
}

pub(crate) fn path_of(dir: &Path, kind: Kind, key: Key) -> PathBuf {
    dir.join(format!("{}.{}", key.to_hex(), kind.extension()))
}

/// What the name of one of our files says; `None` for a file that is not ours.
pub(crate) fn name_of(path: &Path) -> Option<(Kind, Key)> {
    let key = Key::from_hex(path.file_stem()?.to_str()?)?;
    match path.extension()?.to_str()? {
        "state" => Some((Kind::State, key)),
        "pages" => Some((Kind::Pages, key)),
        _ => None,
    }
}

impl Header {
    /// `Err` names what is of another node.
    pub fn check_identity(&self, own: &Identity) -> Result<(), Fault> {
        let Identity { model, kernel, dtype } = &self.identity;
        for (what, found, own) in
            [("model", model, &own.model), ("kernel", kernel, &own.kernel), ("dtype", dtype, &own.dtype)]
        {
            if found != own {
                return Err(Fault::Foreign(what));
            }
        }
        Ok(())
    }

    fn file_bytes(&self, header_bytes: u32) -> Option<u64> {
        let floats = u64::try_from(self.floats).ok()?.checked_mul(size_of::<f32>() as u64)?;
        (PREFIX_BYTES as u64 + u64::from(header_bytes) + CHECKSUM_BYTES).checked_add(floats)
    }
}

/// Writes a file whole or not at all; answers with its size. `floats` are [`Header::floats`] together.
pub(crate) fn write<'a>(
    dir: &Path,
    header: &Header,
    floats: impl Iterator<Item = &'a [f32]>,
) -> io::Result<u64> {
    let path = path_of(dir, header.kind, header.key);
    let unfinished = path.with_extension(UNFINISHED);
    let written = write_to(&unfinished, header, floats).and_then(|bytes| {
        std::fs::rename(&unfinished, &path)?;
        Ok(bytes)
    });
    if written.is_err() {
        // It may not be there; if it is and stays, the next start sweeps it away.
        let _ = std::fs::remove_file(&unfinished);
    }
    written
}

fn write_to<'a>(path: &Path, header: &Header, floats: impl Iterator<Item = &'a [f32]>) -> io::Result<u64> {
    let json = serde_json::to_vec(header)?;
    let header_bytes = u32::try_from(json.len()).map_err(io::Error::other)?;
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut file = BufWriter::new(file);
    let mut hash = Sha256::new();
    let mut put = |bytes: &[u8]| {
        hash.update(bytes);
        file.write_all(bytes)
    };
    put(MAGIC)?;
    put(&VERSION.to_le_bytes())?;
    put(&header_bytes.to_le_bytes())?;
    put(&json)?;
    let mut buffer = Vec::with_capacity(BUFFER_FLOATS * size_of::<f32>());
    let mut count = 0;
    for part in floats.flat_map(|floats| floats.chunks(BUFFER_FLOATS)) {
        buffer.clear();
        part.iter().for_each(|float| buffer.extend_from_slice(&float.to_le_bytes()));
        put(&buffer)?;
        count += part.len();
    }
    assert_eq!(count, header.floats, "a header counts what follows it");
    file.write_all(&hash.finalize())?;
    file.flush()?;
    Ok(header.file_bytes(header_bytes).expect("a file that was written has a size"))
}

/// The header, where it agrees with the file's name and length; what follows is not read.
pub(crate) fn read_header(path: &Path) -> Result<(Header, u64), Fault> {
    let mut hash = Sha256::new();
    open(path, &mut hash).map(|(_, header, bytes)| (header, bytes))
}

/// The whole file, verified, if its floats are as many as `expect` says for its header.
pub(crate) fn read(
    path: &Path,
    expect: impl FnOnce(&Header) -> Result<usize, Fault>,
) -> Result<(Header, Vec<f32>), Fault> {
    let mut hash = Sha256::new();
    let (file, header, _) = open(path, &mut hash)?;
    // Before memory is taken for as many as the file claims.
    if expect(&header)? != header.floats {
        return Err(Fault::Shape);
    }
    let mut floats = Vec::with_capacity(header.floats);
    stream(file, header.floats, hash, |bytes| {
        let words = bytes.chunks_exact(4).map(|word| [word[0], word[1], word[2], word[3]]);
        floats.extend(words.map(f32::from_le_bytes));
    })?;
    Ok((header, floats))
}

/// Reads and verifies the whole file without keeping it.
pub(crate) fn verify(path: &Path) -> Result<(Header, u64), Fault> {
    let mut hash = Sha256::new();
    let (file, header, bytes) = open(path, &mut hash)?;
    stream(file, header.floats, hash, |_| {})?;
    Ok((header, bytes))
}

fn open(path: &Path, hash: &mut Sha256) -> Result<(File, Header, u64), Fault> {
    let mut file = File::open(path)?;
    let found = file.metadata()?.len();
    if found == 0 {
        return Err(Fault::Empty);
    }
    let short = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Fault::Length { expected: PREFIX_BYTES as u64, found },
        _ => Fault::Io(error),
    };
    let mut prefix = [0; PREFIX_BYTES];
    file.read_exact(&mut prefix).map_err(short)?;
    let word = |at: usize| {
        u32::from_le_bytes(prefix[at..at + 4].try_into().expect("four bytes are as many as a u32 has"))
    };
    if prefix[..8] != MAGIC[..] {
        return Err(Fault::Magic);
    }
    if word(8) != VERSION {
        return Err(Fault::Version(word(8)));
    }
    let header_bytes = word(12);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(Fault::Header(format!("it claims {header_bytes} bytes")));
    }
    let mut json = vec![0; header_bytes as usize];
    file.read_exact(&mut json).map_err(short)?;
    let header: Header = serde_json::from_slice(&json).map_err(|error| Fault::Header(error.to_string()))?;
    let expected = header.file_bytes(header_bytes).unwrap_or(u64::MAX);
    if expected != found {
        return Err(Fault::Length { expected, found });
    }
    if name_of(path) != Some((header.kind, header.key)) {
        return Err(Fault::Name);
    }
    hash.update(prefix);
    hash.update(&json);
    Ok((file, header, found))
}

fn stream(mut file: File, floats: usize, mut hash: Sha256, mut sink: impl FnMut(&[u8])) -> Result<(), Fault> {
    let mut buffer = vec![0; floats.min(BUFFER_FLOATS) * size_of::<f32>()];
    let mut left = floats * size_of::<f32>();
    while left > 0 {
        let part = left.min(buffer.len());
        file.read_exact(&mut buffer[..part])?;
        hash.update(&buffer[..part]);
        sink(&buffer[..part]);
        left -= part;
    }
    let mut checksum = [0; CHECKSUM_BYTES as usize];
    file.read_exact(&mut checksum)?;
    if hash.finalize()[..] != checksum[..] {
        return Err(Fault::Checksum);
    }
    Ok(())
}

mod hexadecimal {
    use super::Key;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(key: &Key, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&key.to_hex())
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Key, D::Error> {
        let text = String::deserialize(deserializer)?;
        Key::from_hex(&text).ok_or_else(|| D::Error::custom("a key has 64 hexadecimal digits"))
    }
}

mod maybe_hexadecimal {
    use super::Key;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(key: &Option<Key>, serializer: S) -> Result<S::Ok, S::Error> {
        key.map(Key::to_hex).serialize(serializer)
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Option<Key>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        let key = |text: String| {
            Key::from_hex(&text).ok_or_else(|| D::Error::custom("a key has 64 hexadecimal digits"))
        };
        text.map(key).transpose()
    }
}
