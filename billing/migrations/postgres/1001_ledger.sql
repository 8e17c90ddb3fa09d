-- The books. Amounts are integers of 10^-12 dollars. Facts are append-only: triggers refuse UPDATE and DELETE.

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME; END $$;

-- Who pays. posted and leased are caches of the folds over ledger_entries and leases; the audit compares them.
CREATE TABLE billing_accounts (
    id                TEXT   NOT NULL PRIMARY KEY CHECK (id <> ''),
    kind              TEXT   NOT NULL CHECK (kind IN ('prepaid', 'postpaid')),
    currency          TEXT   NOT NULL DEFAULT 'USD' CHECK (currency = 'USD'),
    credit_limit_pico BIGINT NOT NULL CHECK (credit_limit_pico >= 0),
    posted_pico       BIGINT NOT NULL DEFAULT 0,
    leased_pico       BIGINT NOT NULL DEFAULT 0 CHECK (leased_pico >= 0),
    CHECK (kind = 'postpaid' OR credit_limit_pico = 0),
    -- The hard cap: whatever the code does, the database takes no state in which it is broken.
    CONSTRAINT hard_cap CHECK (posted_pico::numeric + credit_limit_pico - leased_pico >= 0)
);

-- A transaction's row is written after its entries and seals them: the sum is checked then, and no entry may follow.
CREATE TABLE ledger_transactions (
    id        BIGINT NOT NULL PRIMARY KEY,
    kind      TEXT   NOT NULL CHECK (kind IN ('grant', 'usage', 'write_off')),
    account   TEXT   NOT NULL REFERENCES billing_accounts (id),
    -- The moment of a grant; the UTC minute that usage was admitted in.
    at_s      BIGINT NOT NULL,
    -- Where it comes from: the grant's id, or the outbox epoch and sequence numbers of the batch.
    reference TEXT   NOT NULL
);

CREATE TABLE ledger_entries (
    transaction_id BIGINT NOT NULL REFERENCES ledger_transactions (id) DEFERRABLE INITIALLY DEFERRED,
    -- customer:ACCOUNT, revenue:SKU, funding or write_off.
    book           TEXT   NOT NULL,
    currency       TEXT   NOT NULL DEFAULT 'USD' CHECK (currency = 'USD'),
    amount_pico    BIGINT NOT NULL CHECK (amount_pico <> 0),
    PRIMARY KEY (transaction_id, book, currency)
);

CREATE FUNCTION ledger_transactions_balance() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT count(*) FROM ledger_entries WHERE transaction_id = NEW.id) < 2 THEN
        RAISE EXCEPTION 'a ledger transaction needs at least two entries';
    END IF;
    IF EXISTS (SELECT 1 FROM ledger_entries WHERE transaction_id = NEW.id GROUP BY currency HAVING sum(amount_pico) <> 0) THEN
        RAISE EXCEPTION 'a ledger transaction must sum to zero';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER ledger_transactions_balance BEFORE INSERT ON ledger_transactions
FOR EACH ROW EXECUTE FUNCTION ledger_transactions_balance();

CREATE FUNCTION ledger_entries_sealed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM ledger_transactions WHERE id = NEW.transaction_id) THEN
        RAISE EXCEPTION 'a posted ledger transaction takes no more entries';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER ledger_entries_sealed BEFORE INSERT ON ledger_entries
FOR EACH ROW EXECUTE FUNCTION ledger_entries_sealed();

CREATE TRIGGER ledger_transactions_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_transactions
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_entries_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger_entries
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE credit_grants (
    id             TEXT   NOT NULL PRIMARY KEY,
    account        TEXT   NOT NULL REFERENCES billing_accounts (id),
    amount_pico    BIGINT NOT NULL CHECK (amount_pico > 0),
    memo           TEXT   NOT NULL,
    granted_at_s   BIGINT NOT NULL,
    transaction_id BIGINT NOT NULL UNIQUE REFERENCES ledger_transactions (id)
);
CREATE TRIGGER credit_grants_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON credit_grants
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE price_books (
    ordinal          BIGINT NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hash             TEXT   NOT NULL UNIQUE CHECK (length(hash) = 64),
    effective_from_s BIGINT NOT NULL,
    canonical        TEXT   NOT NULL
);
CREATE TRIGGER price_books_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON price_books
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- How far each outbox has been shipped, moved in the transaction that posts the batch.
CREATE TABLE ship_state (
    epoch    TEXT   NOT NULL PRIMARY KEY,
    gateway  TEXT   NOT NULL,
    last_seq BIGINT NOT NULL CHECK (last_seq >= 0)
);

CREATE TABLE usage_events (
    request_id             TEXT   NOT NULL UNIQUE,
    epoch                  TEXT   NOT NULL REFERENCES ship_state (epoch),
    seq                    BIGINT NOT NULL CHECK (seq > 0),
    account                TEXT   NOT NULL REFERENCES billing_accounts (id),
    org                    TEXT   NOT NULL,
    project                TEXT   NOT NULL,
    api_key                TEXT   NOT NULL,
    end_user               TEXT   NOT NULL,
    model                  TEXT   NOT NULL,
    node                   TEXT   NOT NULL,
    input_tokens           BIGINT NOT NULL CHECK (input_tokens >= 0),
    cached_input_tokens    BIGINT NOT NULL CHECK (cached_input_tokens >= 0),
    output_tokens          BIGINT NOT NULL CHECK (output_tokens >= 0),
    overrun_tokens         BIGINT NOT NULL CHECK (overrun_tokens >= 0),
    finish_reason          TEXT   NOT NULL,
    time_to_first_token_ms BIGINT,
    duration_ms            BIGINT NOT NULL,
    admitted_at_ms         BIGINT NOT NULL,
    price_book             TEXT   NOT NULL REFERENCES price_books (hash),
    cost_pico              BIGINT NOT NULL CHECK (cost_pico >= 0),
    PRIMARY KEY (epoch, seq)
);
CREATE TRIGGER usage_events_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON usage_events
FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- The tripwire's evidence: bills whose request id had one already. Never posted; the audit reports each.
CREATE TABLE usage_duplicates (
    epoch      TEXT   NOT NULL,
    seq        BIGINT NOT NULL,
    request_id TEXT   NOT NULL,
    event      TEXT   NOT NULL,
    PRIMARY KEY (epoch, seq)
);

CREATE TABLE usage_rollups_1d (
    day                 TEXT   NOT NULL,
    account             TEXT   NOT NULL,
    org                 TEXT   NOT NULL,
    project             TEXT   NOT NULL,
    api_key             TEXT   NOT NULL,
    model               TEXT   NOT NULL,
    requests            BIGINT NOT NULL,
    input_tokens        BIGINT NOT NULL,
    cached_input_tokens BIGINT NOT NULL,
    output_tokens       BIGINT NOT NULL,
    cost_pico           BIGINT NOT NULL,
    PRIMARY KEY (day, account, org, project, api_key, model)
);
