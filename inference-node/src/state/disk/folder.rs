//! The folder of the disk tier: which files are there, what each is worth, and that they stay within their limit.
//!
//! Owned by the one thread that touches the disk. A file that is not whole, or not what its name says, is removed when it is met;
//! files of other models or kernels are kept, count towards the limit, and go first because nobody uses them. What is not named like
//! one of ours is never touched.

use super::super::chain::{Identity, Key};
use super::super::checkpoint::{Checkpoint, Segment};
use super::super::index::Place;
use super::super::prefixes::value;
use super::super::{BLOCK_TOKENS, Page, StateShape};
use super::format::{self, Fault, Header, Kind};
use std::collections::HashMap;
use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Why the folder cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{} can be entered by others (mode {mode:o}) and holds other things: name a folder of its own, or chmod 700 it",
        path.display()
    )]
    Open { path: PathBuf, mode: u32 },
    #[error("{} is a file: name a folder, or one that is not there yet", path.display())]
    File { path: PathBuf },
    #[error("{} is used by another node: give each node a folder of its own", path.display())]
    Taken { path: PathBuf },
}

/// Why a checkpoint was not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("it has {bytes} bytes, more than the limit of the disk cache")]
    TooLarge { bytes: u64 },
    #[error(transparent)]
    Io(#[from] io::Error),
}

pub(crate) struct Folder {
    dir: PathBuf,
    identity: Identity,
    shape: StateShape,
    bytes_max: u64,
    states: HashMap<Key, StateFile>,
    segments: HashMap<Key, SegmentFile>,
    bytes: u64,
    /// Removed since they were last asked for.
    gone: Vec<Place>,
    /// Held as long as the folder is in use.
    _lock: File,
}

struct StateFile {
    place: Place,
    bytes: u64,
    parent: Option<Key>,
    pages: Option<Key>,
    used: SystemTime,
    is_own: bool,
}

struct SegmentFile {
    bytes: u64,
    parent: Option<Key>,
    /// States and segments that need it.
    holders: usize,
}

const LOCK_FILE: &str = "lock";
/// What a file takes beside its floats, at most.
const FILE_BYTES_EXTRA: u64 = 8 << 10;

