-- The books. Amounts are integers of 10^-12 dollars. Facts are append-only: triggers refuse UPDATE and DELETE.

-- Who pays. posted and leased are caches of the folds over ledger_entries and leases; the audit compares them.
CREATE TABLE billing_accounts (
    id                TEXT    NOT NULL PRIMARY KEY CHECK (id <> ''),
    kind              TEXT    NOT NULL CHECK (kind IN ('prepaid', 'postpaid')),
    currency          TEXT    NOT NULL DEFAULT 'USD' CHECK (currency = 'USD'),
    credit_limit_pico INTEGER NOT NULL CHECK (credit_limit_pico >= 0),
    posted_pico       INTEGER NOT NULL DEFAULT 0,
    leased_pico       INTEGER NOT NULL DEFAULT 0 CHECK (leased_pico >= 0),
    CHECK (kind = 'postpaid' OR credit_limit_pico = 0),
    -- The hard cap: whatever the code does, the database takes no state in which it is broken.
    CONSTRAINT hard_cap CHECK (posted_pico + credit_limit_pico - leased_pico >= 0)
) STRICT;

-- A transaction's row is written after its entries and seals them: the sum is checked then, and no entry may follow.
CREATE TABLE ledger_transactions (
    id        INTEGER NOT NULL PRIMARY KEY,
    kind      TEXT    NOT NULL CHECK (kind IN ('grant', 'usage', 'write_off')),
    account   TEXT    NOT NULL REFERENCES billing_accounts (id),
    -- The moment of a grant; the UTC minute that usage was admitted in.
    at_s      INTEGER NOT NULL,
    -- Where it comes from: the grant's id, or the outbox epoch and sequence numbers of the batch.
    reference TEXT    NOT NULL
) STRICT;

