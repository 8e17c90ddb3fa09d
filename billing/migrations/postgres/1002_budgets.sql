-- Budgets, leases of any fund, more that can be counted, and one order of all events.

-- Money that a gateway may spend without asking. The holder is the identity of its outbox, which survives renames. A fund
-- is what the money is of: account:ID, or budget:ID:WINDOW for one window of a budget.
CREATE TABLE fund_leases (
    holder       TEXT   NOT NULL,
    fund         TEXT   NOT NULL,
    gateway      TEXT   NOT NULL,
    amount_pico  BIGINT NOT NULL CHECK (amount_pico >= 0),
    expires_at_s BIGINT NOT NULL,
    PRIMARY KEY (holder, fund)
);
CREATE INDEX fund_leases_by_fund ON fund_leases (fund);

-- A limit on what a scope may spend in each window. Rows change; what was spent under them does not.
CREATE TABLE budgets (
    id         TEXT   NOT NULL PRIMARY KEY CHECK (id <> '' AND position(':' IN id) = 0),
    scope      TEXT   NOT NULL CHECK (scope IN ('org', 'project', 'key')),
    scope_id   TEXT   NOT NULL,
    period     TEXT   NOT NULL CHECK (period IN ('day', 'month', 'total')),
    limit_pico BIGINT NOT NULL CHECK (limit_pico >= 0),
    -- 1: nothing is spent beyond it. 0: it only raises notices.
    hard       BIGINT NOT NULL CHECK (hard IN (0, 1)),
    -- Percentages at which a notice is raised, as "50,80,100".
    thresholds TEXT   NOT NULL,
    created_s  BIGINT NOT NULL,
    deleted_s  BIGINT
);
CREATE INDEX budgets_by_scope ON budgets (scope, scope_id);

-- One window of a budget: spent caches the fold of the events admitted in it, leased the sum of its leases.
CREATE TABLE budget_windows (
    fund        TEXT   NOT NULL PRIMARY KEY,
    budget      TEXT   NOT NULL REFERENCES budgets (id),
    -- First day and the day after the last, YYYY-MM-DD, UTC.
    from_day    TEXT   NOT NULL,
    to_day      TEXT   NOT NULL,
    spent_pico  BIGINT NOT NULL CHECK (spent_pico >= 0),
    leased_pico BIGINT NOT NULL CHECK (leased_pico >= 0)
);

-- Numbers given out in the order of commits: whoever takes one keeps the others out until it commits.
CREATE TABLE counters (
    name  TEXT   NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
);
INSERT INTO counters VALUES ('transaction', 0), ('event', 0);

ALTER TABLE usage_events ADD COLUMN ordinal BIGINT NOT NULL UNIQUE;
ALTER TABLE usage_events ADD COLUMN service_tier TEXT NOT NULL;
ALTER TABLE usage_events ADD COLUMN reasoning_tokens BIGINT NOT NULL CHECK (reasoning_tokens >= 0);
ALTER TABLE usage_events ADD COLUMN characters BIGINT NOT NULL CHECK (characters >= 0);
ALTER TABLE usage_events ADD COLUMN seconds BIGINT NOT NULL CHECK (seconds >= 0);
ALTER TABLE usage_events ADD COLUMN images BIGINT NOT NULL CHECK (images >= 0);

ALTER TABLE usage_rollups_1d ADD COLUMN reasoning_tokens BIGINT NOT NULL;
ALTER TABLE usage_rollups_1d ADD COLUMN characters BIGINT NOT NULL;
ALTER TABLE usage_rollups_1d ADD COLUMN seconds BIGINT NOT NULL;
ALTER TABLE usage_rollups_1d ADD COLUMN images BIGINT NOT NULL;
