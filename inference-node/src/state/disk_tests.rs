//! Files: what was stored comes back bit for bit or not at all.

use super::format::{self, Fault, Kind};
use super::*;
use crate::state::checkpoint::Segment;
use crate::state::{BLOCK_TOKENS, Page};
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

fn identity(model: &str) -> Identity {
    Identity { model: model.into(), kernel: "cpu-test".into(), dtype: "bf16".into() }
}

fn shape() -> StateShape {
    crate::state::tests::shape()
}

fn key(seed: u32) -> Key {
    identity("m").root("tenant").then(&[seed])
}

fn numbers(seed: u32, count: usize) -> Vec<f32> {
    (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) ^ seed) as f32).collect()
}

fn segment(seed: u32, blocks: std::ops::Range<usize>, parent: Option<Arc<Segment>>) -> Arc<Segment> {
    let page = |block: usize| Page::of(numbers(seed + block as u32, shape().page_floats()));
    Segment::new(key(seed), blocks.clone(), blocks.map(page).collect(), parent)
}

/// At `position`, on pages `0..1` and `1..`.
fn checkpoint(position: usize) -> (Place, Checkpoint) {
    let blocks = position / BLOCK_TOKENS;
    let trunk = segment(1, 0..1, None);
    let pages = if blocks > 1 { segment(2, 1..blocks, Some(trunk)) } else { trunk };
    let place = Place { key: key(position as u32 + 1000), base: pages.key, position };
    let state = numbers(position as u32, shape().checkpoint_floats(position));
    (place, Checkpoint { position, state, pages: Some(pages) })
}

const ROOM: u64 = 1 << 30;

fn open(dir: &Path, bytes: u64, model: &str) -> Folder {
    Folder::open(dir, bytes, identity(model), shape()).expect("the folder is free")
}

fn stored(dir: &Path, positions: &[usize]) -> Vec<Place> {
    let mut folder = open(dir, ROOM, "m");
    let store = |&position: &usize| {
        let (place, checkpoint) = checkpoint(position);
        folder.store(place, None, &checkpoint).expect("there is room");
        place
    };
    positions.iter().map(store).collect()
}

fn assert_same(loaded: &Checkpoint, expect: &Checkpoint) {
    assert_eq!((loaded.position, &loaded.state), (expect.position, &expect.state));
    let pages = |checkpoint: &Checkpoint| -> Vec<Vec<f32>> {
        let mut segments: Vec<_> = Segment::chain_of(checkpoint.pages.as_ref()).collect();
        segments.reverse();
        segments.iter().flat_map(|segment| segment.pages.iter().map(|page| page.0.to_vec())).collect()
    };
    assert_eq!(pages(loaded), pages(expect));
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| format::name_of(path).is_some());
    files.sort();
    files
}

#[test]
fn what_was_stored_comes_back_after_a_restart() {
    let dir = tempfile::tempdir().expect("a folder");
    let dir = dir.path().join("made/by/the/node");
    let positions = [64, 64 + 5, 192, 192 + 63];
    let places = stored(&dir, &positions);
    let mode = |path: &Path| std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!(mode(&dir), 0o700);
    assert!(files(&dir).iter().all(|path| mode(path) == 0o600));
    // Four states, the pages of the first block and of the next two: each once.
    assert_eq!(files(&dir).len(), 6);
    let mut folder = open(&dir, ROOM, "m");
    let mut found: Vec<Place> = folder.places().collect();
    found.sort_by_key(|place| place.position);
    assert_eq!(found, places);
    for (place, position) in places.into_iter().zip(positions) {
        let loaded = folder.load(place).map_err(|fault| fault.to_string()).expect("it is whole");
        assert_same(&loaded, &checkpoint(position).1);
    }
    let on_disk: u64 = files(&dir).iter().map(|path| std::fs::metadata(path).expect("there").len()).sum();
    assert_eq!(folder.bytes(), on_disk);
}

