-- Credit that expires, and what is drawn up at the end of a month. Facts are append-only: triggers refuse UPDATE and DELETE.

ALTER TABLE credit_grants ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
-- NULL: never.
ALTER TABLE credit_grants ADD COLUMN expires_at_s INTEGER;
CREATE INDEX credit_grants_by_account ON credit_grants (account, transaction_id);
CREATE INDEX credit_grants_by_expiry ON credit_grants (expires_at_s) WHERE expires_at_s IS NOT NULL;

-- More kinds of transactions. A CHECK cannot be altered: the table is made anew under its name, its rows kept.
PRAGMA defer_foreign_keys = ON;
CREATE TEMP TABLE kept_transactions AS SELECT * FROM ledger_transactions;
DROP TABLE ledger_transactions;
CREATE TABLE ledger_transactions (
    id        INTEGER NOT NULL PRIMARY KEY,
    kind      TEXT    NOT NULL CHECK (kind IN ('grant', 'usage', 'write_off', 'expiry', 'adjustment', 'invoice', 'payment', 'credit_note', 'refund')),
    account   TEXT    NOT NULL REFERENCES billing_accounts (id),
    -- The UTC minute that usage was admitted in; of all others the moment itself.
    at_s      INTEGER NOT NULL,
    -- Where it comes from: the grant's id, the outbox epoch and sequence numbers of the batch, the number of an invoice.
    reference TEXT    NOT NULL
) STRICT;
INSERT INTO ledger_transactions SELECT id, kind, account, at_s, reference FROM kept_transactions;
DROP TABLE kept_transactions;
CREATE INDEX ledger_transactions_by_account ON ledger_transactions (account, id);
CREATE TRIGGER ledger_transactions_balance BEFORE INSERT ON ledger_transactions
BEGIN
    SELECT RAISE(ABORT, 'a ledger transaction needs at least two entries')
     WHERE (SELECT count(*) FROM ledger_entries WHERE transaction_id = NEW.id) < 2;
    SELECT RAISE(ABORT, 'a ledger transaction must sum to zero')
      FROM ledger_entries WHERE transaction_id = NEW.id GROUP BY currency HAVING sum(amount_pico) <> 0;
END;
CREATE TRIGGER ledger_transactions_no_update BEFORE UPDATE ON ledger_transactions
BEGIN SELECT RAISE(ABORT, 'ledger_transactions is append-only'); END;
CREATE TRIGGER ledger_transactions_no_delete BEFORE DELETE ON ledger_transactions
BEGIN SELECT RAISE(ABORT, 'ledger_transactions is append-only'); END;

-- What expired of a grant, in as many parts as it took; done: nothing is left of it.
CREATE TABLE credit_expiries (
    grant_id       TEXT    NOT NULL REFERENCES credit_grants (id),
    part           INTEGER NOT NULL CHECK (part > 0),
    amount_pico    INTEGER NOT NULL CHECK (amount_pico >= 0),
    done           INTEGER NOT NULL CHECK (done IN (0, 1)),
    expired_at_s   INTEGER NOT NULL,
    -- NULL where nothing was left.
    transaction_id INTEGER UNIQUE REFERENCES ledger_transactions (id),
    PRIMARY KEY (grant_id, part),
    CHECK ((amount_pico = 0) = (transaction_id IS NULL))
) STRICT, WITHOUT ROWID;
CREATE TRIGGER credit_expiries_no_update BEFORE UPDATE ON credit_expiries
BEGIN SELECT RAISE(ABORT, 'credit_expiries is append-only'); END;
CREATE TRIGGER credit_expiries_no_delete BEFORE DELETE ON credit_expiries
BEGIN SELECT RAISE(ABORT, 'credit_expiries is append-only'); END;

-- To whom an account's invoices go. Rows change; each invoice keeps what it was issued with.
CREATE TABLE billing_profiles (
    account      TEXT    NOT NULL PRIMARY KEY REFERENCES billing_accounts (id),
    -- JSON: name, address, country, region, tax_id, email.
    party        TEXT    NOT NULL,
    -- Why no tax is charged; NULL where it is.
    tax_exempt   TEXT,
    updated_at_s INTEGER NOT NULL
) STRICT;

