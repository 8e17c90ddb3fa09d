//! A few threads that wait by spinning for a moment and then sleep.
//!
//! A forward pass is hundreds of short parallel regions, a few microseconds each: waking a sleeping thread for each would cost
//! more than the work. Tasks are taken one by one from a shared counter, so a worker whose core was taken away delays only
//! the task it holds; one that never woke delays nothing, because the caller closes the region without it.
//!
//! ```text
//! state: [ region number | open | workers inside ]      next: task counter
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

/// How long an idle worker spins before it sleeps: tens of microseconds, longer than the gap between two regions of a pass.
const SPINS_BEFORE_SLEEP: u32 = 2_000;
/// How long the caller spins for a worker's last task before it offers its core: that worker may be waiting for one.
const SPINS_BEFORE_YIELD: u32 = 500;

const OPEN: u64 = 1 << 31;
const REGION: u64 = 1 << 32;
const INSIDE: u64 = OPEN - 1;

/// Runs parallel regions on the calling thread and `threads - 1` workers.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
}

struct Worker {
    asleep: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: AtomicU64,
    next: AtomicUsize,
    tasks: AtomicUsize,
    /// The region's closure, type-erased: `call(context, task, thread)`.
    call: AtomicPtr<()>,
    context: AtomicPtr<()>,
    panicked: AtomicBool,
    stopping: AtomicBool,
}

type Call = unsafe fn(*const (), usize, usize);

impl Pool {
    pub fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared::default());
        let spawn = |index: usize| {
            let (shared, asleep) = (shared.clone(), Arc::new(AtomicBool::new(false)));
            let flag = asleep.clone();
            let builder = thread::Builder::new().name(format!("kernel-{index}"));
            // Where the system refuses a thread, the remaining ones do its work.
            let thread = builder.spawn(move || shared.work(index, &flag)).ok()?;
            Some(Worker { asleep, thread: Some(thread) })
        };
        let workers = (1..threads.max(1)).filter_map(spawn).collect();
        Pool { shared, workers }
    }

    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(index, thread)` once for every index below `tasks`, in any order, and returns when all are done. `thread` is below
    /// [`Pool::threads`] and differs between calls that overlap.
    pub fn run<F: Fn(usize, usize) + Sync>(&mut self, tasks: usize, task: F) {
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(|index| task(index, 0));
            return;
        }
        let shared = &*self.shared;
        // No worker is inside and the region is closed (the end of the previous call waited for that), so nobody reads these now.
        shared.call.store(call::<F> as *mut (), Ordering::Relaxed);
        shared.context.store((&raw const task).cast_mut().cast(), Ordering::Relaxed);
        shared.tasks.store(tasks, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        let region = shared.state.load(Ordering::Relaxed) & !(REGION - 1);
        shared.state.store(region.wrapping_add(REGION) | OPEN, Ordering::SeqCst);
        for worker in &self.workers {
            // Pairs with the store before the last look in `work`: either this sees the flag or the worker sees the region.
            if worker.asleep.load(Ordering::SeqCst)
                && let Some(thread) = &worker.thread
            {
                thread.thread().unpark();
            }
        }
        let closing = CloseRegion(shared);
        while let Some(index) = shared.take() {
            task(index, 0);
        }
        drop(closing);
        assert!(!shared.panicked.load(Ordering::Relaxed), "a kernel task panicked on a pool thread");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                thread.thread().unpark();
                // A worker catches panics of its tasks, so it has nothing to report.
                let _ = thread.join();
            }
        }
    }
}

/// Lets no more workers in and waits for those inside: after this nobody holds the region's closure, even when it panicked.
struct CloseRegion<'a>(&'a Shared);

impl Drop for CloseRegion<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.state.load(Ordering::Acquire) & INSIDE != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }
}

impl Shared {
    fn take(&self) -> Option<usize> {
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        (index < self.tasks.load(Ordering::Relaxed)).then_some(index)
    }

    fn work(&self, thread: usize, asleep: &AtomicBool) {
        let mut last_region = 0;
        while let Some(region) = self.wait_and_enter(last_region, asleep) {
            last_region = region;
            // SAFETY: entering an open region (Acquire) makes its closure visible, and `CloseRegion` keeps the closure alive until
            // this worker has left; `call` was stored together with the context it belongs to.
            let call = unsafe { std::mem::transmute::<*mut (), Call>(self.call.load(Ordering::Relaxed)) };
            let context = self.context.load(Ordering::Relaxed).cast_const();
            while let Some(index) = self.take() {
                // SAFETY: as above; the closure is Sync.
                if catch_unwind(AssertUnwindSafe(|| unsafe { call(context, index, thread) })).is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            self.state.fetch_sub(1, Ordering::Release);
        }
    }

    /// The number of the region that this worker is now inside of, or `None` when the pool stops.
    fn wait_and_enter(&self, last_region: u64, asleep: &AtomicBool) -> Option<u64> {
        let mut spins = 0;
        loop {
            let state = self.state.load(Ordering::SeqCst);
            let region = state & !(REGION - 1);
            if state & OPEN != 0 && region != last_region {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                {
                    asleep.store(false, Ordering::Relaxed);
                    return Some(region);
                }
                continue;
            }
            if self.stopping.load(Ordering::SeqCst) {
                return None;
            }
            spins += 1;
            if spins < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop();
            } else if asleep.swap(true, Ordering::SeqCst) {
                thread::park();
            }
        }
    }
}

/// # Safety
/// `context` points to a live `F`.
unsafe fn call<F: Fn(usize, usize) + Sync>(context: *const (), index: usize, thread: usize) {
    // SAFETY: the caller's contract.
    let task = unsafe { &*context.cast::<F>() };
    task(index, thread);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_each_of_many_regions() {
        let mut pool = Pool::new(4);
        for tasks in (0..200).chain([1, 5_000]) {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, |index, thread| {
                assert!(thread < 4);
                counts[index].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1), "{tasks} tasks");
        }
    }

    #[test]
    fn a_sleeping_worker_wakes() {
        let mut pool = Pool::new(2);
        let seen = AtomicUsize::new(0);
        pool.run(2, |_, _| ());
        thread::sleep(std::time::Duration::from_millis(20));
        // Both tasks must be inside at once, so a second thread is needed.
        pool.run(2, |_, _| {
            seen.fetch_add(1, Ordering::SeqCst);
            while seen.load(Ordering::SeqCst) < 2 {
                std::hint::spin_loop();
            }
        });
        assert_eq!(seen.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_panicking_task_fails_the_region_and_leaves_the_pool_usable() {
        let mut pool = Pool::new(2);
        let outcome =
            catch_unwind(AssertUnwindSafe(|| pool.run(8, |index, _| assert!(index != 3, "task three"))));
        assert!(outcome.is_err());
        assert_eq!(pool.threads(), 2);
    }
}
