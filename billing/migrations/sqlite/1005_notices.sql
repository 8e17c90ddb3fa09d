-- What customers are to be told, written in the transaction of its cause. Append-only; delivery is somebody else's.
CREATE TABLE notices (
    ordinal       INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    id            TEXT    NOT NULL UNIQUE,
    kind          TEXT    NOT NULL CHECK (kind <> ''),
    account       TEXT    NOT NULL,
    -- What it is about: the id of a budget, an invoice, a grant, or of the account.
    subject       TEXT    NOT NULL,
    -- JSON.
    payload       TEXT    NOT NULL,
    created_at_ms INTEGER NOT NULL,
    -- Names the cause: raised twice, it is written once.
    dedupe_key    TEXT    NOT NULL UNIQUE CHECK (dedupe_key <> '')
) STRICT;

CREATE TRIGGER notices_no_update BEFORE UPDATE ON notices
BEGIN SELECT RAISE(ABORT, 'notices is append-only'); END;
CREATE TRIGGER notices_no_delete BEFORE DELETE ON notices
BEGIN SELECT RAISE(ABORT, 'notices is append-only'); END;

-- At what balance an account's owner wants to be told, and what was told already.
CREATE TABLE account_alerts (
    account          TEXT    NOT NULL PRIMARY KEY REFERENCES billing_accounts (id),
    low_balance_pico INTEGER CHECK (low_balance_pico > 0),
    low_raised       INTEGER NOT NULL CHECK (low_raised IN (0, 1)),
    exhausted_raised INTEGER NOT NULL CHECK (exhausted_raised IN (0, 1)),
    -- Notices raised so far; part of their dedupe keys.
    raised_count     INTEGER NOT NULL CHECK (raised_count >= 0)
) STRICT;