-- Up to which moment an outbox has shipped everything that was admitted before it.
CREATE TABLE outbox_horizons (
    epoch         TEXT    NOT NULL PRIMARY KEY REFERENCES ship_state (epoch),
    through_s     INTEGER NOT NULL,
    reported_at_s INTEGER NOT NULL
) STRICT;

-- The last number given out in each series. Taken in the transaction that uses it, so numbers have no gaps.
CREATE TABLE number_series (
    series TEXT    NOT NULL PRIMARY KEY,
    last   INTEGER NOT NULL CHECK (last > 0)
) STRICT;

CREATE TABLE invoices (
    number       TEXT    NOT NULL PRIMARY KEY,
    series       TEXT    NOT NULL,
    ordinal      INTEGER NOT NULL CHECK (ordinal > 0),
    kind         TEXT    NOT NULL CHECK (kind IN ('invoice', 'statement')),
    account      TEXT    NOT NULL REFERENCES billing_accounts (id),
    -- YYYY-MM.
    period       TEXT    NOT NULL,
    issued_at_s  INTEGER NOT NULL,
    due_at_s     INTEGER NOT NULL,
    -- JSON, as they were when it was issued.
    issuer       TEXT    NOT NULL,
    customer     TEXT    NOT NULL,
    tax_note     TEXT,
    due_pico     INTEGER NOT NULL CHECK (due_pico >= 0 AND due_pico % 10000000000 = 0),
    -- The part of it that the account's balance owes: usage, exact. The rest, tax and rounding, is in receivable:ACCOUNT.
    net_due_pico INTEGER NOT NULL CHECK (net_due_pico >= 0),
    UNIQUE (series, ordinal),
    UNIQUE (account, period)
) STRICT;
CREATE TRIGGER invoices_no_update BEFORE UPDATE ON invoices
BEGIN SELECT RAISE(ABORT, 'invoices is append-only'); END;
CREATE TRIGGER invoices_no_delete BEFORE DELETE ON invoices
BEGIN SELECT RAISE(ABORT, 'invoices is append-only'); END;

CREATE TABLE invoice_lines (
    invoice      TEXT    NOT NULL REFERENCES invoices (number) DEFERRABLE INITIALLY DEFERRED,
    position     INTEGER NOT NULL CHECK (position > 0),
    kind         TEXT    NOT NULL CHECK (kind IN ('usage', 'late_usage', 'adjustment', 'credit', 'tax')),
    period       TEXT    NOT NULL,
    description  TEXT    NOT NULL,
    project      TEXT    NOT NULL,
    model        TEXT    NOT NULL,
    sku          TEXT    NOT NULL,
    unit         TEXT    NOT NULL,
    quantity     INTEGER NOT NULL CHECK (quantity >= 0),
    exact_pico   INTEGER NOT NULL,
    amount_pico  INTEGER NOT NULL CHECK (amount_pico % 10000000000 = 0),
    tax_category TEXT    NOT NULL,
    -- Millionths; NULL where the line is not a tax.
    tax_rate     INTEGER,
    PRIMARY KEY (invoice, position)
) STRICT, WITHOUT ROWID;
-- Lines are written before their invoice, whose row seals them.
CREATE TRIGGER invoice_lines_sealed BEFORE INSERT ON invoice_lines
WHEN EXISTS (SELECT 1 FROM invoices WHERE number = NEW.invoice)
BEGIN SELECT RAISE(ABORT, 'an issued invoice takes no more lines'); END;
CREATE TRIGGER invoice_lines_no_update BEFORE UPDATE ON invoice_lines
BEGIN SELECT RAISE(ABORT, 'invoice_lines is append-only'); END;
CREATE TRIGGER invoice_lines_no_delete BEFORE DELETE ON invoice_lines
BEGIN SELECT RAISE(ABORT, 'invoice_lines is append-only'); END;