/// `damage` to the file of this kind; then the checkpoint must not be had, now and after a restart, nor anything else.
fn check_miss(name: &str, kind: Kind, damage: impl Fn(&Path)) {
    for restart_before in [false, true] {
        let dir = tempfile::tempdir().expect("a folder");
        let place = stored(dir.path(), &[192 + 7])[0];
        let file =
            files(dir.path()).into_iter().find(|path| path.extension() == Some(kind.extension().as_ref()));
        let file = file.expect("a file of the kind");
        let mut folder = if restart_before { None } else { Some(open(dir.path(), ROOM, "m")) };
        damage(&file);
        let mut folder = folder.take().unwrap_or_else(|| open(dir.path(), ROOM, "m"));
        let is_offered = folder.places().any(|offered| offered == place);
        assert!(folder.load(place).is_err(), "{name}");
        assert!(!folder.places().any(|offered| offered == place), "{name}: it is not offered again");
        assert_eq!(!folder.take_gone().is_empty(), is_offered, "{name}: the engine learns of it");
        // What was lost is written again.
        let (place, checkpoint) = checkpoint(192 + 7);
        folder.store(place, None, &checkpoint).expect("there is room");
        let loaded = folder.load(place).map_err(|fault| fault.to_string());
        assert_same(&loaded.unwrap_or_else(|fault| panic!("{name}: {fault}")), &checkpoint);
    }
}

#[test]
fn damaged_files_are_misses() {
    let edit = |change: fn(&mut Vec<u8>)| {
        move |path: &Path| {
            let mut bytes = std::fs::read(path).expect("readable");
            change(&mut bytes);
            std::fs::write(path, bytes).expect("writable");
        }
    };
    for kind in [Kind::State, Kind::Pages] {
        check_miss("gone", kind, |path| std::fs::remove_file(path).expect("it is there"));
        check_miss("empty", kind, edit(|bytes| bytes.clear()));
        check_miss("one byte", kind, edit(|bytes| bytes.truncate(1)));
        check_miss("torn in the header", kind, edit(|bytes| bytes.truncate(100)));
        check_miss("torn at the end", kind, edit(|bytes| bytes.truncate(bytes.len() - 1)));
        check_miss(
            "torn by zeros",
            kind,
            edit(|bytes| {
                let half = bytes.len() / 2;
                bytes[half..].fill(0);
            }),
        );
        check_miss("grown", kind, edit(|bytes| bytes.push(0)));
        check_miss("of another format", kind, edit(|bytes| bytes[8] += 1));
        check_miss("something else", kind, edit(|bytes| *bytes = b"#!/bin/sh\nexit 0\n".repeat(40)));
        check_miss("a header of gigabytes", kind, edit(|bytes| bytes[12..16].fill(0xFF)));
        check_miss("another's contents", kind, |path| {
            let other = tempfile::tempdir().expect("a folder");
            stored(other.path(), &[128 + 3]);
            let differs =
                |file: &PathBuf| file.extension() == path.extension() && file.file_name() != path.file_name();
            let other = files(other.path()).into_iter().find(differs);
            std::fs::copy(other.expect("a file of the kind"), path).expect("copied");
        });
    }
}

#[test]
fn files_of_another_model_are_left_alone_and_never_used() {
    let dir = tempfile::tempdir().expect("a folder");
    let place = stored(dir.path(), &[192])[0];
    let before = files(dir.path());
    {
        let mut folder = open(dir.path(), ROOM, "another");
        assert_eq!(folder.places().count(), 0);
        assert_eq!(files(dir.path()), before);
        // Even if it were asked for. It is not this node's to remove.
        let Err(fault) = folder.load(place) else { panic!("a foreign file was used") };
        assert!(matches!(fault, Fault::Foreign("model")), "{fault}");
    }
    assert!(open(dir.path(), ROOM, "m").load(place).is_ok());
    // They go first when there is no room.
    let mut folder = open(dir.path(), 40_000, "another");
    let (place, checkpoint) = checkpoint(64);
    folder.store(place, None, &checkpoint).expect("there is room once the others are gone");
    assert!(folder.bytes() <= 40_000);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever bytes change, in whichever file: a miss, or what was stored.
    #[test]
    fn flipped_bytes_are_never_taken_for_a_state(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1u8..), 1..4),
        restart_before in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().expect("a folder");
        let place = stored(dir.path(), &[192 + 7])[0];
        let mut folder = (!restart_before).then(|| open(dir.path(), ROOM, "m"));
        let mut changed = false;
        for (file, at, flip) in flips {
            let files = files(dir.path());
            let file = file.get(&files);
            let mut bytes = std::fs::read(file).expect("readable");
            // Half of them into the first bytes, where the header is.
            let at = at.index(bytes.len() * 2);
            let at = if at >= bytes.len() { at % 600 } else { at };
            bytes[at] ^= flip;
            std::fs::write(file, bytes).expect("writable");
            changed = true;
        }
        prop_assert!(changed);
        let mut folder = folder.take().unwrap_or_else(|| open(dir.path(), ROOM, "m"));
        if let Ok(loaded) = folder.load(place) {
            // Two flips may have undone each other.
            assert_same(&loaded, &checkpoint(192 + 7).1);
        }
    }
}

