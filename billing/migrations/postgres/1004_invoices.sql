-- Credit that expires, and what is drawn up at the end of a month. Facts are append-only: triggers refuse UPDATE and DELETE.

ALTER TABLE credit_grants ADD COLUMN priority BIGINT NOT NULL DEFAULT 0;
-- NULL: never.
ALTER TABLE credit_grants ADD COLUMN expires_at_s BIGINT;
CREATE INDEX credit_grants_by_account ON credit_grants (account, transaction_id);
CREATE INDEX credit_grants_by_expiry ON credit_grants (expires_at_s) WHERE expires_at_s IS NOT NULL;

-- More kinds of transactions.
ALTER TABLE ledger_transactions DROP CONSTRAINT ledger_transactions_kind_check;
ALTER TABLE ledger_transactions ADD CONSTRAINT ledger_transactions_kind_check
CHECK (kind IN ('grant', 'usage', 'write_off', 'expiry', 'adjustment', 'invoice', 'payment', 'credit_note', 'refund'));
CREATE INDEX ledger_transactions_by_account ON ledger_transactions (account, id);

-- What expired of a grant, in as many parts as it took; done: nothing is left of it.
CREATE TABLE credit_expiries (
    grant_id       TEXT   NOT NULL REFERENCES credit_grants (id),
    part           BIGINT NOT NULL CHECK (part > 0),
    amount_pico    BIGINT NOT NULL CHECK (amount_pico >= 0),
    done           BIGINT NOT NULL CHECK (done IN (0, 1)),
    expired_at_s   BIGINT NOT NULL,
    -- NULL where nothing was left.
    transaction_id BIGINT UNIQUE REFERENCES ledger_transactions (id),
    PRIMARY KEY (grant_id, part),
    CHECK ((amount_pico = 0) = (transaction_id IS NULL))
);
CREATE TRIGGER credit_expiries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_expiries
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- To whom an account's invoices go. Rows change; each invoice keeps what it was issued with.
CREATE TABLE billing_profiles (
    account      TEXT   NOT NULL PRIMARY KEY REFERENCES billing_accounts (id),
    -- JSON: name, address, country, region, tax_id, email.
    party        TEXT   NOT NULL,
    -- Why no tax is charged; NULL where it is.
    tax_exempt   TEXT,
    updated_at_s BIGINT NOT NULL
);

-- Up to which moment an outbox has shipped everything that was admitted before it.
CREATE TABLE outbox_horizons (
    epoch         TEXT   NOT NULL PRIMARY KEY REFERENCES ship_state (epoch),
    through_s     BIGINT NOT NULL,
    reported_at_s BIGINT NOT NULL
);

-- The last number given out in each series. Taken in the transaction that uses it, so numbers have no gaps.
CREATE TABLE number_series (
    series TEXT   NOT NULL PRIMARY KEY,
    last   BIGINT NOT NULL CHECK (last > 0)
);

CREATE TABLE invoices (
    number       TEXT   NOT NULL PRIMARY KEY,
    series       TEXT   NOT NULL,
    ordinal      BIGINT NOT NULL CHECK (ordinal > 0),
    kind         TEXT   NOT NULL CHECK (kind IN ('invoice', 'statement')),
    account      TEXT   NOT NULL REFERENCES billing_accounts (id),
    -- YYYY-MM.
    period       TEXT   NOT NULL,
    issued_at_s  BIGINT NOT NULL,
    due_at_s     BIGINT NOT NULL,
    -- JSON, as they were when it was issued.
    issuer       TEXT   NOT NULL,
    customer     TEXT   NOT NULL,
    tax_note     TEXT,
    due_pico     BIGINT NOT NULL CHECK (due_pico >= 0 AND due_pico % 10000000000 = 0),
    -- The part of it that the account's balance owes: usage, exact. The rest, tax and rounding, is in receivable:ACCOUNT.
    net_due_pico BIGINT NOT NULL CHECK (net_due_pico >= 0),
    UNIQUE (series, ordinal),
    UNIQUE (account, period)
);
CREATE TRIGGER invoices_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoices
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE invoice_lines (
    invoice      TEXT   NOT NULL REFERENCES invoices (number) DEFERRABLE INITIALLY DEFERRED,
    position     BIGINT NOT NULL CHECK (position > 0),
    kind         TEXT   NOT NULL CHECK (kind IN ('usage', 'late_usage', 'adjustment', 'credit', 'tax')),
    period       TEXT   NOT NULL,
    description  TEXT   NOT NULL,
    project      TEXT   NOT NULL,
    model        TEXT   NOT NULL,
    sku          TEXT   NOT NULL,
    unit         TEXT   NOT NULL,
    quantity     BIGINT NOT NULL CHECK (quantity >= 0),
    exact_pico   BIGINT NOT NULL,
    amount_pico  BIGINT NOT NULL CHECK (amount_pico % 10000000000 = 0),
    tax_category TEXT   NOT NULL,
    -- Millionths; NULL where the line is not a tax.
    tax_rate     BIGINT,
    PRIMARY KEY (invoice, position)
);
-- Lines are written before their invoice, whose row seals them.
CREATE FUNCTION invoice_lines_sealed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM invoices WHERE number = NEW.invoice) THEN
        RAISE EXCEPTION 'an issued invoice takes no more lines';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER invoice_lines_sealed BEFORE INSERT ON invoice_lines
