//! The cache with real models: a sequence that starts from a checkpoint computes what a cold one does, bit for bit.

use super::super::{BLOCK_TOKENS, CacheLimits, Page, StateCache};
use super::*;
use crate::model::{LoadOptions, Logits, Model, Runner, Span};
use proptest::prelude::*;
use std::path::Path;
use std::sync::OnceLock;

const MODELS: [&str; 5] = ["linear-first", "odd-heads", "only-softmax", "only-linear", "m1-prenorm"];
/// Ids of every golden's vocabulary.
const VOCABULARY: u32 = 60;
/// Ends a turn.
const CONTROL: u32 = 0;

fn model(index: usize) -> Arc<Model> {
    static LOADED: OnceLock<Vec<Arc<Model>>> = OnceLock::new();
    let load = |name: &&str| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
        Arc::new(Model::load(&dir, &LoadOptions { threads: 1, dtype: None }).expect("a golden loads"))
    };
    LOADED.get_or_init(|| MODELS.iter().map(load).collect())[index].clone()
}

fn identity() -> Identity {
    Identity { model: "m".into(), kernel: "k".into(), dtype: "f32".into() }
}

fn limits(ram_bytes: u64, disk: Option<DiskLimits>) -> PrefixLimits {
    let placement = Placement { grid_tokens: 128, turns_max: 3 };
    PrefixLimits { ram_bytes, disk, placement, wait: Duration::ZERO }
}

/// What the engine does with the cache, for one sequence at a time.
struct World {
    runner: Runner,
    cache: StateCache,
    prefixes: PrefixCache,
}

impl World {
    fn start(model: &Arc<Model>, limits: PrefixLimits) -> World {
        let cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: 512 });
        let prefixes = PrefixCache::start(limits, identity(), cache.shape()).expect("the folder is free");
        World { runner: Runner::new(model.clone(), 1), cache, prefixes }
    }

    fn settle(&mut self) {
        futures::executor::block_on(self.prefixes.flusher().flush());
        self.prefixes.read_reports(Instant::now());
    }

    /// Runs one sequence to its end. Answers with the tokens that were restored, and the logits of the others.
    fn run(&mut self, tokens: &[u32], mut chunks: impl Iterator<Item = usize>) -> (usize, Vec<f32>) {
        let chain = Chain::new(identity().root("tenant"), tokens);
        let now = Instant::now();
        let slot = self.cache.acquire(tokens.len()).expect("the slot is free");
        let at_most = tokens.len() - 1;
        let in_memory = self.prefixes.deepest(&chain, tokens, at_most).map_or(0, |place| place.position);
        if let Some(place) = self.prefixes.deepest_on_disk(&chain, tokens, in_memory, at_most) {
            assert!(self.prefixes.load(place));
            self.settle();
        }
        let mut parent = None;
        if let Some(place) = self.prefixes.deepest(&chain, tokens, at_most) {
            let checkpoint = self.prefixes.get(place.key, now).expect("the index names what is there");
            self.cache.start_from(&slot, &checkpoint);
            parent = Some(place.key);
        }
        let restored = self.cache.position(&slot);
        let stops = self.prefixes.limits().placement.of(tokens, |token| token == CONTROL);
        let (mut position, mut logits) = (restored, Vec::new());
        while position < tokens.len() {
            let chunk = chunks.next().expect("chunks have no end");
            let stop = stops.iter().copied().find(|&stop| stop > position).unwrap_or(tokens.len());
            let end = (position + chunk).min(stop).min(tokens.len());
            let span = Span { slot: &slot, tokens: &tokens[position..end], logits: Logits::All };
            logits.extend_from_slice(self.runner.forward(&mut self.cache, &[span]));
            position = end;
            if stops.contains(&position) {
                let place = Place::of(&chain, tokens, position).expect("stops are named");
                let cache = &mut self.cache;
                self.prefixes.insert(place, parent, now, || cache.checkpoint(&slot, place.base));
                parent = Some(place.key);
            }
        }
        let place = Place::of(&chain, tokens, position).expect("its end is named");
        let cache = &mut self.cache;
        self.prefixes.park(place, parent, now, || cache.checkpoint(&slot, place.base));
        self.cache.release(slot);
        self.check_limits();
        (restored, logits)
    }

    fn check_limits(&self) {
        let cache = &self.prefixes;
        assert!(cache.stats.ram_bytes <= cache.limits.ram_bytes, "{:?}", cache.stats);
        let mut segments: HashMap<*const Segment, u64> = HashMap::new();
        for entry in cache.entries.values() {
            for segment in Segment::chain_of(entry.checkpoint.pages.as_ref()) {
                segments.insert(Arc::as_ptr(segment), segment.bytes());
            }
        }
        let states: u64 = cache.entries.values().map(|entry| entry.checkpoint.state_bytes()).sum();
        assert_eq!(cache.stats.ram_bytes, states + segments.values().sum::<u64>(), "shared pages count once");
    }
}

