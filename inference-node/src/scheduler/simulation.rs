//! Runs a scheduler as the engine does, over memory that is nothing but numbers, and checks every invariant at each step.

use super::*;
use std::collections::BTreeSet;

pub(super) const LIMITS: SchedulerLimits = SchedulerLimits {
    slots: 4,
    waiting_max: 64,
    step_tokens_max: 32,
    block_tokens: 16,
    preempt_after_tokens: 8,
    preempt_lag_tokens: 100,
};

/// Room for everything.
pub(super) const AMPLE: Sizes = Sizes { pages: 10_000, suspended_bytes: 1_000_000 };
/// What a suspended sequence holds beside its pages.
const STATE_BYTES: usize = 10;

pub(super) fn arrival(id: u64, tenant: &str, known_tokens: usize, granted_tokens: u64) -> Arrival {
    Arrival {
        id: SequenceId(id),
        tenant: tenant.into(),
        weight: 1,
        priority: Priority::Normal,
        known_tokens,
        output_tokens: 0,
        granted_tokens,
        stops: Arc::new([]),
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub pages: usize,
    pub suspended_bytes: usize,
}

pub(super) struct Simulation {
    pub limits: SchedulerLimits,
    pub scheduler: Scheduler,
    pub sequences: Memory,
    /// (sequence, step) of every token sampled.
    pub outputs: Vec<(SequenceId, usize)>,
    pub steps: usize,
    /// Tokens of prompts that may go beside sequences that decode.
    pub prompt_tokens_max: usize,
}

/// All sequences, and the room they share.
pub(super) struct Memory {
    slots: usize,
    sizes: Sizes,
    block_tokens: usize,
    preempt_after_tokens: u64,
    all: BTreeMap<SequenceId, Simulated>,
}

#[derive(Clone)]
pub(super) struct Simulated {
    pub known: usize,
    pub computed: usize,
    pub output: u64,
    pub granted: u64,
    pub output_max: u64,
    place: Place,
    stops: Arc<[usize]>,
    /// Pages for the longest it can get.
    pages: usize,
    stint: u64,
}

impl Simulated {
    fn suspended_bytes(&self) -> usize {
        STATE_BYTES + self.computed
    }

    fn is_stuck(&self) -> bool {
        self.output >= self.granted && self.known - self.computed <= 1
    }
}

impl std::ops::Deref for Memory {
    type Target = BTreeMap<SequenceId, Simulated>;

    fn deref(&self) -> &Self::Target {
        &self.all
    }
}

impl Memory {
    fn at(&self, place: Place) -> impl Iterator<Item = &Simulated> {
        self.all.values().filter(move |sequence| sequence.place == place)
    }

    pub fn suspended(&self) -> usize {
        self.at(Place::Suspended).count()
    }

    pub fn is_running(&self, id: u64) -> bool {
        self.all.get(&SequenceId(id)).is_some_and(|sequence| sequence.place == Place::Running)
    }

    fn check(&self) {
        assert!(self.at(Place::Running).count() <= self.slots);
        assert!(self.at(Place::Running).map(|s| s.pages).sum::<usize>() <= self.sizes.pages);
        let bytes: usize = self.at(Place::Suspended).map(Simulated::suspended_bytes).sum();
        assert!(bytes <= self.sizes.suspended_bytes, "{bytes} bytes suspended");
    }
}

impl Room for Memory {
    fn enter(&mut self, id: SequenceId) -> Option<usize> {
        if !self.could_enter(id, &[]) {
            return None;
        }
        let sequence = self.all.get_mut(&id).expect("only known sequences enter");
        assert_ne!(sequence.place, Place::Running, "{id:?} runs already");
        (sequence.place, sequence.stint) = (Place::Running, 0);
        Some(sequence.computed)
    }

    fn could_enter(&self, id: SequenceId, leaving: &[SequenceId]) -> bool {
        let leavers = || leaving.iter().map(|id| &self.all[id]);
        let slots = self.at(Place::Running).count() - leaving.len();
        let pages: usize = self.at(Place::Running).map(|s| s.pages).sum();
        let pages = pages - leavers().map(|s| s.pages).sum::<usize>();
        let suspended = self.all.iter().filter(|(other, s)| s.place == Place::Suspended && **other != id);
        let bytes: usize = suspended.map(|(_, s)| s.suspended_bytes()).sum();
        let bytes = bytes + leavers().map(Simulated::suspended_bytes).sum::<usize>();
        slots < self.slots
            && pages + self.all[&id].pages <= self.sizes.pages
            && bytes <= self.sizes.suspended_bytes
    }

    fn suspend(&mut self, id: SequenceId) {
        let sequence = self.all.get_mut(&id).expect("only known sequences are suspended");
        assert_eq!(sequence.place, Place::Running, "{id:?} does not run");
        assert!(
            sequence.stint >= self.preempt_after_tokens || sequence.is_stuck(),
            "{id:?} is suspended after {} tokens",
            sequence.stint
        );
        sequence.place = Place::Suspended;
    }
}

impl Simulation {
    pub fn new(limits: SchedulerLimits, sizes: Sizes) -> Simulation {
        let memory = Memory {
            slots: limits.slots,
            sizes,
            block_tokens: limits.block_tokens,
            preempt_after_tokens: limits.preempt_after_tokens,
            all: BTreeMap::new(),
        };
        Simulation {
            scheduler: Scheduler::new(limits.clone()),
            limits,
            sequences: memory,
            outputs: Vec::new(),
            steps: 0,
            prompt_tokens_max: usize::MAX,
        }
    }

    pub fn enqueue(&mut self, arrival: Arrival, output_max: u64) -> Result<(), QueueFull> {
        let simulated = Simulated {
            known: arrival.known_tokens,
            computed: 0,
            output: arrival.output_tokens,
            granted: arrival.granted_tokens,
            output_max,
            place: Place::Waiting,
            stops: arrival.stops.clone(),
            pages: (arrival.known_tokens + output_max as usize).div_ceil(self.sequences.block_tokens),
            stint: 0,
        };
        assert!(simulated.pages <= self.sequences.sizes.pages, "what can never fit is refused before");
        let id = arrival.id;
        self.scheduler.enqueue(arrival)?;
        self.sequences.all.insert(id, simulated);
        Ok(())
    }

    pub fn grant(&mut self, id: SequenceId, tokens: u64) {
        self.scheduler.grant(id, tokens);
        if let Some(sequence) = self.sequences.all.get_mut(&id) {
            sequence.granted = sequence.granted.max(tokens);
        }
    }

    pub fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.sequences.all.remove(&id);
    }

    /// One step; answers with the number of tokens computed.
    pub fn step(&mut self) -> usize {
        self.scheduler.admit(&mut self.sequences);
        self.sequences.check();
        self.check_scheduler();
        let ahead = self.scheduler.ahead();
        let mut batch = Vec::new();
        self.scheduler.schedule(&mut batch, self.prompt_tokens_max);
        let total: usize = batch.iter().map(|work| work.tokens).sum();
        assert!(total <= self.limits.step_tokens_max, "over budget: {total}");
        if ahead.decoding > 0 {
            assert!(total - ahead.decoding <= self.prompt_tokens_max, "over the budget of prompts: {total}");
        }
        let mut seen = BTreeSet::new();
        for work in &batch {
            assert!(seen.insert(work.id), "{:?} twice in a step", work.id);
            self.compute(work);
        }
        self.steps += 1;
        total
    }

    fn compute(&mut self, work: &Work) {
        let sequence = self.sequences.all.get_mut(&work.id).expect("only known sequences are scheduled");
        assert_eq!(sequence.place, Place::Running, "not admitted");
        assert_eq!(work.from, sequence.computed, "each token once and in order");
        assert!(work.tokens > 0);
        let passed = |&&stop: &&usize| work.from < stop && stop < work.from + work.tokens;
        assert_eq!(sequence.stops.iter().find(passed), None, "work ends where it must");
        sequence.computed += work.tokens;
        sequence.stint += work.tokens as u64;
        assert_eq!(work.samples, sequence.computed == sequence.known);
        if !work.samples {
            return;
        }
        sequence.output += 1;
        assert!(sequence.output <= sequence.granted, "beyond the grant");
        self.outputs.push((work.id, self.steps));
        if sequence.output >= sequence.output_max {
            self.remove(work.id);
        } else {
            sequence.known += 1;
            self.scheduler.sampled(work.id);
        }
    }

    /// Its books say what is the case, and nobody was lost.
    fn check_scheduler(&self) {
        let scheduler = &self.scheduler;
        assert!(scheduler.running() + scheduler.waiting() <= self.limits.slots + self.limits.waiting_max);
        assert!(scheduler.sequences.keys().eq(self.sequences.keys()), "a sequence was lost");
        let (mut members, mut queued) = (0, 0);
        for flow in scheduler.flows.values() {
            members += flow.members;
            queued += flow.queue.len();
        }
        assert_eq!(members, self.sequences.len());
        let wants_slot = |s: &&Simulated| s.place != Place::Running && !s.is_stuck();
        assert_eq!(queued, self.sequences.values().filter(wants_slot).count());
        for (id, sequence) in self.sequences.iter() {
            let kept = &scheduler.sequences[id];
            assert_eq!((kept.place, kept.computed), (sequence.place, sequence.computed));
        }
    }

    pub fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    pub fn run_until_idle(&mut self, steps_max: usize) {
        for _ in 0..steps_max {
            if self.step() == 0 {
                return;
            }
        }
        panic!("still busy after {steps_max} steps");
    }
}
