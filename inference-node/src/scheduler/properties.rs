//! The invariants under whatever may happen.

use super::simulation::{AMPLE, LIMITS, Simulation, Sizes, arrival};
use super::*;
use crate::scheduler::flow::Virtual;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Happening {
    Arrive {
        tenant: u8,
        weight: u32,
        priority: Priority,
        prompt: usize,
        granted: u64,
        output_max: u64,
        stop: usize,
    },
    Grant {
        which: usize,
        tokens: u64,
    },
    Cancel {
        which: usize,
    },
    Yield {
        which: usize,
    },
    Steps {
        count: usize,
        prompt_tokens_max: usize,
    },
}

fn priority() -> impl Strategy<Value = Priority> {
    prop_oneof![Just(Priority::Batch), Just(Priority::Normal), Just(Priority::High)]
}

fn happening() -> impl Strategy<Value = Happening> {
    let arrive = (0u8..4, 1u32..9, priority(), 1usize..200, 0u64..20, 1u64..30, 1usize..100);
    let budget = prop_oneof![Just(usize::MAX), 1usize..40];
    prop_oneof![
        4 => arrive.prop_map(|(tenant, weight, priority, prompt, granted, output_max, stop)| Happening::Arrive {
            tenant, weight, priority, prompt, granted, output_max, stop
        }),
        3 => (0usize..50, 0u64..40).prop_map(|(which, tokens)| Happening::Grant { which, tokens }),
        // A deadline that passes is a cancel, to the scheduler.
        1 => (0usize..50).prop_map(|which| Happening::Cancel { which }),
        1 => (0usize..50).prop_map(|which| Happening::Yield { which }),
        4 => (1usize..30, budget)
            .prop_map(|(count, prompt_tokens_max)| Happening::Steps { count, prompt_tokens_max }),
    ]
}

fn limits() -> impl Strategy<Value = (SchedulerLimits, Sizes)> {
    let blocks = prop_oneof![Just(1usize), Just(16), Just(64)];
    let suspended = prop_oneof![Just(0usize), 1usize..400, Just(100_000)];
    (1usize..6, 1usize..70, blocks, 1u64..40, 0u64..200, 1usize..4, suspended).prop_map(
        |(slots, spare, block_tokens, preempt_after_tokens, preempt_lag_tokens, rooms, suspended_bytes)| {
            let limits = SchedulerLimits {
                slots,
                waiting_max: 20,
                step_tokens_max: slots + spare,
                block_tokens,
                preempt_after_tokens,
                preempt_lag_tokens,
            };
            // From room for the largest alone to room for three of them.
            (limits, Sizes { pages: rooms * 229usize.div_ceil(block_tokens), suspended_bytes })
        },
    )
}

fn happen(simulation: &mut Simulation, happening: Happening, next_id: &mut u64) {
    let nth = |simulation: &Simulation, which: usize| {
        let count = simulation.sequences.len().max(1);
        simulation.sequences.keys().nth(which % count).copied()
    };
    match happening {
        Happening::Arrive { tenant, weight, priority, prompt, granted, output_max, stop } => {
            let tenant = format!("tenant-{tenant}");
            let stops = [stop, 2 * stop].into();
            let arrival = Arrival { weight, priority, stops, ..arrival(*next_id, &tenant, prompt, granted) };
            *next_id += 1;
            let _ = simulation.enqueue(arrival, output_max);
        }
        Happening::Grant { which, tokens } => {
            nth(simulation, which).into_iter().for_each(|id| simulation.grant(id, tokens));
        }
        Happening::Cancel { which } => {
            nth(simulation, which).into_iter().for_each(|id| simulation.remove(id))
        }
        Happening::Yield { which } => {
            nth(simulation, which).into_iter().for_each(|id| simulation.scheduler.yields(id));
        }
        Happening::Steps { count, prompt_tokens_max } => {
            simulation.prompt_tokens_max = prompt_tokens_max;
            simulation.steps(count);
        }
    }
}

/// A tenant that always wants more.
#[derive(Debug, Clone)]
struct Hungry {
    weight: u32,
    priority: Priority,
    /// Sequences it keeps at the node.
    depth: usize,
    prompt_max: usize,
    output_max: u64,
}

fn hungry() -> impl Strategy<Value = Hungry> {
    (1u32..9, priority(), 8usize..16, 1usize..100, 1u64..200).prop_map(
        |(weight, priority, depth, prompt_max, output_max)| Hungry {
            weight,
            priority,
            depth,
            prompt_max,
            output_max,
        },
    )
}