impl Folder {
    /// Makes the folder if it is not there, and learns what lies in it.
    pub fn open(
        dir: &Path,
        bytes_max: u64,
        identity: Identity,
        shape: StateShape,
    ) -> Result<Folder, FolderError> {
        let io = |source| FolderError::Io { path: dir.to_owned(), source };
        if dir.is_file() {
            return Err(FolderError::File { path: dir.to_owned() });
        }
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        close_to_others(dir)?;
        let lock = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(dir.join(LOCK_FILE))
            .map_err(io)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => FolderError::Taken { path: dir.to_owned() },
            TryLockError::Error(source) => io(source),
        })?;
        let mut folder = Folder {
            dir: dir.to_owned(),
            identity,
            shape,
            bytes_max,
            states: HashMap::new(),
            segments: HashMap::new(),
            bytes: 0,
            gone: Vec::new(),
            _lock: lock,
        };
        folder.survey().map_err(io)?;
        folder.make_room(0);
        folder.gone.clear();
        Ok(folder)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What this node may load.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.states.values().filter(|state| state.is_own).map(|state| state.place)
    }

    /// What has left the disk since the last call.
    pub fn take_gone(&mut self) -> Vec<Place> {
        std::mem::take(&mut self.gone)
    }

    pub fn store(
        &mut self,
        place: Place,
        parent: Option<Key>,
        checkpoint: &Checkpoint,
    ) -> Result<(), StoreError> {
        if let Some(state) = self.states.get_mut(&place.key) {
            state.used = SystemTime::now();
            return Ok(());
        }
        let chain = Segment::chain_of(checkpoint.pages.as_ref());
        let missing: Vec<&Arc<Segment>> =
            chain.take_while(|segment| !self.segments.contains_key(&segment.key)).collect();
        let bytes = checkpoint.state_bytes()
            + missing.iter().map(|segment| segment.bytes()).sum::<u64>()
            + (missing.len() as u64 + 1) * FILE_BYTES_EXTRA;
        let foundation = match missing.last() {
            Some(first) => first.parent.as_ref().map(|parent| parent.key),
            None => checkpoint.pages.as_ref().map(|pages| pages.key),
        };
        let bytes_with_foundation = bytes + self.chain_bytes(foundation);
        if bytes_with_foundation > self.bytes_max {
            return Err(StoreError::TooLarge { bytes: bytes_with_foundation });
        }
        // Else making room could take away the pages that the new ones continue.
        self.hold(foundation);
        self.make_room(bytes);
        let written = self.write(place, parent, checkpoint, &missing);
        if written.is_err() {
            missing.iter().for_each(|segment| self.remove_segment(segment.key));
        }
        self.let_go(foundation);
        written
    }

    /// Reads a checkpoint and every page of it. One that is not as it should be is removed.
    pub fn load(&mut self, place: Place) -> Result<Checkpoint, Fault> {
        let loaded = self.read(place);
        match &loaded {
            Ok(_) => self.touch(place.key),
            Err(Fault::Foreign(_)) => {}
            Err(_) => self.remove_state(place.key),
        }
        loaded
    }

    fn read(&mut self, place: Place) -> Result<Checkpoint, Fault> {
        let shape = self.shape;
        let (header, state) = format::read(&format::path_of(&self.dir, Kind::State, place.key), |header| {
            header.check_identity(&self.identity)?;
            if (header.tokens, header.base) != (place.position, place.base) {
                return Err(Fault::Shape);
            }
            Ok(shape.checkpoint_floats(header.tokens))
        })?;
        let has_pages = shape.page_floats() > 0 && header.tokens >= BLOCK_TOKENS;
        if has_pages != header.pages.is_some() {
            return Err(Fault::Shape);
        }
        let mut end = header.tokens - header.tokens % BLOCK_TOKENS;
        let mut parts = Vec::new();
        let mut next = header.pages;
        while let Some(key) = next {
            let part = self.read_pages(key, end);
            let (header, pages) = part.map_err(|fault| {
                let file = format::path_of(&self.dir, Kind::Pages, key);
                tracing::warn!(file = %file.display(), "the cache file {fault}: it is removed");
                self.discard_segment(key);
                Fault::Pages
            })?;
            end = header.tokens_from;
            next = header.parent;
            parts.push((header, pages));
        }
        if has_pages && end != 0 {
            return Err(Fault::Pages);
        }
        let pages = parts.into_iter().rev().fold(None, |parent, (header, pages)| {
            let blocks = header.tokens_from / BLOCK_TOKENS..header.tokens / BLOCK_TOKENS;
            Some(Segment::new(header.key, blocks, pages, parent))
        });
        Ok(Checkpoint { position: header.tokens, state, pages })
    }

    /// Pages that end at `end`.
    fn read_pages(&self, key: Key, end: usize) -> Result<(Header, Vec<Page>), Fault> {
        let page_floats = self.shape.page_floats();
        let (header, floats) = format::read(&format::path_of(&self.dir, Kind::Pages, key), |header| {
            header.check_identity(&self.identity)?;
            let from = header.tokens_from;
            let on_grid = from.is_multiple_of(BLOCK_TOKENS) && end.is_multiple_of(BLOCK_TOKENS);
            if header.tokens != end || from >= end || !on_grid || header.parent.is_some() != (from > 0) {
                return Err(Fault::Shape);
            }
            Ok((end - from) / BLOCK_TOKENS * page_floats)
        })?;
        let pages = floats.chunks_exact(page_floats).map(|page| Page::of(page.to_vec())).collect();
        Ok((header, pages))
    }

    fn write(
        &mut self,
        place: Place,
        parent: Option<Key>,
        checkpoint: &Checkpoint,
        missing: &[&Arc<Segment>],
    ) -> Result<(), StoreError> {
        for segment in missing.iter().rev() {
            let parent = segment.parent.as_ref().map(|parent| parent.key);
            let header = Header {
                kind: Kind::Pages,
                key: segment.key,
                base: segment.key,
                parent,
                pages: None,
                tokens_from: segment.blocks.start * BLOCK_TOKENS,
                tokens: segment.blocks.end * BLOCK_TOKENS,
                floats: segment.pages.iter().map(|page| page.0.len()).sum(),
                identity: self.identity.clone(),
            };
            let bytes = format::write(&self.dir, &header, segment.pages.iter().map(|page| &page.0[..]))?;
            self.bytes += bytes;
            self.segments.insert(segment.key, SegmentFile { bytes, parent, holders: 0 });
        }
        let pages = checkpoint.pages.as_ref().map(|pages| pages.key);
        let header = Header {
            kind: Kind::State,
            key: place.key,
            base: place.base,
            parent,
            pages,
            tokens_from: 0,
            tokens: checkpoint.position,
            floats: checkpoint.state.len(),
            identity: self.identity.clone(),
        };
        let bytes = format::write(&self.dir, &header, std::iter::once(&checkpoint.state[..]))?;
        self.bytes += bytes;
        let state = StateFile { place, bytes, parent, pages, used: SystemTime::now(), is_own: true };
        self.states.insert(place.key, state);
        self.hold(pages);
        Ok(())
    }

    /// Removes what is worth least until there is room for `bytes` more.
    fn make_room(&mut self, bytes: u64) {
        if self.bytes + bytes <= self.bytes_max {
            return;
        }
        let now = SystemTime::now();
        let mut ranked: Vec<(f64, Key)> =
            self.states.iter().map(|(&key, state)| (self.value(state, now), key)).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (_, key) in ranked {
            if self.bytes + bytes <= self.bytes_max {
                return;
            }
            self.remove_state(key);
        }
    }

    fn value(&self, state: &StateFile, now: SystemTime) -> f64 {
        if !state.is_own {
            return 0.0;
        }
        let before = state.parent.and_then(|parent| self.states.get(&parent));
        let saved = state.place.position.saturating_sub(before.map_or(0, |state| state.place.position));
        let last = state.pages.and_then(|pages| self.segments.get(&pages));
        let pages = last.filter(|last| last.holders == 1).map_or(0, |last| last.bytes);
        value(saved, now.duration_since(state.used).unwrap_or_default(), state.bytes + pages)
    }

    /// Used now: the file remembers it for the next start.
    fn touch(&mut self, key: Key) {
        let Some(state) = self.states.get_mut(&key) else { return };
        state.used = SystemTime::now();
        let file = File::options().write(true).open(format::path_of(&self.dir, Kind::State, key));
        // Nothing but the order of eviction after a restart depends on it.
        let _ = file.and_then(|file| file.set_modified(state.used));
    }

    fn remove_state(&mut self, key: Key) {
        let Some(state) = self.states.remove(&key) else { return };
        self.remove_file(Kind::State, key, state.bytes);
        self.let_go(state.pages);
        if state.is_own {
            self.gone.push(state.place);
        }
    }

    /// Removes pages that are damaged, whoever needs them: checkpoints that do are found out when they are loaded.
    fn discard_segment(&mut self, key: Key) {
        if let Some(segment) = self.segments.remove(&key) {
            self.remove_file(Kind::Pages, key, segment.bytes);
            self.let_go(segment.parent);
        }
    }

    fn remove_segment(&mut self, key: Key) {
        if let Some(segment) = self.segments.remove(&key) {
            self.remove_file(Kind::Pages, key, segment.bytes);
        }
    }

    fn remove_file(&mut self, kind: Kind, key: Key, bytes: u64) {
        self.bytes -= bytes;
        let path = format::path_of(&self.dir, kind, key);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a cache file cannot be removed");
            }
            _ => {}
        }
    }

    /// Of `last` and all that it stands on.
    fn chain_bytes(&self, last: Option<Key>) -> u64 {
        let segment = |key: Option<Key>| key.and_then(|key| self.segments.get(&key));
        // A damaged header could name itself.
        std::iter::successors(segment(last), |last| segment(last.parent))
            .take(self.segments.len())
            .map(|segment| segment.bytes)
            .sum()
    }

    /// As [`Segment::hold`], for files.
    fn hold(&mut self, last: Option<Key>) {
        let mut next = last;
        while let Some(segment) = next.and_then(|key| self.segments.get_mut(&key)) {
            segment.holders += 1;
            next = segment.parent.filter(|_| segment.holders == 1);
        }
    }

    /// The reverse of [`Folder::hold`]: pages that nobody needs any more are removed.
    fn let_go(&mut self, last: Option<Key>) {
        let mut next = last;
        while let Some(key) = next
            && let Some(segment) = self.segments.get_mut(&key)
        {
            segment.holders = segment.holders.saturating_sub(1);
            next = segment.parent.filter(|_| segment.holders == 0);
            if segment.holders == 0 {
                self.remove_segment(key);
            }
        }
    }

    /// Reads the headers of what lies there.
    fn survey(&mut self) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if is_unfinished(&path) {
                let _ = std::fs::remove_file(&path);
            }
            if name_of_ours(&path).is_none() {
                continue;
            }
            match format::read_header(&path) {
                Ok((header, bytes)) => self.adopt(&path, header, bytes),
                Err(fault) => {
                    tracing::warn!(file = %path.display(), "the cache file {fault}: it is removed");
                    let _ = std::fs::remove_file(&path);
                }
            }
        }
        let states: Vec<(Key, Option<Key>)> = self.states.iter().map(|(&key, s)| (key, s.pages)).collect();
        for (_, pages) in &states {
            self.hold(*pages);
        }
        for (key, pages) in states {
            if !self.chain_is_whole(pages) {
                self.remove_state(key);
            }
        }
        let orphans: Vec<Key> =
            self.segments.iter().filter(|(_, segment)| segment.holders == 0).map(|(&key, _)| key).collect();
        orphans.into_iter().for_each(|key| self.remove_segment(key));
        Ok(())
    }

    fn adopt(&mut self, path: &Path, header: Header, bytes: u64) {
        self.bytes += bytes;
        if header.kind == Kind::Pages {
            self.segments.insert(header.key, SegmentFile { bytes, parent: header.parent, holders: 0 });
            return;
        }
        let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified());
        let state = StateFile {
            place: Place { key: header.key, base: header.base, position: header.tokens },
            bytes,
            parent: header.parent,
            pages: header.pages,
            used: modified.unwrap_or(SystemTime::UNIX_EPOCH),
            is_own: header.check_identity(&self.identity).is_ok(),
        };
        self.states.insert(header.key, state);
    }

    fn chain_is_whole(&self, pages: Option<Key>) -> bool {
        let mut next = pages;
        // A damaged header could name itself.
        for _ in 0..=self.segments.len() {
            let Some(key) = next else { return true };
            let Some(segment) = self.segments.get(&key) else { return false };
            next = segment.parent;
        }
        false
    }
}

