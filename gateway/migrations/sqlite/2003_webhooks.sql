-- Who is told of notices, and how far each telling has come. The notices themselves are billing's.
CREATE TABLE webhook_endpoints (
    id              TEXT    NOT NULL PRIMARY KEY,
    org_id          TEXT    NOT NULL REFERENCES orgs (id),
    account         TEXT    NOT NULL,
    url             TEXT    NOT NULL,
    description     TEXT    NOT NULL,
    -- JSON list of kinds; empty: all.
    events          TEXT    NOT NULL,
    enabled         INTEGER NOT NULL CHECK (enabled IN (0, 1)),
    disabled_reason TEXT,
    created_at_ms   INTEGER NOT NULL,
    -- The gateway process that delivers to it, and until when no other does.
    holder          TEXT    NOT NULL,
    held_until_ms   INTEGER NOT NULL
) STRICT;

CREATE INDEX webhook_endpoints_by_account ON webhook_endpoints (account);
CREATE INDEX webhook_endpoints_by_org ON webhook_endpoints (org_id);

-- The newest has no end; those before it end some time after their successor was made.
CREATE TABLE webhook_secrets (
    endpoint_id   TEXT    NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
    ordinal       INTEGER NOT NULL,
    secret        TEXT    NOT NULL,
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER,
    PRIMARY KEY (endpoint_id, ordinal)
) STRICT, WITHOUT ROWID;

CREATE TABLE webhook_deliveries (
    id                 TEXT    NOT NULL PRIMARY KEY,
    endpoint_id        TEXT    NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
    event_id           TEXT    NOT NULL,
    event_type         TEXT    NOT NULL,
    -- What is signed and sent, the same bytes at every attempt.
    body               TEXT    NOT NULL,
    state              TEXT    NOT NULL CHECK (state IN ('pending', 'delivered', 'dead')),
    attempts           INTEGER NOT NULL CHECK (attempts >= 0),
    next_attempt_at_ms INTEGER NOT NULL,
    last_status        INTEGER,
    last_error         TEXT,
    created_at_ms      INTEGER NOT NULL,
    finished_at_ms     INTEGER,
    UNIQUE (endpoint_id, event_id)
) STRICT;

CREATE INDEX webhook_deliveries_by_state ON webhook_deliveries (state, endpoint_id, next_attempt_at_ms);
CREATE INDEX webhook_deliveries_finished ON webhook_deliveries (finished_at_ms);

-- Notices up to the floor are dispatched; over it, those in webhook_seen are.
CREATE TABLE webhook_cursor (
    one   INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    floor INTEGER NOT NULL
) STRICT;

INSERT INTO webhook_cursor (one, floor) VALUES (1, 0);

CREATE TABLE webhook_seen (
    notice_ordinal INTEGER NOT NULL PRIMARY KEY,
    seen_at_ms     INTEGER NOT NULL
) STRICT;