#[test]
fn the_limit_holds_and_pages_leave_with_the_last_who_needs_them() {
    let dir = tempfile::tempdir().expect("a folder");
    let one = {
        stored(&dir.path().join("measure"), &[256 + 63]);
        open(&dir.path().join("measure"), ROOM, "m").bytes()
    };
    let limit = one + one / 2;
    let mut folder = open(&dir.path().join("cache"), limit, "m");
    for position in (64..320).step_by(9) {
        let (place, checkpoint) = checkpoint(position / 192 * 192 + 64 + position % 64);
        folder.store(place, None, &checkpoint).expect("one has room");
        assert!(folder.bytes() <= limit);
    }
    assert!(!folder.take_gone().is_empty());
    drop(folder);
    let folder = open(&dir.path().join("cache"), 0, "m");
    assert_eq!((folder.bytes(), files(&dir.path().join("cache")).len()), (0, 0), "nothing is left behind");
}

/// What a checkpoint continues is part of what it needs: a limit that holds only the new part refuses it, and evicts nobody.
#[test]
fn the_limit_counts_what_a_checkpoint_stands_on() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut folder = open(dir.path(), 120_000, "m");
    let (trunk, on_trunk) = checkpoint(64);
    folder.store(trunk, None, &on_trunk).expect("there is room");
    let (place, large) = checkpoint(256 + 63);
    assert!(matches!(folder.store(place, None, &large), Err(StoreError::TooLarge { .. })));
    assert!(folder.bytes() <= 120_000 && folder.load(trunk).is_ok());
    drop(folder);
    let mut folder = open(dir.path(), 140_000, "m");
    folder.store(place, None, &large).expect("there is room");
    assert!(folder.bytes() <= 140_000 && folder.load(place).is_ok());
}

#[test]
fn what_a_crash_left_is_swept_away() {
    let dir = tempfile::tempdir().expect("a folder");
    stored(dir.path(), &[192]);
    let state = files(dir.path()).into_iter().find(|path| path.extension() == Some("state".as_ref()));
    let state = state.expect("a state");
    let unfinished = state.with_extension(format::UNFINISHED);
    std::fs::rename(&state, &unfinished).expect("renamed");
    std::fs::write(dir.path().join("notes.txt"), "not ours").expect("written");
    let folder = open(dir.path(), ROOM, "m");
    assert_eq!(folder.bytes(), 0, "pages that no state needs are gone");
    assert!(files(dir.path()).is_empty() && !unfinished.exists());
    assert!(dir.path().join("notes.txt").exists(), "what is not ours is not touched");
}

#[test]
fn a_folder_belongs_to_one_node_and_to_nobody_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let refuse = |dir: &Path| match Folder::open(dir, ROOM, identity("m"), shape()) {
        Ok(_) => panic!("it was to be refused"),
        Err(error) => error.to_string(),
    };
    let first = open(dir.path(), ROOM, "m");
    assert!(refuse(dir.path()).contains("used by another node"));
    drop(first);
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).expect("made");
    std::fs::write(shared.join("notes.txt"), "somebody's").expect("written");
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o755)).expect("changed");
    assert!(refuse(&shared).contains("chmod 700"));
    std::fs::remove_file(shared.join("notes.txt")).expect("removed");
    open(&shared, ROOM, "m");
    assert_eq!(std::fs::metadata(&shared).expect("there").permissions().mode() & 0o777, 0o700);
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("written");
    assert!(refuse(&file).contains("file"));
}

#[test]
fn inspection_names_what_is_wrong() {
    let dir = tempfile::tempdir().expect("a folder");
    stored(dir.path(), &[64, 192]);
    let all: Vec<Found> = inspect(dir.path()).expect("readable");
    assert_eq!(all.len(), 4);
    assert!(all.iter().all(|found| found.contents.is_ok()));
    let trunk = format::path_of(dir.path(), Kind::Pages, key(1));
    let mut bytes = std::fs::read(&trunk).expect("readable");
    *bytes.last_mut().expect("some") ^= 1;
    std::fs::write(&trunk, bytes).expect("writable");
    let faults: Vec<String> =
        inspect(dir.path()).expect("readable").into_iter().filter_map(|found| found.contents.err()).collect();
    assert_eq!(faults.iter().filter(|fault| fault.contains("checksum")).count(), 1);
    assert_eq!(
        faults.iter().filter(|fault| fault.contains("pages")).count(),
        3,
        "all stand on it: {faults:?}"
    );
}