fn name_of_ours(path: &Path) -> Option<(Kind, Key)> {
    format::name_of(path).filter(|_| path.is_file())
}

fn is_unfinished(path: &Path) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    path.extension().is_some_and(|extension| extension == format::UNFINISHED)
        && stem.and_then(Key::from_hex).is_some()
}

/// A folder that others can enter is closed to them, if it is ours alone.
fn close_to_others(dir: &Path) -> Result<(), FolderError> {
    let io = |source| FolderError::Io { path: dir.to_owned(), source };
    let mode = std::fs::metadata(dir).map_err(io)?.permissions().mode() & 0o777;
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let is_new = std::fs::read_dir(dir).map_err(io)?.next().is_none();
    if !is_new && !dir.join(LOCK_FILE).is_file() {
        return Err(FolderError::Open { path: dir.to_owned(), mode });
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700)).map_err(io)
}

/// One file, as `sluice-node cache inspect` shows it.
pub struct Found {
    pub name: String,
    pub bytes: u64,
    pub age: Duration,
    pub contents: Result<Contents, String>,
}

pub struct Contents {
    /// A checkpoint, or pages that checkpoints share.
    pub is_checkpoint: bool,
    /// First and last token it covers.
    pub tokens_from: usize,
    pub tokens: usize,
    pub identity: Identity,
}

