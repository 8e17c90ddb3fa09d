use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const LIMITS: SchedulerLimits =
    SchedulerLimits { slots: 4, waiting_max: 64, step_tokens_max: 32, block_tokens: 16 };

fn arrival(id: u64, tenant: &str, known_tokens: usize, granted_tokens: u64) -> Arrival {
    Arrival {
        id: SequenceId(id),
        tenant: tenant.into(),
        priority: Priority::Normal,
        known_tokens,
        output_tokens: 0,
        granted_tokens,
        stops: Arc::new([]),
    }
}

/// Runs a scheduler as the engine does and checks every invariant at every step.
struct Simulation {
    limits: SchedulerLimits,
    scheduler: Scheduler,
    sequences: BTreeMap<SequenceId, Simulated>,
    /// (sequence, step) of every token sampled.
    outputs: Vec<(SequenceId, usize)>,
    steps: usize,
}

struct Simulated {
    known: usize,
    computed: usize,
    output: u64,
    granted: u64,
    output_max: u64,
    running: bool,
}

impl Simulation {
    fn new(limits: SchedulerLimits) -> Simulation {
        let scheduler = Scheduler::new(limits.clone());
        Simulation { limits, scheduler, sequences: BTreeMap::new(), outputs: Vec::new(), steps: 0 }
    }

    fn enqueue(&mut self, arrival: Arrival, output_max: u64) -> Result<(), QueueFull> {
        let simulated = Simulated {
            known: arrival.known_tokens,
            computed: 0,
            output: arrival.output_tokens,
            granted: arrival.granted_tokens,
            output_max,
            running: false,
        };
        let id = arrival.id;
        self.scheduler.enqueue(arrival)?;
        self.sequences.insert(id, simulated);
        Ok(())
    }

