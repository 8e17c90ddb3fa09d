-- Bills that are durable here and on their way to the ledger. One file per gateway; numbers have no gaps.
CREATE TABLE outbox_state (
    one        INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    -- The identity of this outbox: a number means nothing without it.
    epoch      TEXT    NOT NULL,
    -- Everything up to here is in the ledger and no longer in outbox_events.
    pruned_seq INTEGER NOT NULL CHECK (pruned_seq >= 0)
) STRICT;

CREATE TABLE outbox_events (
    seq   INTEGER NOT NULL PRIMARY KEY,
    event TEXT    NOT NULL
) STRICT;