#[derive(Debug, Clone)]
enum Happening {
    /// `fork` tokens of a common text, then own ones.
    Sequence {
        fork: usize,
        own: Vec<u32>,
        chunks: Vec<usize>,
    },
    Restart,
}

fn happening() -> impl Strategy<Value = Happening> {
    let chunk = prop_oneof![2 => 1usize..9, 2 => 60usize..70, 1 => 100usize..300];
    let own = prop_oneof![
        1 => Just(Vec::new()),
        3 => prop::collection::vec(0..VOCABULARY, 1..90),
    ];
    let fork =
        prop_oneof![3 => 1usize..260, 2 => prop::sample::select(vec![64, 65, 127, 128, 129, 192, 200])];
    prop_oneof![
        8 => (fork, own, prop::collection::vec(chunk, 1..12))
            .prop_map(|(fork, own, chunks)| Happening::Sequence { fork, own, chunks }),
        1 => Just(Happening::Restart),
    ]
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Logits of every position of one cold sequence in one pass.
fn cold(model: &Arc<Model>, tokens: &[u32]) -> Vec<f32> {
    let mut cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: tokens.len() });
    let slot = cache.acquire(tokens.len()).expect("it was made for it");
    let span = Span { slot: &slot, tokens, logits: Logits::All };
    let logits = Runner::new(model.clone(), 1).forward(&mut cache, &[span]).to_vec();
    cache.release(slot);
    logits
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Prompts with common beginnings, forks anywhere, any chunks, evictions from memory and disk, restarts: the logits of what is
    /// computed are those of a cold run.
    #[test]
    fn a_hit_changes_no_bit(
        which in 0..MODELS.len(),
        common in prop::collection::vec(0..VOCABULARY, 260),
        happenings in prop::collection::vec(happening(), 2..9),
        ram_checkpoints in prop_oneof![Just(1u64), 2..6u64, Just(1000)],
        disk_checkpoints in prop_oneof![Just(None), (1..6u64).prop_map(Some), Just(Some(1000))],
    ) {
        let model = model(which);
        let folder = tempfile::tempdir().expect("a folder");
        // Of a checkpoint in the middle of a block, behind some pages.
        let checkpoint_bytes = 2 * model.state_bytes_per_sequence() + 256 * model.cache_bytes_per_token();
        let disk = |checkpoints| DiskLimits { dir: folder.path().join("cache"), bytes: checkpoints * checkpoint_bytes + 20_000 };
        let limits = limits(ram_checkpoints * checkpoint_bytes, disk_checkpoints.map(disk));
        let mut world = World::start(&model, limits.clone());
        for happening in happenings {
            let Happening::Sequence { fork, own, chunks } = happening else {
                drop(world);
                world = World::start(&model, limits.clone());
                continue;
            };
            let tokens = [&common[..fork], &own].concat();
            let (restored, logits) = world.run(&tokens, chunks.into_iter().cycle());
            prop_assert!(restored < tokens.len());
            let expect = cold(&model, &tokens);
            let vocabulary = model.config().vocab_size;
            prop_assert!(same_bits(&logits, &expect[restored * vocabulary..]), "{restored} of {} restored", tokens.len());
            // The same once more: all but what lies past the last stop is there, if memory has room for it.
            if ram_checkpoints == 1000 {
                let (restored, logits) = world.run(&tokens, [usize::MAX / 2].into_iter().cycle());
                prop_assert!(restored >= (tokens.len() - 1) / BLOCK_TOKENS * BLOCK_TOKENS, "{restored}");
                prop_assert!(same_bits(&logits, &expect[restored * vocabulary..]));
            }
        }
        if let Some(limits) = &limits.disk {
            world.settle();
            prop_assert!(world.prefixes.stats.disk_bytes <= limits.bytes);
        }
    }
}

/// The property above can fail: a checkpoint that says it stands one token further is noticed.
#[test]
fn one_token_too_many_is_other_text() {
    for (index, name) in MODELS.iter().enumerate() {
        let model = model(index);
        let mut world = World::start(&model, limits(1 << 30, None));
        let tokens: Vec<u32> = (0..150).map(|i| 1 + i * 7 % (VOCABULARY - 1)).collect();
        world.run(&tokens[..140], std::iter::repeat(140));
        let chain = Chain::new(identity().root("tenant"), &tokens);
        let place = world.prefixes.deepest(&chain, &tokens, 149).expect("it was parked");
        assert_eq!(place.position, 140);
        let checkpoint = world.prefixes.get(place.key, Instant::now()).expect("it is there");
        let slot = world.cache.acquire(tokens.len()).expect("the slot is free");
        world.cache.start_from(&slot, &checkpoint);
        let span = Span { slot: &slot, tokens: &tokens[141..], logits: Logits::All };
        let logits = world.runner.forward(&mut world.cache, &[span]).to_vec();
        let expect = cold(&model, &tokens);
        assert!(!same_bits(&logits, &expect[expect.len() - logits.len()..]), "{name}");
        world.cache.release(slot);
    }
}

