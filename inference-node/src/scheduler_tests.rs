//! What the scheduler does in one situation each; whatever may happen is in [`properties`].

#[path = "scheduler/properties.rs"]
mod properties;
#[path = "scheduler/simulation.rs"]
mod simulation;

use self::simulation::{AMPLE, LIMITS, Simulation, Sizes, arrival};
use super::*;
use std::collections::HashMap;

fn simulation(limits: SchedulerLimits) -> Simulation {
    Simulation::new(limits, AMPLE)
}

/// One slot, and never more than one token of a prompt beside it.
const ONE_SLOT: SchedulerLimits = SchedulerLimits { slots: 1, step_tokens_max: 2, ..LIMITS };

#[test]
fn a_prompt_is_cut_on_the_grid_and_decoding_goes_on_beside_it() {
    let mut simulation = simulation(LIMITS);
    simulation.enqueue(arrival(0, "a", 1, 100), 100).expect("room");
    simulation.enqueue(arrival(1, "b", 75, 100), 100).expect("room");
    let mut prefill = Vec::new();
    for _ in 0..5 {
        let before = simulation.sequences[&SequenceId(1)].computed;
        simulation.step();
        prefill.push((before, simulation.sequences[&SequenceId(1)].computed - before));
    }
    assert_eq!(prefill, [(0, 16), (16, 16), (32, 16), (48, 27), (75, 1)]);
    assert_eq!(simulation.outputs.iter().filter(|(id, _)| id.0 == 0).count(), 5);
}

#[test]
fn beside_decoding_a_prompt_takes_only_its_share_of_the_step() {
    let mut simulation = simulation(LIMITS);
    simulation.enqueue(arrival(0, "a", 1, 100), 100).expect("room");
    simulation.enqueue(arrival(1, "b", 75, 100), 100).expect("room");
    simulation.enqueue(arrival(2, "c", 75, 100), 100).expect("room");
    assert_eq!(simulation.scheduler.ahead(), Ahead { decoding: 0, prompt_at: None });
    // Less than a block: off the grid, for the first in turn alone. Then nothing at all, as when the engine measures.
    let mut taken = Vec::new();
    for prompt_tokens_max in [5, 0, 20] {
        simulation.prompt_tokens_max = prompt_tokens_max;
        let before = [1, 2].map(|id| simulation.sequences[&SequenceId(id)].computed);
        simulation.step();
        let after = [1, 2].map(|id| simulation.sequences[&SequenceId(id)].computed);
        taken.push([after[0] - before[0], after[1] - before[1]]);
    }
    assert_eq!(taken, [[5, 0], [0, 0], [0, 16]]);
    assert_eq!(simulation.scheduler.ahead(), Ahead { decoding: 1, prompt_at: Some(5) });
    // With nobody decoding it may fill the step.
    simulation.remove(SequenceId(0));
    simulation.prompt_tokens_max = 1;
    assert_eq!(simulation.step(), 27);
}