/// Everything in a cache folder, read whole and verified. Changes nothing, so it may run beside a node.
pub fn inspect(dir: &Path) -> io::Result<Vec<Found>> {
    let mut headers = Vec::new();
    let now = SystemTime::now();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if name_of_ours(&path).is_none() {
            continue;
        }
        // One that a running node has just evicted is not there any more.
        let Ok(metadata) = std::fs::metadata(&path) else { continue };
        let used = metadata.modified().unwrap_or(now);
        let age = now.duration_since(used).unwrap_or_default();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        headers.push((name, metadata.len(), age, format::verify(&path).map(|(header, _)| header)));
    }
    let sound: HashMap<Key, Header> = headers
        .iter()
        .filter_map(|(.., header)| header.as_ref().ok())
        .filter(|header| header.kind == Kind::Pages)
        .map(|header| (header.key, header.clone()))
        .collect();
    let mut found: Vec<Found> = headers
        .into_iter()
        .map(|(name, bytes, age, header)| {
            let whole = header.and_then(|header| match pages_are_there(&header, &sound) {
                true => Ok(header),
                false => Err(Fault::Pages),
            });
            let contents = whole.map_err(|fault| fault.to_string()).map(|header| Contents {
                is_checkpoint: header.kind == Kind::State,
                tokens_from: header.tokens_from,
                tokens: header.tokens,
                identity: header.identity,
            });
            Found { name, bytes, age, contents }
        })
        .collect();
    found.sort_by(|a, b| (a.age, &a.name).cmp(&(b.age, &b.name)));
    Ok(found)
}

/// Whether every page that `header` stands on is among `sound`, down to the first token.
fn pages_are_there(header: &Header, sound: &HashMap<Key, Header>) -> bool {
    let (mut next, mut end) = match header.kind {
        Kind::State => (header.pages, header.tokens - header.tokens % BLOCK_TOKENS),
        Kind::Pages => (header.parent, header.tokens_from),
    };
    if next.is_none() {
        // A model without softmax layers has no pages.
        return header.kind == Kind::State || end == 0;
    }
    while let Some(key) = next {
        let Some(pages) = sound.get(&key).filter(|pages| pages.tokens == end && pages.tokens_from < end)
        else {
            return false;
        };
        (next, end) = (pages.parent, pages.tokens_from);
    }
    end == 0
}
