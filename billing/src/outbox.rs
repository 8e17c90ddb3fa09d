//! The outbox: a local SQLite file in which a bill is durable before the client sees the end of its answer.
//!
//! One task owns the file (WAL, synchronous=FULL, locked against other processes). Bills that arrive while it commits
//! share the next commit, and so one fsync. Sequence numbers have no gaps: a bill that fails takes no number.
//!
//! ```text
//! settle ──append──► [queue] ──► one transaction ──fsync──► reply; the slice books the bill as unshipped
//! shipper ──read, prune──┘
//! ```

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use sqlx::{
    ConnectOptions, Connection, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqliteSynchronous},
};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinHandle,
};
use uuid::Uuid;

use crate::{
    error::{BillingError, SettleError},
    event::UsageEvent,
    lease::{Place, Reserved},
};

/// Another process has this long to let go of the file before opening fails.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Commands that may wait for the task; senders wait when it is full.
const QUEUE: usize = 1024;

/// A bill on its way into the file, with the money that pays for it.
pub(crate) struct Append {
    pub event: UsageEvent,
    pub reserved: Vec<Reserved>,
    pub place: Place,
    pub reply: oneshot::Sender<Result<UsageEvent, SettleError>>,
}

pub(crate) enum Command {
    Append(Box<Append>),
    Read { after: i64, limit: usize, reply: oneshot::Sender<Result<Vec<(i64, UsageEvent)>, BillingError>> },
    Prune { through: i64, reply: oneshot::Sender<Result<(), BillingError>> },
    Close { reply: oneshot::Sender<()> },
}

/// What `/metrics` shows of the outbox.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OutboxStats {
    pub commits: u64,
    pub commit_us_total: u64,
    pub commit_us_max: u64,
    pub settled: u64,
    pub stranded: u64,
}

#[derive(Debug, Default)]
struct Watch {
    stats: OutboxStats,
    /// When each unshipped bill of this process became durable.
    since: VecDeque<(i64, Instant)>,
}

/// A handle on the outbox task.
#[derive(Clone, Debug)]
pub(crate) struct Outbox {
    commands: mpsc::Sender<Command>,
    watch: Arc<Mutex<Watch>>,
    /// Told after every commit that added bills.
    pub appended: Arc<Notify>,
}

/// Where the file stood when it was opened.
#[derive(Clone, Debug)]
pub(crate) struct OutboxState {
    pub epoch: String,
    pub pruned_seq: i64,
    pub last_seq: i64,
}

/// The file, opened and not yet given to its task.
pub(crate) struct OutboxFile {
    conn: SqliteConnection,
    pub state: OutboxState,
}

impl OutboxFile {
    pub async fn open(path: &Path) -> Result<OutboxFile, BillingError> {
        let failed = |source| BillingError::Outbox { path: path.display().to_string(), source };
        let mut conn = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .locking_mode(SqliteLockingMode::Exclusive)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(LOCK_WAIT)
            .connect()
            .await
            .map_err(failed)?;
        let mut migrator = sqlx::migrate!("./migrations/outbox");
        migrator.dangerous_set_table_name("_outbox_migrations");
        migrator.run_direct(None, &mut conn, false).await?;
        sqlx::query(
            "INSERT INTO outbox_state (one, epoch, pruned_seq) VALUES (1, ?, 0) ON CONFLICT DO NOTHING",
        )
        .bind(Uuid::now_v7().to_string())
        .execute(&mut conn)
        .await
        .map_err(failed)?;
        let state = read_state(&mut conn).await.map_err(failed)?;
        Ok(OutboxFile { conn, state })
    }

    /// Begins a new epoch with an empty file: for a copy from before a ledger that knows more of this epoch than it does.
    /// Everything in such a copy has been shipped.
    pub async fn begin_epoch(&mut self) -> Result<(), BillingError> {
        let mut tx = self.conn.begin().await?;
        sqlx::query("DELETE FROM outbox_events").execute(&mut *tx).await?;
        sqlx::query("UPDATE outbox_state SET epoch = ?, pruned_seq = 0")
            .bind(Uuid::now_v7().to_string())
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        self.state = read_state(&mut self.conn).await?;
        Ok(())
    }