#[test]
fn without_a_grant_all_but_the_last_token_is_computed() {
    let mut simulation = simulation(LIMITS);
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
fn who_can_compute_nothing_takes_no_slot() {
    let mut simulation = simulation(ONE_SLOT);
    simulation.enqueue(arrival(0, "a", 1, 0), 10).expect("room");
    simulation.enqueue(arrival(1, "a", 1, 5), 5).expect("room");
    simulation.step();
    assert!(!simulation.sequences.is_running(0) && simulation.scheduler.lacks_grant(SequenceId(0)));
    simulation.grant(SequenceId(0), 2);
    simulation.run_until_idle(10);
    assert_eq!(simulation.outputs.iter().filter(|(id, _)| id.0 == 0).count(), 2);
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
    let mut simulation = Simulation::new(LIMITS, Sizes { pages: 4, ..AMPLE });
    simulation.enqueue(arrival(0, "a", 20, 10), 10).expect("room");
    simulation.step();
    simulation.enqueue(arrival(1, "b", 60, 1), 1).expect("room");
    simulation.enqueue(arrival(2, "c", 5, 1), 1).expect("room");
    simulation.steps(3);
    assert!(!simulation.sequences.is_running(1) && !simulation.sequences.is_running(2));
    simulation.run_until_idle(100);
    assert!(simulation.sequences.is_empty());
}

#[test]
fn a_tenant_with_many_sequences_does_not_crowd_out_another() {
    let mut simulation = simulation(LIMITS);
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
    let mut simulation = simulation(ONE_SLOT);
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
fn decoding_alone_neither_earns_credit_nor_makes_debts() {
    let mut simulation = simulation(SchedulerLimits { slots: 2, step_tokens_max: 3, ..ONE_SLOT });
    // Nobody wants what "early" uses; "steady" has a slot all the while.
    simulation.enqueue(arrival(2, "steady", 1, 10_000), 10_000).expect("room");
    for id in (3..).step_by(3).take(20) {
        simulation.enqueue(arrival(id, "early", 1, 10), 10).expect("room");
    }
    simulation.steps(200);
    for (id, tenant) in (63..102).zip(["early", "late", "steady"].into_iter().cycle()) {
        simulation.enqueue(arrival(id, tenant, 1, 10), 10).expect("room");
    }
    simulation.outputs.clear();
    simulation.steps(120);
    let tokens = |rest| simulation.outputs.iter().filter(|(id, _)| id.0 % 3 == rest).count();
    let shares = [tokens(0), tokens(1), tokens(2)];
    assert!(shares.iter().all(|share| (65..=95).contains(share)), "a third of 240 tokens each: {shares:?}");
}

/// Tokens of even and odd sequences in 200 steps of one slot.
fn shares(even: (Priority, u32), odd: (Priority, u32)) -> [usize; 2] {
    let mut simulation = simulation(ONE_SLOT);
    for id in 0..60 {
        let (tenant, (priority, weight)) = if id % 2 == 0 { ("even", even) } else { ("odd", odd) };
        simulation.enqueue(Arrival { priority, weight, ..arrival(id, tenant, 1, 10) }, 10).expect("room");
    }
    simulation.steps(200);
    let count = |rest| simulation.outputs.iter().filter(|(id, _)| id.0 % 2 == rest).count();
    [count(0), count(1)]
}

#[test]
fn priority_and_weight_set_the_share() {
    let [normal, batch] = shares((Priority::Normal, 1), (Priority::Batch, 1));
    assert!((150..=175).contains(&normal) && batch >= 25, "{normal} to {batch}");
    let [heavy, light] = shares((Priority::Normal, 3), (Priority::Normal, 1));
    assert!((140..=160).contains(&heavy) && light >= 40, "{heavy} to {light}");
    let [high, heavy] = shares((Priority::High, 1), (Priority::Normal, 4));
    assert!((90..=110).contains(&high), "{high} to {heavy}");
}

#[test]
fn a_higher_priority_takes_a_slot_at_once_and_gives_it_back() {
    let mut simulation = simulation(ONE_SLOT);
    simulation.enqueue(Arrival { priority: Priority::Batch, ..arrival(0, "a", 1, 40) }, 40).expect("room");
    simulation.steps(4);
    simulation.enqueue(arrival(1, "b", 1, 10), 10).expect("room");
    simulation.steps(4);
    assert!(!simulation.sequences.is_running(1), "the other has a right to its first 8 tokens");
    simulation.step();
    assert!(simulation.sequences.is_running(1) && simulation.sequences.suspended() == 1);
    // An equal has to wait: it is not behind.
    simulation.enqueue(arrival(2, "c", 1, 10), 10).expect("room");
    simulation.steps(9);
    assert!(simulation.sequences.is_empty() || !simulation.sequences.is_running(2));
    simulation.run_until_idle(100);
    assert_eq!((simulation.outputs.len(), simulation.scheduler.preemptions()), (60, 1));
}

#[test]
fn priority_gives_way_to_a_flow_that_is_behind() {
    let mut simulation = simulation(SchedulerLimits { preempt_lag_tokens: 10, ..ONE_SLOT });
    simulation.enqueue(Arrival { priority: Priority::Batch, ..arrival(0, "a", 1, 100) }, 100).expect("room");
    simulation.steps(8);
    for id in 1..40 {
        let high = Arrival { priority: Priority::High, ..arrival(id, "b", 1, 100) };
        simulation.enqueue(high, 100).expect("room");
    }
    simulation.outputs.clear();
    simulation.steps(2_000);
    let batch = simulation.outputs.iter().filter(|(id, _)| id.0 == 0).count();
    assert!((80..=92).contains(&batch), "a seventeenth of the time is its due: {batch}");
}

#[test]
fn a_flow_that_falls_behind_gets_a_slot() {
    let mut simulation = simulation(ONE_SLOT);
    simulation.enqueue(arrival(0, "a", 1, 10_000), 10_000).expect("room");
    simulation.steps(20);
    simulation.enqueue(arrival(1, "b", 1, 10_000), 10_000).expect("room");
    let mut turns = vec![];
    for _ in 0..600 {
        simulation.step();
        turns.push(simulation.sequences.is_running(1));
    }
    let switches = turns.windows(2).filter(|pair| pair[0] != pair[1]).count();
    let second = turns.iter().filter(|&&second| second).count();
    // A lag of 100 tokens is 34 output tokens and the uncharged ones; they take turns of twice that.
    assert!((6..=20).contains(&switches), "{switches} switches");
    assert!((230..=370).contains(&second), "{second} of 600 steps");
}

#[test]
fn only_whoever_makes_room_is_suspended() {
    // Pages of 16 tokens: 2 + 2 + 4 of 8.
    let mut simulation = Simulation::new(LIMITS, Sizes { pages: 8, ..AMPLE });
    for (id, tokens) in [(0, 2), (1, 2), (2, 34)] {
        let batch = Arrival { priority: Priority::Batch, ..arrival(id, "a", tokens, 30) };
        simulation.enqueue(batch, 30).expect("room");
    }
    simulation.steps(12);
    let four_pages = Arrival { priority: Priority::High, ..arrival(3, "b", 60, 4) };
    simulation.enqueue(four_pages, 4).expect("room");
    simulation.step();
    assert!(simulation.sequences.is_running(3) && simulation.sequences.suspended() == 1);
    assert!(!simulation.sequences.is_running(2), "the one whose pages suffice");
}

#[test]
fn nobody_is_suspended_where_it_cannot_be_kept() {
    let mut simulation = Simulation::new(ONE_SLOT, Sizes { suspended_bytes: 15, ..AMPLE });
    simulation.enqueue(Arrival { priority: Priority::Batch, ..arrival(0, "a", 1, 40) }, 40).expect("room");
    simulation.steps(20);
    simulation.enqueue(Arrival { priority: Priority::High, ..arrival(1, "b", 1, 1) }, 1).expect("room");
    simulation.run_until_idle(100);
    assert_eq!(
        (simulation.outputs.last(), simulation.scheduler.preemptions()),
        (Some(&(SequenceId(1), 40)), 0)
    );
}

#[test]
fn a_sequence_without_a_grant_makes_way_for_anybody() {
    let mut simulation = simulation(ONE_SLOT);
    let idle = Arrival { priority: Priority::High, ..arrival(0, "a", 1, 2) };
    simulation.enqueue(idle, 10).expect("room");
    simulation.steps(3);
    simulation.enqueue(Arrival { priority: Priority::Batch, ..arrival(1, "b", 1, 20) }, 20).expect("room");
    simulation.steps(3);
    assert!(!simulation.sequences.is_running(1), "the engine is still patient");
    simulation.scheduler.yields(SequenceId(0));
    simulation.step();
    assert!(simulation.sequences.is_running(1) && simulation.sequences.suspended() == 1);
    assert!(simulation.scheduler.lacks_grant(SequenceId(0)));
    simulation.grant(SequenceId(0), 10);
    assert!(!simulation.scheduler.lacks_grant(SequenceId(0)));
    simulation.run_until_idle(100);
    assert_eq!(simulation.outputs.len(), 30);
}

#[test]
fn a_suspended_sequence_can_be_removed() {
    let mut simulation = simulation(ONE_SLOT);
    simulation.enqueue(Arrival { priority: Priority::Batch, ..arrival(0, "a", 1, 40) }, 40).expect("room");
    simulation.steps(20);
    simulation.enqueue(arrival(1, "b", 1, 5), 5).expect("room");
    simulation.step();
    assert_eq!((simulation.sequences.suspended(), simulation.scheduler.waiting()), (1, 1));
    simulation.remove(SequenceId(0));
    simulation.run_until_idle(10);
    assert!(simulation.sequences.is_empty() && simulation.scheduler.waiting() == 0);
}

#[test]
fn the_heaviest_tenant_does_not_overflow_the_lightest() {
    let mut simulation = simulation(LIMITS);
    for id in 0..8 {
        let (weight, priority) = if id % 2 == 0 { (u32::MAX, Priority::High) } else { (0, Priority::Batch) };
        let tenant = format!("tenant-{id}");
        simulation.enqueue(Arrival { weight, priority, ..arrival(id, &tenant, 30, 30) }, 30).expect("room");
    }
    simulation.run_until_idle(200);
    let mut counts: HashMap<SequenceId, usize> = HashMap::new();
    simulation.outputs.iter().for_each(|(id, _)| *counts.entry(*id).or_default() += 1);
    assert!(counts.len() == 8 && counts.values().all(|&count| count == 30));
}
