-- Who may call: organisations, their projects and their keys. Money lives in the billing crate's tables.
CREATE TABLE orgs (
    id         TEXT    NOT NULL PRIMARY KEY,
    name       TEXT    NOT NULL,
    -- The billing account that pays for every project of the organisation.
    account_id TEXT    NOT NULL,
    created_s  BIGINT NOT NULL
);

CREATE TABLE projects (
    id        TEXT    NOT NULL PRIMARY KEY,
    org_id    TEXT    NOT NULL REFERENCES orgs (id),
    name      TEXT    NOT NULL,
    created_s BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id         TEXT    NOT NULL PRIMARY KEY,
    project_id TEXT    NOT NULL REFERENCES projects (id),
    name       TEXT    NOT NULL,
    role       TEXT    NOT NULL CHECK (role IN ('user', 'admin')),
    -- SHA-256 of the whole key; the key itself is shown once and never stored.
    hash       BYTEA    NOT NULL UNIQUE CHECK (length(hash) = 32),
    redacted   TEXT    NOT NULL,
    created_s  BIGINT NOT NULL,
    revoked_s  BIGINT
);

CREATE INDEX api_keys_by_project ON api_keys (project_id);