FOR EACH ROW EXECUTE FUNCTION invoice_lines_sealed();
CREATE TRIGGER invoice_lines_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoice_lines
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- One closed month of an account: which events and transactions it has taken, and what is left for the next.
CREATE TABLE closed_periods (
    account          TEXT   NOT NULL REFERENCES billing_accounts (id),
    period           TEXT   NOT NULL,
    closed_at_s      BIGINT NOT NULL,
    -- The last numbers that the ledger had given out.
    last_event       BIGINT NOT NULL,
    -- Every event up to here is on this invoice or an earlier one.
    settled_through  BIGINT NOT NULL,
    last_transaction BIGINT NOT NULL,
    -- JSON: what is left of each grant, and what was used of months that are not closed.
    checkpoint       TEXT   NOT NULL,
    -- NULL where there was nothing to tell.
    invoice          TEXT   UNIQUE REFERENCES invoices (number),
    -- SHA-256 of the invoice; empty without one.
    digest           TEXT   NOT NULL,
    PRIMARY KEY (account, period)
);
CREATE TRIGGER closed_periods_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON closed_periods
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE invoice_payments (
    id             TEXT   NOT NULL PRIMARY KEY,
    invoice        TEXT   NOT NULL REFERENCES invoices (number),
    amount_pico    BIGINT NOT NULL CHECK (amount_pico > 0),
    -- What of it went to the account's balance.
    net_pico       BIGINT NOT NULL CHECK (net_pico >= 0),
    memo           TEXT   NOT NULL,
    paid_at_s      BIGINT NOT NULL,
    transaction_id BIGINT NOT NULL UNIQUE REFERENCES ledger_transactions (id)
);
CREATE INDEX invoice_payments_by_invoice ON invoice_payments (invoice);
CREATE TRIGGER invoice_payments_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON invoice_payments
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE credit_notes (
    number         TEXT   NOT NULL PRIMARY KEY,
    series         TEXT   NOT NULL,
    ordinal        BIGINT NOT NULL CHECK (ordinal > 0),
    id             TEXT   NOT NULL UNIQUE,
    invoice        TEXT   NOT NULL REFERENCES invoices (number),
    -- The line that it is about; NULL: the invoice as a whole.
    position       BIGINT,
    amount_pico    BIGINT NOT NULL CHECK (amount_pico > 0 AND amount_pico % 10000000000 = 0),
    -- The tax in it.
    tax_pico       BIGINT NOT NULL CHECK (tax_pico >= 0 AND tax_pico <= amount_pico),
    -- What of it lowered what was still due, and what of that the account's balance owed. The rest became credit.
    applied_pico   BIGINT NOT NULL CHECK (applied_pico >= 0 AND applied_pico <= amount_pico),
    net_pico       BIGINT NOT NULL CHECK (net_pico >= 0),
    reason         TEXT   NOT NULL,
    issued_at_s    BIGINT NOT NULL,
    transaction_id BIGINT NOT NULL UNIQUE REFERENCES ledger_transactions (id),
    UNIQUE (series, ordinal)
);
CREATE INDEX credit_notes_by_invoice ON credit_notes (invoice);
CREATE TRIGGER credit_notes_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_notes
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- A close reads one account's events in order.
CREATE INDEX usage_events_by_account ON usage_events (account, ordinal);