    /// Starts the task that owns the file from now on.
    pub fn start(self, commit_events_max: usize) -> (Outbox, JoinHandle<()>) {
        let (commands, queue) = mpsc::channel(QUEUE);
        let outbox = Outbox { commands, watch: Arc::default(), appended: Arc::default() };
        let task = Writer {
            conn: self.conn,
            next_seq: self.state.last_seq + 1,
            watch: outbox.watch.clone(),
            appended: outbox.appended.clone(),
        };
        (outbox, tokio::spawn(task.run(queue, commit_events_max)))
    }
}

async fn read_state(conn: &mut SqliteConnection) -> Result<OutboxState, sqlx::Error> {
    let (epoch, pruned_seq, last_seq) = sqlx::query_as(
        "SELECT epoch, pruned_seq, max(pruned_seq, coalesce((SELECT max(seq) FROM outbox_events), 0)) FROM outbox_state",
    )
    .fetch_one(conn)
    .await?;
    Ok(OutboxState { epoch, pruned_seq, last_seq })
}

impl Outbox {
    /// A place in the queue; what is sent on it cannot be refused any more.
    pub async fn permit(&self) -> Result<mpsc::Permit<'_, Command>, SettleError> {
        self.commands.reserve().await.map_err(|_| SettleError::Closed)
    }

    pub async fn read(&self, after: i64, limit: usize) -> Result<Vec<(i64, UsageEvent)>, BillingError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Read { after, limit, reply }).await?;
        answer.await.map_err(|_| BillingError::Closed)?
    }

    /// Forgets bills that the ledger has.
    pub async fn prune(&self, through: i64) -> Result<(), BillingError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Prune { through, reply }).await?;
        answer.await.map_err(|_| BillingError::Closed)?
    }

    /// Closes the file once everything queued is done.
    pub async fn close(&self) -> Result<(), BillingError> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::Close { reply }).await?;
        answer.await.map_err(|_| BillingError::Closed)
    }

    async fn send(&self, command: Command) -> Result<(), BillingError> {
        self.commands.send(command).await.map_err(|_| BillingError::Closed)
    }

    pub fn stats(&self) -> OutboxStats {
        self.watch.lock().expect("no code panics while it holds the watch").stats
    }

    /// How long the oldest bill waits for the ledger, and how many do.
    pub fn backlog(&self) -> (u64, Duration) {
        let watch = self.watch.lock().expect("no code panics while it holds the watch");
        let oldest = watch.since.front().map_or(Duration::ZERO, |(_, since)| since.elapsed());
        (watch.since.len() as u64, oldest)
    }

    /// The ledger has everything up to here.
    pub fn shipped(&self, through: i64) {
        let mut watch = self.watch.lock().expect("no code panics while it holds the watch");
        while watch.since.front().is_some_and(|(seq, _)| *seq <= through) {
            watch.since.pop_front();
        }
    }
}

struct Writer {
    conn: SqliteConnection,
    next_seq: i64,
    watch: Arc<Mutex<Watch>>,
    appended: Arc<Notify>,
}

impl Writer {
    async fn run(mut self, mut queue: mpsc::Receiver<Command>, commit_events_max: usize) {
        let mut commands = Vec::with_capacity(commit_events_max);
        let mut closing = None;
        while queue.recv_many(&mut commands, commit_events_max).await > 0 {
            let mut appends = Vec::new();
            let mut others = Vec::new();
            for command in commands.drain(..) {
                match command {
                    Command::Append(append) => appends.push(*append),
                    other => others.push(other),
                }
            }
            if !appends.is_empty() {
                self.append(appends).await;
            }
            for command in others {
                match command {
                    Command::Read { after, limit, reply } => drop(reply.send(self.read(after, limit).await)),
                    Command::Prune { through, reply } => drop(reply.send(self.prune(through).await)),
                    Command::Close { reply } => {
                        queue.close();
                        closing = Some(reply);
                    }
                    Command::Append(_) => unreachable!("appends were taken out above"),
                }
            }
        }
        if let Err(error) = self.conn.close().await {
            tracing::warn!(%error, "the outbox did not close cleanly; nothing is lost");
        }
        if let Some(reply) = closing {
            let _ = reply.send(());
        }
    }

