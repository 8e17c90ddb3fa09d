//! Threads that compute masks while the engine's thread runs the forward pass.
//!
//! A sequence has one slot, in which its parser waits, is away, or has come back with a mask. If the step comes for a
//! mask that nobody has begun, it computes it itself: it never waits for a queue, only for work under way.

use super::guide::Mask;
use llguidance::Matcher;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// As for the threads that compile: grammars are as deep as they were there. Only reserved.
const STACK_BYTES: usize = 64 << 20;

pub struct Masks {
    requests: SyncSender<Arc<Slot>>,
}

#[derive(Default)]
pub(super) struct Slot {
    state: Mutex<State>,
    back: Condvar,
}

#[derive(Default)]
enum State {
    #[default]
    Empty,
    Requested(Box<Matcher>),
    Away,
    Back(Box<Matcher>, Result<Mask, &'static str>),
}

impl Masks {
    /// `requests_max`: more than these at once are left to the engine's thread.
    pub fn start(threads: usize, requests_max: usize) -> std::io::Result<Masks> {
        let (requests, queue) = sync_channel(requests_max);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("mask-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || work(&queue))?;
        }
        Ok(Masks { requests })
    }

    pub(super) fn request(&self, slot: &Arc<Slot>, matcher: Box<Matcher>) {
        *slot.lock() = State::Requested(matcher);
        // A full queue, or none: whoever collects it will do the work.
        let _ = self.requests.try_send(slot.clone());
    }
}

fn work(queue: &Mutex<Receiver<Arc<Slot>>>) {
    loop {
        let slot = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(slot) = slot else { return };
        let Some(mut matcher) = slot.begin() else { continue };
        let mask = Mask::of(&mut matcher);
        *slot.lock() = State::Back(matcher, mask);
        slot.back.notify_one();
    }
}

impl Slot {
    /// The parser, if nobody has begun with it.
    fn begin(&self) -> Option<Box<Matcher>> {
        let mut state = self.lock();
        match std::mem::take(&mut *state) {
            State::Requested(matcher) => {
                *state = State::Away;
                Some(matcher)
            }
            other => {
                *state = other;
                None
            }
        }
    }

    /// The parser and its mask.
    pub(super) fn collect(&self) -> (Box<Matcher>, Result<Mask, &'static str>) {
        let mut state = self.lock();
        loop {
            match std::mem::take(&mut *state) {
                State::Back(matcher, mask) => return (matcher, mask),
                State::Requested(mut matcher) => {
                    drop(state);
                    let mask = Mask::of(&mut matcher);
                    return (matcher, mask);
                }
                State::Away => *state = State::Away,
                State::Empty => unreachable!("a guide collects what it requested, once"),
            }
            state = self.back.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
