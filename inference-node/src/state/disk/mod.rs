//! The disk tier: a thread that writes what memory evicts and what ended sequences left, and reads it back when it is asked for.
//!
//! ```text
//! engine thread --- orders (bounded: a full queue drops a write, and a read is a miss) ---> disk thread --> files
//!       ^---------- reports: stored, gone, loaded -------------------------------------------------+
//! ```
//!
//! The engine never waits for it. It keeps an index of its own of what lies on disk, by the reports. Reads go before writes.

mod folder;
mod format;

pub use self::folder::{Contents, FolderError, Found, inspect};

use self::folder::{Folder, StoreError};
use super::StateShape;
use super::chain::{Identity, Key};
use super::checkpoint::Checkpoint;
use super::index::Place;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{JoinHandle, Thread};
use tokio::sync::oneshot;

#[derive(Debug, Clone)]
pub struct DiskLimits {
    pub dir: PathBuf,
    pub bytes: u64,
}

/// Orders of a kind that may wait.
const ORDERS_MAX: usize = 256;

/// The engine's end. Dropped, it finishes the writes that were ordered.
pub(crate) struct Disk {
    queue: Arc<Queue>,
    /// No more than there were orders.
    reports: Option<Receiver<Report>>,
    waker: Arc<OnceLock<Thread>>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) struct Store {
    pub place: Place,
    /// The checkpoint before it in its sequence.
    pub parent: Option<Key>,
    pub checkpoint: Arc<Checkpoint>,
}

pub(crate) struct Report {
    pub news: News,
    /// Places that were evicted or found damaged meanwhile.
    pub gone: Vec<Place>,
    /// Bytes on disk now.
    pub bytes: u64,
}

pub(crate) enum News {
    Stored(Place),
    /// It was not written, and the log says why.
    NotStored(Place),
    Loaded(Place, Checkpoint),
    /// It was damaged, or gone.
    NotLoaded(Place),
}

#[derive(Default)]
struct Queue {
    orders: Mutex<Orders>,
    ready: Condvar,
}

#[derive(Default)]
struct Orders {
    loads: VecDeque<Place>,
    stores: VecDeque<Store>,
    flushes: Vec<oneshot::Sender<()>>,
    closed: bool,
}

enum Order {
    Load(Place),
    Store(Store),
    Flush(Vec<oneshot::Sender<()>>),
}

/// However the thread ends, nobody waits for it afterwards.
struct Closing(Arc<Queue>);

impl Drop for Closing {
    fn drop(&mut self) {
        *self.0.orders() = Orders { closed: true, ..Orders::default() };
    }
}

/// Waits for the disk tier, for whoever is about to stop the process.
#[derive(Clone)]
pub(crate) struct Flusher(Option<Arc<Queue>>);

impl Disk {
    /// Surveys the folder, then starts the thread. Answers with what lies there already, and how many bytes.
    pub fn start(
        limits: &DiskLimits,
        identity: Identity,
        shape: StateShape,
    ) -> Result<(Disk, Vec<Place>, u64), FolderError> {
        let mut folder = Folder::open(&limits.dir, limits.bytes, identity, shape)?;
        let (places, bytes) = (folder.places().collect(), folder.bytes());
        let (reporting, reports) = channel();
        let (queue, waker) = (Arc::new(Queue::default()), Arc::new(OnceLock::<Thread>::new()));
        let (orders, engine) = (queue.clone(), waker.clone());
        let work = move || {
            let _closing = Closing(orders.clone());
            while let Some(order) = orders.next() {
                let Some(report) = carry_out(&mut folder, order) else { continue };
                // The engine may be gone; what it ordered to be written is written all the same.
                let _ = reporting.send(report);
                engine.get().inspect(|engine| engine.unpark());
            }
        };
        let thread = std::thread::Builder::new()
            .name("cache-disk".to_owned())
            .spawn(work)
            .map_err(|source| FolderError::Io { path: limits.dir.clone(), source })?;
        Ok((Disk { queue, reports: Some(reports), waker, thread: Some(thread) }, places, bytes))
    }

    /// The calling thread is unparked at every report.
    pub fn wake_me(&self) {
        self.waker.get_or_init(std::thread::current);
    }

    /// Whether there was room for the order.
    pub fn load(&self, place: Place) -> bool {
        let mut orders = self.queue.orders();
        let has_room = !orders.closed && orders.loads.len() < ORDERS_MAX;
        if has_room {
            orders.loads.push_back(place);
            self.queue.ready.notify_one();
        }
        has_room
    }

    /// Whether there was room for the order.
    pub fn store(&self, store: Store) -> bool {
        let mut orders = self.queue.orders();
        let has_room = !orders.closed && orders.stores.len() < ORDERS_MAX;
        if has_room {
            orders.stores.push_back(store);
            self.queue.ready.notify_one();
        }
        has_room
    }

    pub fn report(&self) -> Option<Report> {
        self.reports.as_ref()?.try_recv().ok()
    }

    pub fn flusher(disk: Option<&Disk>) -> Flusher {
        Flusher(disk.map(|disk| disk.queue.clone()))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.queue.orders().closed = true;
        self.queue.ready.notify_one();
        self.reports = None;
        if let Some(thread) = self.thread.take() {
            // Its panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Flusher {
    /// Resolves when everything ordered before is on disk, or never will be.
    pub async fn flush(&self) {
        let Some(queue) = &self.0 else { return };
        let (done, flushed) = oneshot::channel();
        {
            let mut orders = queue.orders();
            if orders.closed {
                return;
            }
            orders.flushes.push(done);
            queue.ready.notify_one();
        }
        // An error means that the thread is gone: there is nothing to wait for.
        let _ = flushed.await;
    }
}

impl Queue {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        // Nothing in here is left half-done by a panic.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an order: reads first, then writes; `None` when there is none and none will come.
    fn next(&self) -> Option<Order> {
        let mut orders = self.orders();
        loop {
            if !orders.closed
                && let Some(place) = orders.loads.pop_front()
            {
                return Some(Order::Load(place));
            }
            if let Some(store) = orders.stores.pop_front() {
                return Some(Order::Store(store));
            }
            if !orders.flushes.is_empty() {
                return Some(Order::Flush(std::mem::take(&mut orders.flushes)));
            }
            if orders.closed {
                return None;
            }
            orders = self.ready.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn carry_out(folder: &mut Folder, order: Order) -> Option<Report> {
    let news = match order {
        Order::Load(place) => match folder.load(place) {
            Ok(checkpoint) => News::Loaded(place, checkpoint),
            Err(fault) => {
                tracing::warn!(key = ?place.key, "a cached checkpoint {fault}: its tokens are computed again");
                News::NotLoaded(place)
            }
        },
        Order::Store(Store { place, parent, checkpoint }) => match folder.store(place, parent, &checkpoint) {
            Ok(()) => News::Stored(place),
            Err(error @ StoreError::TooLarge { .. }) => {
                tracing::debug!("a checkpoint stays off the disk: {error}");
                News::NotStored(place)
            }
            Err(error) => {
                tracing::warn!("a checkpoint cannot be written: {error}");
                News::NotStored(place)
            }
        },
        Order::Flush(waiting) => {
            waiting.into_iter().for_each(|done| {
                // Whoever waited may have given up.
                let _ = done.send(());
            });
            return None;
        }
    };
    Some(Report { news, gone: folder.take_gone(), bytes: folder.bytes() })
}

#[cfg(test)]
#[path = "../disk_tests.rs"]
mod tests;
