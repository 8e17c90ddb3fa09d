//! The threads that compile, and what becomes of one that does not come back.
//!
//! ```text
//!  plan --> queue --> thread 0: compiles
//!                     thread 1: overran its time --> given up, works on for nobody --> ends
//!                     thread 2: took its place
//! ```
//! Nothing can stop a thread from outside. One that has overrun its time is replaced, so that it does not keep others
//! waiting; how many may be given up at once is limited, since each still takes a core and memory. Then requests are
//! refused until one has ended.

use super::compile::{Compiler, Refused, invalid};
use super::guide::Plan;
use super::{Constraint, compile::ConstraintLimits};
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// Only reserved; a page is used when it is touched.
const STACK_BYTES: usize = 64 << 20;
/// How often whoever waits looks after those that keep it waiting, in parts of its wait.
const LOOKS: u32 = 50;

pub(super) struct Job {
    pub constraint: Constraint,
    pub resume_ids: Vec<u32>,
    pub begun: oneshot::Sender<()>,
    pub done: oneshot::Sender<Result<Plan, Refused>>,
}

pub(super) struct Crew {
    jobs: SyncSender<Job>,
    shared: Arc<Shared>,
}

struct Shared {
    compiler: Compiler,
    queue: Mutex<Receiver<Job>>,
    overrun: Duration,
    given_up_max: usize,
    roster: Mutex<Roster>,
}

#[derive(Default)]
struct Roster {
    /// Since when each thread has compiled what it compiles.
    busy_since: BTreeMap<u64, Option<Instant>>,
    given_up: usize,
    given_up_total: u64,
    hired: u64,
}

impl Crew {
    /// Its threads end when this is dropped.
    pub fn start(compiler: Compiler, limits: &ConstraintLimits) -> io::Result<Crew> {
        let (jobs, queue) = sync_channel(limits.compile_waiting_max);
        let shared = Arc::new(Shared {
            compiler,
            queue: Mutex::new(queue),
            overrun: limits.compile_wait_max,
            given_up_max: limits.compile_given_up_max,
            roster: Mutex::default(),
        });
        for _ in 0..limits.compile_threads {
            hire(&shared, &mut shared.roster())?;
        }
        Ok(Crew { jobs, shared })
    }

    pub fn submit(&self, job: Job) -> Result<(), TrySendError<Job>> {
        self.jobs.try_send(job)
    }

    /// Resolves when the job has begun; gives up threads that overrun their time meanwhile.
    ///
    /// # Cancel safety
    /// Dropped, the job is skipped.
    pub async fn begun(&self, mut beginning: oneshot::Receiver<()>, wait: Duration) -> Result<(), Refused> {
        let deadline = Instant::now() + wait;
        loop {
            if self.relieve() == Relief::NobodyLeft {
                // It may have begun just before.
                return beginning.try_recv().map_err(|_| Refused::Busy);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // Dropped unsent, its outcome says why.
            if tokio::time::timeout(left.min(wait / LOOKS), &mut beginning).await.is_ok() {
                return Ok(());
            }
            if left.is_zero() {
                return Err(Refused::Busy);
            }
        }
    }

    /// Replaces threads that have overrun their time.
    pub fn relieve(&self) -> Relief {
        let mut roster = self.shared.roster();
        let overrun = self.shared.overrun;
        let late = |since: &Option<Instant>| since.is_some_and(|since| since.elapsed() > overrun);
        let overdue: Vec<u64> =
            roster.busy_since.iter().filter(|(_, since)| late(since)).map(|(&number, _)| number).collect();
        for number in overdue {
            if roster.given_up >= self.shared.given_up_max {
                break;
            }
            if let Err(error) = hire(&self.shared, &mut roster) {
                tracing::error!(%error, "a thread that compiles grammars cannot be replaced");
                break;
            }
            roster.busy_since.remove(&number);
            roster.given_up += 1;
            roster.given_up_total += 1;
            let (given_up, total) = (roster.given_up, roster.given_up_total);
            tracing::warn!(given_up, total, "a grammar overran its time; its thread was given up");
        }
        match roster.busy_since.values().all(late) {
            true => Relief::NobodyLeft,
            false => Relief::Working,
        }
    }

    /// Threads that were given up and have not ended.
    #[cfg(test)]
    pub fn given_up(&self) -> usize {
        self.shared.roster().given_up
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Relief {
    Working,
    /// All have overrun their time, and no more may be given up.
    NobodyLeft,
}

impl Shared {
    fn roster(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn hire(shared: &Arc<Shared>, roster: &mut Roster) -> io::Result<()> {
    let number = roster.hired;
    let theirs = shared.clone();
    std::thread::Builder::new()
        .name(format!("grammar-{number}"))
        .stack_size(STACK_BYTES)
        .spawn(move || work(&theirs, number))?;
    roster.hired += 1;
    roster.busy_since.insert(number, None);
    Ok(())
}

fn work(shared: &Shared, number: u64) {
    loop {
        // Held while waiting: the others wait for the lock instead, and one wakes for each job.
        let job = shared.queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { constraint, resume_ids, begun, done }) = job else { return };
        shared.roster().busy_since.insert(number, Some(Instant::now()));
        // If nobody waits for it any more, there is nothing to do.
        if begun.send(()).is_ok() {
            // A thread that died of one grammar would be missed by the next.
            let compile = AssertUnwindSafe(|| shared.compiler.compile(&constraint, &resume_ids));
            let outcome = catch_unwind(compile)
                .unwrap_or_else(|_| Err(invalid(constraint.field(), "cannot be compiled")));
            // Whoever waited for it may be gone.
            let _ = done.send(outcome);
        }
        let mut roster = shared.roster();
        match roster.busy_since.get_mut(&number) {
            Some(since) => *since = None,
            None => {
                roster.given_up -= 1;
                tracing::info!(given_up = roster.given_up, "a thread that was given up has ended");
                return;
            }
        }
    }
}