-- One closed month of an account: which events and transactions it has taken, and what is left for the next.
CREATE TABLE closed_periods (
    account          TEXT    NOT NULL REFERENCES billing_accounts (id),
    period           TEXT    NOT NULL,
    closed_at_s      INTEGER NOT NULL,
    -- The last numbers that the ledger had given out.
    last_event       INTEGER NOT NULL,
    -- Every event up to here is on this invoice or an earlier one.
    settled_through  INTEGER NOT NULL,
    last_transaction INTEGER NOT NULL,
    -- JSON: what is left of each grant, and what was used of months that are not closed.
    checkpoint       TEXT    NOT NULL,
    -- NULL where there was nothing to tell.
    invoice          TEXT    UNIQUE REFERENCES invoices (number),
    -- SHA-256 of the invoice; empty without one.
    digest           TEXT    NOT NULL,
    PRIMARY KEY (account, period)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER closed_periods_no_update BEFORE UPDATE ON closed_periods
BEGIN SELECT RAISE(ABORT, 'closed_periods is append-only'); END;
CREATE TRIGGER closed_periods_no_delete BEFORE DELETE ON closed_periods
BEGIN SELECT RAISE(ABORT, 'closed_periods is append-only'); END;

CREATE TABLE invoice_payments (
    id             TEXT    NOT NULL PRIMARY KEY,
    invoice        TEXT    NOT NULL REFERENCES invoices (number),
    amount_pico    INTEGER NOT NULL CHECK (amount_pico > 0),
    -- What of it went to the account's balance.
    net_pico       INTEGER NOT NULL CHECK (net_pico >= 0),
    memo           TEXT    NOT NULL,
    paid_at_s      INTEGER NOT NULL,
    transaction_id INTEGER NOT NULL UNIQUE REFERENCES ledger_transactions (id)
) STRICT;
CREATE INDEX invoice_payments_by_invoice ON invoice_payments (invoice);
CREATE TRIGGER invoice_payments_no_update BEFORE UPDATE ON invoice_payments
BEGIN SELECT RAISE(ABORT, 'invoice_payments is append-only'); END;
CREATE TRIGGER invoice_payments_no_delete BEFORE DELETE ON invoice_payments
BEGIN SELECT RAISE(ABORT, 'invoice_payments is append-only'); END;

CREATE TABLE credit_notes (
    number         TEXT    NOT NULL PRIMARY KEY,
    series         TEXT    NOT NULL,
    ordinal        INTEGER NOT NULL CHECK (ordinal > 0),
    id             TEXT    NOT NULL UNIQUE,
    invoice        TEXT    NOT NULL REFERENCES invoices (number),
    -- The line that it is about; NULL: the invoice as a whole.
    position       INTEGER,
    amount_pico    INTEGER NOT NULL CHECK (amount_pico > 0 AND amount_pico % 10000000000 = 0),
    -- The tax in it.
    tax_pico       INTEGER NOT NULL CHECK (tax_pico >= 0 AND tax_pico <= amount_pico),
    -- What of it lowered what was still due, and what of that the account's balance owed. The rest became credit.
    applied_pico   INTEGER NOT NULL CHECK (applied_pico >= 0 AND applied_pico <= amount_pico),
    net_pico       INTEGER NOT NULL CHECK (net_pico >= 0),
    reason         TEXT    NOT NULL,
    issued_at_s    INTEGER NOT NULL,
    transaction_id INTEGER NOT NULL UNIQUE REFERENCES ledger_transactions (id),
    UNIQUE (series, ordinal)
) STRICT;
CREATE INDEX credit_notes_by_invoice ON credit_notes (invoice);
CREATE TRIGGER credit_notes_no_update BEFORE UPDATE ON credit_notes
BEGIN SELECT RAISE(ABORT, 'credit_notes is append-only'); END;
CREATE TRIGGER credit_notes_no_delete BEFORE DELETE ON credit_notes
BEGIN SELECT RAISE(ABORT, 'credit_notes is append-only'); END;

-- A close reads one account's events in order.
CREATE INDEX usage_events_by_account ON usage_events (account, ordinal);