    /// Commits a group of bills together and tells each what became of it.
    async fn append(&mut self, appends: Vec<Append>) {
        let begun = Instant::now();
        let committed = self.commit(&appends).await;
        let elapsed = begun.elapsed();
        let first_seq = self.next_seq;
        if committed.is_ok() {
            self.next_seq += appends.len() as i64;
        }
        {
            let mut watch = self.watch.lock().expect("no code panics while it holds the watch");
            let count = appends.len() as u64;
            let us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
            watch.stats.commits += 1;
            watch.stats.commit_us_total += us;
            watch.stats.commit_us_max = watch.stats.commit_us_max.max(us);
            match &committed {
                Ok(()) => {
                    watch.stats.settled += count;
                    let now = Instant::now();
                    watch.since.extend((first_seq..self.next_seq).map(|seq| (seq, now)));
                }
                Err(_) => watch.stats.stranded += count,
            }
        }
        match committed {
            Ok(()) => {
                for Append { event, reserved, place, reply } in appends {
                    reserved.into_iter().for_each(|reserved| reserved.settle(event.cost));
                    place.keep();
                    drop(reply.send(Ok(event)));
                }
                self.appended.notify_one();
            }
            Err(error) => {
                tracing::error!(%error, bills = appends.len(), "the outbox did not take bills; their money stays held");
                let error = Arc::new(error);
                for Append { reserved, place, reply, .. } in appends {
                    reserved.into_iter().for_each(Reserved::strand);
                    place.strand();
                    drop(reply.send(Err(SettleError::Outbox(error.clone()))));
                }
                self.resync().await;
            }
        }
    }

    async fn commit(&mut self, appends: &[Append]) -> Result<(), sqlx::Error> {
        let mut tx = self.conn.begin_with("BEGIN IMMEDIATE").await?;
        for (seq, append) in (self.next_seq..).zip(appends) {
            let event = serde_json::to_string(&append.event).expect("a usage event is plain data");
            sqlx::query("INSERT INTO outbox_events (seq, event) VALUES (?, ?)")
                .bind(seq)
                .bind(event)
                .execute(&mut *tx)
                .await?;
        }
        tx.commit().await
    }

    /// After a failed commit only the file knows which numbers are taken.
    async fn resync(&mut self) {
        match read_state(&mut self.conn).await {
            Ok(state) => self.next_seq = state.last_seq + 1,
            Err(error) => tracing::error!(%error, "the outbox cannot be read"),
        }
    }

    async fn read(&mut self, after: i64, limit: usize) -> Result<Vec<(i64, UsageEvent)>, BillingError> {
        let rows: Vec<(i64, String)> =
            sqlx::query_as("SELECT seq, event FROM outbox_events WHERE seq > ? ORDER BY seq LIMIT ?")
                .bind(after)
                .bind(i64::try_from(limit).unwrap_or(i64::MAX))
                .fetch_all(&mut self.conn)
                .await?;
        let parse = |(seq, json): (i64, String)| match serde_json::from_str(&json) {
            Ok(event) => Ok((seq, event)),
            Err(error) => Err(BillingError::Corrupt { table: "outbox_events", source: error.into() }),
        };
        rows.into_iter().map(parse).collect()
    }

    async fn prune(&mut self, through: i64) -> Result<(), BillingError> {
        let mut tx = self.conn.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query("DELETE FROM outbox_events WHERE seq <= ?").bind(through).execute(&mut *tx).await?;
        sqlx::query("UPDATE outbox_state SET pruned_seq = max(pruned_seq, ?)")
            .bind(through)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(())
    }
}