/// Bytes that a pure-lightning model holds do not depend on how far a sequence has come.
#[test]
fn a_pure_lightning_model_has_constant_memory() {
    let model = model(MODELS.iter().position(|name| *name == "only-linear").expect("a golden"));
    // Room for a token: it does not limit a model that keeps none.
    let mut cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: 1 });
    let mut runner = Runner::new(model.clone(), 1);
    let mut held = |tokens: usize| {
        let ids: Vec<u32> = (0..tokens as u32).map(|i| i % VOCABULARY).collect();
        let slot = cache.acquire(tokens).expect("tokens do not limit it");
        for chunk in ids.chunks(500) {
            runner.forward(&mut cache, &[Span { slot: &slot, tokens: chunk, logits: Logits::None }]);
        }
        assert_eq!(cache.position(&slot), tokens);
        let key = Chain::new(identity().root("a"), &ids).key(tokens / BLOCK_TOKENS).expect("named");
        let checkpoint = cache.checkpoint(&slot, key);
        assert!(checkpoint.pages.is_none());
        let bytes = (cache.bytes(), checkpoint.state_bytes());
        cache.release(slot);
        bytes
    };
    // As far into a block.
    let short = held(1_000);
    assert!(short.0 > 0);
    assert_eq!(held(20_008), short);
    assert_eq!(model.cache_bytes_per_token(), 0);
}

#[test]
fn running_sequences_stay_within_their_limits_whatever_they_share() {
    let model = model(0);
    let mut world = World::start(&model, limits(1 << 30, None));
    let most = model.state_bytes_per_sequence() + 512 * model.cache_bytes_per_token();
    for length in [200, 500, 130, 512, 64, 512] {
        let tokens: Vec<u32> = (0..length).map(|i| 1 + i % 50).collect();
        world.run(&tokens, std::iter::repeat(100));
        assert!(world.cache.bytes() <= most, "{} of {most} bytes", world.cache.bytes());
    }
}

fn checkpoint(position: usize, floats: usize) -> Checkpoint {
    Checkpoint { position, state: vec![0.0; floats], pages: None }
}

fn place(seed: u32, position: usize) -> Place {
    let key = identity().root("a").then(&[seed]);
    Place { key, base: key, position }
}

/// Room for 10 checkpoints of 960 floats.
fn small_cache() -> PrefixCache {
    PrefixCache::start(limits(40_000, None), identity(), super::super::tests::shape())
        .expect("no folder is needed")
}

#[test]
fn what_is_worth_least_leaves_first() {
    let check = |name: &str, least: (usize, usize, u64), others: (usize, usize, u64)| {
        let mut cache = small_cache();
        let start = Instant::now();
        let mut insert = |seed: u32, (position, floats, at_s): (usize, usize, u64)| {
            let at = start + Duration::from_secs(at_s);
            cache.insert(place(seed, position), None, at, || checkpoint(position, floats));
        };
        insert(0, others);
        insert(1, least);
        (2..11).for_each(|seed| insert(seed, others));
        assert!(cache.get(place(1, 0).key, start).is_none(), "{name}");
        assert_eq!((cache.stats.evictions, cache.stats.ram_bytes), (1, 10 * 4 * 960), "{name}");
    };
    check("fewer tokens", (64, 960, 100), (640, 960, 100));
    check("older", (640, 960, 0), (640, 960, 100));
    check("larger", (640, 1920, 100), (640, 960, 100));
}

#[test]
fn tokens_that_another_checkpoint_saves_too_do_not_count() {
    let mut cache = small_cache();
    let now = Instant::now();
    cache.insert(place(0, 640), None, now, || checkpoint(640, 960));
    cache.insert(place(1, 704), Some(place(0, 640).key), now, || checkpoint(704, 960));
    (2..11).for_each(|seed| cache.insert(place(seed, 640), None, now, || checkpoint(640, 960)));
    assert!(cache.get(place(1, 704).key, now).is_none(), "it saved 64 tokens beyond the one before it");
    assert!(cache.get(place(0, 640).key, now).is_some());
}

#[test]
fn what_is_larger_than_memory_is_not_kept() {
    let mut cache = small_cache();
    let now = Instant::now();
    cache.insert(place(0, 640), None, now, || checkpoint(640, 960));
    cache.insert(place(1, 64_000), None, now, || checkpoint(64_000, 10_001));
    assert!(cache.get(place(0, 640).key, now).is_some() && cache.get(place(1, 64_000).key, now).is_none());
}

#[test]
fn a_page_that_others_hold_is_copied_before_it_is_written() {
    let mut page = Page::zeroed(4);
    let other = page.clone();
    page.0[1] = 5.0;
    assert_eq!((page.0[1], other.0[1]), (5.0, 0.0));
}
