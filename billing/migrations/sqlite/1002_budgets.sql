-- Budgets, leases of any fund, more that can be counted, and one order of all events.

-- A fund is what money is leased of: account:ID, or budget:ID:WINDOW for one window of a budget.
CREATE TABLE fund_leases (
    holder       TEXT    NOT NULL,
    fund         TEXT    NOT NULL,
    gateway      TEXT    NOT NULL,
    amount_pico  INTEGER NOT NULL CHECK (amount_pico >= 0),
    expires_at_s INTEGER NOT NULL,
    PRIMARY KEY (holder, fund)
) STRICT, WITHOUT ROWID;
INSERT INTO fund_leases SELECT holder, 'account:' || account, gateway, amount_pico, expires_at_s FROM leases;
DROP TABLE leases;
CREATE INDEX fund_leases_by_fund ON fund_leases (fund);

-- A limit on what a scope may spend in each window. Rows change; what was spent under them does not.
CREATE TABLE budgets (
    id         TEXT    NOT NULL PRIMARY KEY CHECK (id <> '' AND instr(id, ':') = 0),
    scope      TEXT    NOT NULL CHECK (scope IN ('org', 'project', 'key')),
    scope_id   TEXT    NOT NULL,
    period     TEXT    NOT NULL CHECK (period IN ('day', 'month', 'total')),
    limit_pico INTEGER NOT NULL CHECK (limit_pico >= 0),
    -- 1: nothing is spent beyond it. 0: it only raises notices.
    hard       INTEGER NOT NULL CHECK (hard IN (0, 1)),
    -- Percentages at which a notice is raised, as "50,80,100".
    thresholds TEXT    NOT NULL,
    created_s  INTEGER NOT NULL,
    deleted_s  INTEGER
) STRICT;
CREATE INDEX budgets_by_scope ON budgets (scope, scope_id);

-- One window of a budget: spent caches the fold of the events admitted in it, leased the sum of its leases.
CREATE TABLE budget_windows (
    fund        TEXT    NOT NULL PRIMARY KEY,
    budget      TEXT    NOT NULL REFERENCES budgets (id),
    -- First day and the day after the last, YYYY-MM-DD, UTC.
    from_day    TEXT    NOT NULL,
    to_day      TEXT    NOT NULL,
    spent_pico  INTEGER NOT NULL CHECK (spent_pico >= 0),
    leased_pico INTEGER NOT NULL CHECK (leased_pico >= 0)
) STRICT;

-- Numbers given out in the order of commits: whoever takes one keeps the others out until it commits.
CREATE TABLE counters (
    name  TEXT    NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO counters SELECT 'transaction', coalesce(max(id), 0) FROM ledger_transactions;

ALTER TABLE usage_events ADD COLUMN ordinal INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_events ADD COLUMN service_tier TEXT NOT NULL DEFAULT 'default';
ALTER TABLE usage_events ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0 CHECK (reasoning_tokens >= 0);
ALTER TABLE usage_events ADD COLUMN characters INTEGER NOT NULL DEFAULT 0 CHECK (characters >= 0);
ALTER TABLE usage_events ADD COLUMN seconds INTEGER NOT NULL DEFAULT 0 CHECK (seconds >= 0);
ALTER TABLE usage_events ADD COLUMN images INTEGER NOT NULL DEFAULT 0 CHECK (images >= 0);

-- Older events get their numbers in the order in which they came.
DROP TRIGGER usage_events_no_update;
UPDATE usage_events SET ordinal = numbered.n
  FROM (SELECT epoch, seq, row_number() OVER (ORDER BY epoch, seq) AS n FROM usage_events) AS numbered
 WHERE numbered.epoch = usage_events.epoch AND numbered.seq = usage_events.seq;
CREATE TRIGGER usage_events_no_update BEFORE UPDATE ON usage_events
BEGIN SELECT RAISE(ABORT, 'usage_events is append-only'); END;
INSERT INTO counters SELECT 'event', coalesce(max(ordinal), 0) FROM usage_events;
CREATE UNIQUE INDEX usage_events_by_ordinal ON usage_events (ordinal);

ALTER TABLE usage_rollups_1d ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_rollups_1d ADD COLUMN characters INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_rollups_1d ADD COLUMN seconds INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_rollups_1d ADD COLUMN images INTEGER NOT NULL DEFAULT 0;