CREATE TABLE ledger_entries (
    transaction_id INTEGER NOT NULL REFERENCES ledger_transactions (id) DEFERRABLE INITIALLY DEFERRED,
    -- customer:ACCOUNT, revenue:SKU, funding or write_off.
    book           TEXT    NOT NULL,
    currency       TEXT    NOT NULL DEFAULT 'USD' CHECK (currency = 'USD'),
    amount_pico    INTEGER NOT NULL CHECK (amount_pico <> 0),
    PRIMARY KEY (transaction_id, book, currency)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER ledger_transactions_balance BEFORE INSERT ON ledger_transactions
BEGIN
    SELECT RAISE(ABORT, 'a ledger transaction needs at least two entries')
     WHERE (SELECT count(*) FROM ledger_entries WHERE transaction_id = NEW.id) < 2;
    SELECT RAISE(ABORT, 'a ledger transaction must sum to zero')
      FROM ledger_entries WHERE transaction_id = NEW.id GROUP BY currency HAVING sum(amount_pico) <> 0;
END;

CREATE TRIGGER ledger_entries_sealed BEFORE INSERT ON ledger_entries
WHEN EXISTS (SELECT 1 FROM ledger_transactions WHERE id = NEW.transaction_id)
BEGIN SELECT RAISE(ABORT, 'a posted ledger transaction takes no more entries'); END;

CREATE TRIGGER ledger_transactions_no_update BEFORE UPDATE ON ledger_transactions
BEGIN SELECT RAISE(ABORT, 'ledger_transactions is append-only'); END;
CREATE TRIGGER ledger_transactions_no_delete BEFORE DELETE ON ledger_transactions
BEGIN SELECT RAISE(ABORT, 'ledger_transactions is append-only'); END;
CREATE TRIGGER ledger_entries_no_update BEFORE UPDATE ON ledger_entries
BEGIN SELECT RAISE(ABORT, 'ledger_entries is append-only'); END;
CREATE TRIGGER ledger_entries_no_delete BEFORE DELETE ON ledger_entries
BEGIN SELECT RAISE(ABORT, 'ledger_entries is append-only'); END;

CREATE TABLE credit_grants (
    id             TEXT    NOT NULL PRIMARY KEY,
    account        TEXT    NOT NULL REFERENCES billing_accounts (id),
    amount_pico    INTEGER NOT NULL CHECK (amount_pico > 0),
    memo           TEXT    NOT NULL,
    granted_at_s   INTEGER NOT NULL,
    transaction_id INTEGER NOT NULL UNIQUE REFERENCES ledger_transactions (id)
) STRICT;

CREATE TRIGGER credit_grants_no_update BEFORE UPDATE ON credit_grants
BEGIN SELECT RAISE(ABORT, 'credit_grants is append-only'); END;
CREATE TRIGGER credit_grants_no_delete BEFORE DELETE ON credit_grants
BEGIN SELECT RAISE(ABORT, 'credit_grants is append-only'); END;

-- Money that a gateway may spend without asking. The holder is the identity of its outbox, which survives renames.
CREATE TABLE leases (
    holder       TEXT    NOT NULL,
    account      TEXT    NOT NULL REFERENCES billing_accounts (id),
    gateway      TEXT    NOT NULL,
    amount_pico  INTEGER NOT NULL CHECK (amount_pico >= 0),
    expires_at_s INTEGER NOT NULL,
    PRIMARY KEY (holder, account)
) STRICT, WITHOUT ROWID;

CREATE TABLE price_books (
    ordinal          INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    hash             TEXT    NOT NULL UNIQUE CHECK (length(hash) = 64),
    effective_from_s INTEGER NOT NULL,
    canonical        TEXT    NOT NULL
) STRICT;

CREATE TRIGGER price_books_no_update BEFORE UPDATE ON price_books
BEGIN SELECT RAISE(ABORT, 'price_books is append-only'); END;
CREATE TRIGGER price_books_no_delete BEFORE DELETE ON price_books
BEGIN SELECT RAISE(ABORT, 'price_books is append-only'); END;

-- How far each outbox has been shipped, moved in the transaction that posts the batch.
CREATE TABLE ship_state (
    epoch    TEXT    NOT NULL PRIMARY KEY,
    gateway  TEXT    NOT NULL,
    last_seq INTEGER NOT NULL CHECK (last_seq >= 0)
) STRICT;

CREATE TABLE usage_events (
    request_id             TEXT    NOT NULL UNIQUE,
    epoch                  TEXT    NOT NULL REFERENCES ship_state (epoch),
    seq                    INTEGER NOT NULL CHECK (seq > 0),
    account                TEXT    NOT NULL REFERENCES billing_accounts (id),
    org                    TEXT    NOT NULL,
    project                TEXT    NOT NULL,
    api_key                TEXT    NOT NULL,
    end_user               TEXT    NOT NULL,
    model                  TEXT    NOT NULL,
    node                   TEXT    NOT NULL,
    input_tokens           INTEGER NOT NULL CHECK (input_tokens >= 0),
    cached_input_tokens    INTEGER NOT NULL CHECK (cached_input_tokens >= 0),
    output_tokens          INTEGER NOT NULL CHECK (output_tokens >= 0),
    overrun_tokens         INTEGER NOT NULL CHECK (overrun_tokens >= 0),
    finish_reason          TEXT    NOT NULL,
    time_to_first_token_ms INTEGER,
    duration_ms            INTEGER NOT NULL,
    admitted_at_ms         INTEGER NOT NULL,
    price_book             TEXT    NOT NULL REFERENCES price_books (hash),
    cost_pico              INTEGER NOT NULL CHECK (cost_pico >= 0),
    PRIMARY KEY (epoch, seq)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER usage_events_no_update BEFORE UPDATE ON usage_events
BEGIN SELECT RAISE(ABORT, 'usage_events is append-only'); END;
CREATE TRIGGER usage_events_no_delete BEFORE DELETE ON usage_events
BEGIN SELECT RAISE(ABORT, 'usage_events is append-only'); END;

-- The tripwire's evidence: bills whose request id had one already. Never posted; the audit reports each.
CREATE TABLE usage_duplicates (
    epoch      TEXT    NOT NULL,
    seq        INTEGER NOT NULL,
    request_id TEXT    NOT NULL,
    event      TEXT    NOT NULL,
    PRIMARY KEY (epoch, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE usage_rollups_1d (
    day                 TEXT    NOT NULL,
    account             TEXT    NOT NULL,
    org                 TEXT    NOT NULL,
    project             TEXT    NOT NULL,
    api_key             TEXT    NOT NULL,
    model               TEXT    NOT NULL,
    requests            INTEGER NOT NULL,
    input_tokens        INTEGER NOT NULL,
    cached_input_tokens INTEGER NOT NULL,
    output_tokens       INTEGER NOT NULL,
    cost_pico           INTEGER NOT NULL,
    PRIMARY KEY (day, account, org, project, api_key, model)
) STRICT, WITHOUT ROWID;