/// Lets tenants fill the node for as many steps, with lengths spread by a number of its own; `check` sees each step.
fn feed(simulation: &mut Simulation, tenants: &[Hungry], steps: usize, mut check: impl FnMut(&Simulation)) {
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    for _ in 0..steps {
        for (index, tenant) in tenants.iter().enumerate() {
            let name = format!("tenant-{index}");
            let key = (Arc::from(name.as_str()), tenant.priority);
            let present = simulation.scheduler.flows.get(&key).map_or(0, |flow| flow.members);
            for _ in present..tenant.depth {
                let prompt = 1 + below(tenant.prompt_max as u64) as usize;
                let output_max = 1 + below(tenant.output_max);
                let id = simulation.sequences.keys().last().map_or(0, |id| id.0) + 1;
                let arrival = Arrival {
                    weight: tenant.weight,
                    priority: tenant.priority,
                    ..arrival(id, &name, prompt, output_max)
                };
                simulation.enqueue(arrival, output_max).expect("the queue is deep enough");
            }
        }
        simulation.step();
        check(simulation);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever happens: the invariants hold at each step, and once everything is granted everything finishes, in
    /// a number of steps bounded by the work.
    #[test]
    fn nothing_is_lost_and_nothing_exceeds(
        (limits, sizes) in limits(),
        happenings in prop::collection::vec(happening(), 1..120),
    ) {
        let mut simulation = Simulation::new(limits, sizes);
        let mut next_id = 0;
        happenings.into_iter().for_each(|happening| happen(&mut simulation, happening, &mut next_id));
        let everyone: Vec<SequenceId> = simulation.sequences.keys().copied().collect();
        let work: usize = simulation.sequences.values().map(|s| s.known + s.output_max as usize).sum();
        everyone.iter().for_each(|&id| simulation.grant(id, 1000));
        simulation.prompt_tokens_max = usize::MAX;
        simulation.run_until_idle(work + 1);
        prop_assert!(simulation.sequences.is_empty(), "unfinished: {:?}", simulation.sequences.keys());
        prop_assert_eq!(simulation.scheduler.prompt_tokens_pending(), 0);
        let at_rest = |flow: &Flow| flow.is_idle() && flow.promised == 0 && flow.queue.is_empty();
        prop_assert!(simulation.scheduler.flows.values().all(at_rest));
    }

    /// Flows that always want more stay together: none gets further in front of another than the lag, what it was promised, and
    /// what is computed before its sequences may be suspended.
    #[test]
    fn unfairness_is_bounded(
        tenants in prop::collection::vec(hungry(), 2..5),
        slots in 1usize..6,
        spare in 1usize..70,
        preempt_after_tokens in 1u64..40,
        preempt_lag_tokens in 0u64..400,
    ) {
        let limits = SchedulerLimits {
            slots, preempt_after_tokens, preempt_lag_tokens, step_tokens_max: slots + spare, ..LIMITS
        };
        let mut simulation = Simulation::new(limits.clone(), AMPLE);
        let lag = |flow: &Flow| Virtual::from(preempt_lag_tokens) * flow.token_cost;
        feed(&mut simulation, &tenants, 3_000, |simulation| {
            let flows = &simulation.scheduler.flows;
            let largest_lag = flows.values().map(lag).max().unwrap_or(0);
            for ahead in flows.values() {
                let before_suspended = 3 * slots as u64 * preempt_after_tokens + limits.step_tokens_max as u64;
                let uncontrolled = Virtual::from(before_suspended) * ahead.token_cost;
                for behind in flows.values() {
                    let promised = (slots * 100) as Virtual * behind.token_cost;
                    let bound = largest_lag + promised + uncontrolled;
                    assert!(ahead.counter <= behind.counter + bound,
                        "{} in front of {}, more than {bound}", ahead.counter, behind.counter);
                }
            }
        });
    }

    /// While ever new tenants keep the node full, every sequence still finishes, within twice the steps that its flow's share
    /// entitles it to.
    #[test]
    fn a_stream_of_newcomers_starves_nobody(
        prompt in 1usize..300,
        patient in priority(),
        (newcomer, weight, newcomers_prompt) in (priority(), 1u32..4, 1usize..40),
        suspended_bytes in prop_oneof![Just(0usize), Just(100_000)],
    ) {
        let limits = SchedulerLimits { waiting_max: 12, ..LIMITS };
        let sizes = Sizes { pages: 30, suspended_bytes };
        let mut simulation = Simulation::new(limits.clone(), sizes);
        let tokens = prompt as u64 + 5 * 3 + limits.preempt_lag_tokens;
        // The most flows that can be there, each of `weight` and its priority, against one of weight 1.
        let flows = (limits.slots + limits.waiting_max) as u64;
        let others = (flows * u64::from(weight)) as Virtual * patient.cost() / newcomer.cost() + 1;
        let tokens_a_step = limits.slots as u64;
        let steps_max = 2 * (tokens * (1 + u64::try_from(others).expect("small"))) / tokens_a_step;
        let patient = Arrival { priority: patient, ..arrival(0, "patient", prompt, 5) };
        simulation.enqueue(patient, 5).expect("room");
        for next_id in 1..=steps_max {
            if !simulation.sequences.contains_key(&SequenceId(0)) {
                return Ok(());
            }
            let tenant = format!("new-{next_id}");
            let newcomer = Arrival {
                priority: newcomer, weight, ..arrival(next_id, &tenant, newcomers_prompt, 3)
            };
            let _ = simulation.enqueue(newcomer, 3);
            simulation.step();
        }
        prop_assert!(false, "starved for {steps_max} steps");
    }

    /// The same happenings give the same batches: nothing depends on a clock, a hash or an address.
    #[test]
    fn it_is_deterministic(
        (limits, sizes) in limits(),
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let run = || {
            let mut simulation = Simulation::new(limits.clone(), sizes);
            let mut next_id = 0;
            let all = happenings.iter().cloned();
            all.for_each(|happening| happen(&mut simulation, happening, &mut next_id));
            (simulation.outputs, simulation.scheduler.preemptions())
        };
        prop_assert_eq!(run(), run());
    }
}