    fn grant(&mut self, id: SequenceId, tokens: u64) {
        self.scheduler.grant(id, tokens);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.granted = sequence.granted.max(tokens);
        }
    }

    fn remove(&mut self, id: SequenceId) {
        self.scheduler.remove(id);
        self.sequences.remove(&id);
    }

    /// One step; answers with the number of tokens computed.
    fn step(&mut self) -> usize {
        let sequences = &mut self.sequences;
        self.scheduler.admit(|id| {
            sequences.get_mut(&id).expect("only known sequences are admitted").running = true;
            true
        });
        let mut batch = Vec::new();
        self.scheduler.schedule(&mut batch);
        let total: usize = batch.iter().map(|work| work.tokens).sum();
        assert!(total <= self.limits.step_tokens_max, "over budget: {total}");
        assert!(self.scheduler.running() <= self.limits.slots);
        assert!(self.scheduler.waiting() <= self.limits.waiting_max);
        let mut seen = std::collections::HashSet::new();
        for work in &batch {
            assert!(seen.insert(work.id), "{:?} twice in a step", work.id);
            let sequence = self.sequences.get_mut(&work.id).expect("only known sequences are scheduled");
            assert!(sequence.running, "not admitted");
            assert_eq!(work.from, sequence.computed, "each token once and in order");
            assert!(work.tokens > 0);
            sequence.computed += work.tokens;
            assert_eq!(work.samples, sequence.computed == sequence.known);
            if !work.samples {
                continue;
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
        self.steps += 1;
        total
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    fn run_until_idle(&mut self, steps_max: usize) {
        for _ in 0..steps_max {
            if self.step() == 0 {
                return;
            }
        }
        panic!("still busy after {steps_max} steps");
    }
}

#[test]
fn a_prompt_is_cut_on_the_grid_and_decoding_goes_on_beside_it() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.enqueue(arrival(0, "a", 1, 100)).expect("room");
    scheduler.enqueue(arrival(1, "b", 75, 100)).expect("room");
    scheduler.admit(|_| true);
    let mut batch = Vec::new();
    let mut prefill = Vec::new();
    for _ in 0..5 {
        scheduler.schedule(&mut batch);
        assert_eq!((batch[0].id, batch[0].tokens, batch[0].samples), (SequenceId(0), 1, true));
        prefill.extend(batch.iter().filter(|w| w.id == SequenceId(1)).map(|w| (w.from, w.tokens, w.samples)));
        for work in batch.iter().filter(|work| work.samples) {
            scheduler.sampled(work.id);
        }
    }
    assert_eq!(prefill, [(0, 16, false), (16, 16, false), (32, 16, false), (48, 27, true), (75, 1, true)]);
}

#[test]
fn work_ends_at_stops_and_begins_after_what_was_restored() {
    let mut scheduler = Scheduler::new(LIMITS);
    let stops: Arc<[usize]> = Arc::new([16, 32, 48, 64]);
    scheduler.enqueue(Arrival { stops, ..arrival(0, "a", 75, 100) }).expect("room");
    scheduler.admit(|_| true);
    scheduler.restored(SequenceId(0), 30);
    assert_eq!(scheduler.prompt_tokens_pending(), 45);
    let mut batch = Vec::new();
    let mut prefill = Vec::new();
    for _ in 0..4 {
        scheduler.schedule(&mut batch);
        prefill.extend(batch.iter().map(|work| (work.from, work.tokens, work.samples)));
    }
    assert_eq!(prefill, [(30, 2, false), (32, 16, false), (48, 16, false), (64, 11, true)]);
    scheduler.remove(SequenceId(0));
    assert!(scheduler.flows.values().all(|flow| flow.promised == 0));
}

#[test]
fn without_a_grant_all_but_the_last_token_is_computed() {
    let mut simulation = Simulation::new(LIMITS);
    simulation.enqueue(arrival(0, "a", 20, 0), 10).expect("room");
    simulation.run_until_idle(5);
    assert_eq!(simulation.sequences[&SequenceId(0)].computed, 19);
    assert!(simulation.scheduler.lacks_grant(SequenceId(0)));
    simulation.grant(SequenceId(0), 3);
    assert!(!simulation.scheduler.lacks_grant(SequenceId(0)));
    simulation.grant(SequenceId(0), 2);
    simulation.run_until_idle(10);
    assert_eq!(simulation.outputs.len(), 3);
    assert!(simulation.scheduler.lacks_grant(SequenceId(0)));
}

#[test]
fn a_full_queue_refuses_and_a_removed_sequence_makes_room() {
    let mut scheduler = Scheduler::new(SchedulerLimits { waiting_max: 2, ..LIMITS });
    scheduler.enqueue(arrival(0, "a", 5, 1)).expect("room");
    scheduler.enqueue(arrival(1, "a", 5, 1)).expect("room");
    assert_eq!(scheduler.enqueue(arrival(2, "b", 5, 1)), Err(QueueFull { waiting: 2 }));
    scheduler.remove(SequenceId(0));
    assert_eq!(scheduler.prompt_tokens_pending(), 5);
    scheduler.enqueue(arrival(3, "b", 5, 1)).expect("room");
}

#[test]
fn a_sequence_too_large_for_now_is_not_overtaken() {
    let mut scheduler = Scheduler::new(LIMITS);
    scheduler.enqueue(arrival(0, "a", 500, 1)).expect("room");
    scheduler.enqueue(arrival(1, "b", 5, 1)).expect("room");
    let mut asked = Vec::new();
    scheduler.admit(|id| {
        asked.push(id);
        false
    });
    assert_eq!((asked, scheduler.running()), (vec![SequenceId(0)], 0));
}

#[test]
fn a_tenant_with_many_sequences_does_not_crowd_out_another() {
    let mut simulation = Simulation::new(LIMITS);
    for id in 0..40 {
        simulation.enqueue(arrival(id, "greedy", 10, 8), 8).expect("room");
    }
    simulation.enqueue(arrival(40, "modest", 10, 8), 8).expect("room");
    while !simulation.outputs.iter().any(|(id, _)| *id == SequenceId(40)) {
        simulation.step();
    }
    assert!(simulation.steps <= 2, "waited {} steps behind 40 others", simulation.steps);
}

#[test]
fn a_flow_that_was_idle_has_earned_no_credit() {
    let mut simulation = Simulation::new(SchedulerLimits { slots: 1, step_tokens_max: 2, ..LIMITS });
    for id in 0..20 {
        simulation.enqueue(arrival(id, "busy", 1, 10), 10).expect("room");
    }
    simulation.steps(100);
    for id in 20..40 {
        simulation.enqueue(arrival(id, "late", 1, 10), 10).expect("room");
    }
    simulation.outputs.clear();
    simulation.steps(100);
    let late = simulation.outputs.iter().filter(|(id, _)| id.0 >= 20).count();
    assert!((40..=60).contains(&late), "{late} of 100 tokens");
}

#[test]
fn priority_is_a_weight() {
    let mut simulation = Simulation::new(SchedulerLimits { slots: 1, step_tokens_max: 2, ..LIMITS });
    for id in 0..60 {
        let priority = if id % 2 == 0 { Priority::Normal } else { Priority::Batch };
        simulation.enqueue(Arrival { priority, ..arrival(id, "a", 1, 4) }, 4).expect("room");
    }
    simulation.steps(100);
    let mut share: HashMap<u64, usize> = HashMap::new();
    simulation.outputs.iter().for_each(|(id, _)| *share.entry(id.0 % 2).or_default() += 1);
    assert!((65..=90).contains(&share[&0]) && share[&1] >= 10, "{share:?}");
}

#[derive(Debug, Clone)]
enum Happening {
    Arrive { tenant: u8, priority: Priority, prompt: usize, granted: u64, output_max: u64 },
    Grant { which: usize, tokens: u64 },
    Cancel { which: usize },
    Steps(usize),
}

fn happening() -> impl Strategy<Value = Happening> {
    let priority = prop_oneof![Just(Priority::Batch), Just(Priority::Normal), Just(Priority::High)];
    prop_oneof![
        4 => (0u8..4, priority, 1usize..200, 0u64..20, 1u64..30).prop_map(
            |(tenant, priority, prompt, granted, output_max)| Happening::Arrive {
                tenant, priority, prompt, granted, output_max
            }
        ),
        3 => (0usize..50, 0u64..40).prop_map(|(which, tokens)| Happening::Grant { which, tokens }),
        1 => (0usize..50).prop_map(|which| Happening::Cancel { which }),
        4 => (1usize..8).prop_map(Happening::Steps),
    ]
}

proptest! {
    /// Whatever happens: the invariants hold at each step, and once everything is granted everything finishes, in
    /// a number of steps bounded by the work.
    #[test]
    fn nothing_starves_and_nothing_exceeds(
        happenings in prop::collection::vec(happening(), 1..80),
        slots in 1usize..6,
        spare in 1usize..70,
        block_tokens in prop_oneof![Just(1usize), Just(16), Just(64)],
    ) {
        let limits = SchedulerLimits { slots, waiting_max: 20, step_tokens_max: slots + spare, block_tokens };
        let mut simulation = Simulation::new(limits);
        let mut next_id = 0;
        for happening in happenings {
            let nth = |simulation: &Simulation, which: usize| {
                let count = simulation.sequences.len().max(1);
                simulation.sequences.keys().nth(which % count).copied()
            };
            match happening {
                Happening::Arrive { tenant, priority, prompt, granted, output_max } => {
                    let tenant = format!("tenant-{tenant}");
                    let arrival = Arrival { priority, ..arrival(next_id, &tenant, prompt, granted) };
                    next_id += 1;
                    let _ = simulation.enqueue(arrival, output_max);
                }
                Happening::Grant { which, tokens } => {
                    if let Some(id) = nth(&simulation, which) { simulation.grant(id, tokens) }
                }
                Happening::Cancel { which } => {
                    if let Some(id) = nth(&simulation, which) { simulation.remove(id) }
                }
                Happening::Steps(count) => simulation.steps(count),
            }
        }
        let everyone: Vec<SequenceId> = simulation.sequences.keys().copied().collect();
        let work: usize = simulation.sequences.values().map(|s| s.known + s.output_max as usize).sum();
        everyone.iter().for_each(|&id| simulation.grant(id, 1000));
        simulation.run_until_idle(work + 1);
        prop_assert!(simulation.sequences.is_empty(), "unfinished: {:?}", simulation.sequences.keys());
        prop_assert_eq!(simulation.scheduler.prompt_tokens_pending(), 0);
        prop_assert!(simulation.scheduler.flows.values().all(|flow| flow.is_idle() && flow.promised == 0));
    }

    /// While others keep coming, every sequence still gets its tokens within a bounded time.
    #[test]
    fn a_stream_of_newcomers_starves_nobody(prompt in 1usize..300, newcomers in 1usize..40) {
        let mut simulation = Simulation::new(LIMITS);
        simulation.enqueue(arrival(0, "patient", prompt, 5), 5).expect("room");
        for next_id in 1..2_000 {
            if !simulation.sequences.contains_key(&SequenceId(0)) {
                return Ok(());
            }
            let tenant = format!("new-{next_id}");
            let _ = simulation.enqueue(arrival(next_id, &tenant, newcomers, 3), 3);
            simulation.step();
        }
        prop_assert!(false, "starved for 2000 steps");
    }
}
