-- Text, 64-bit integers and blobs only, so that the same statements run on PostgreSQL (its own folder of
-- migrations differs in column types alone). Times are microseconds since the Unix epoch.

CREATE TABLE hosts (
    name          TEXT PRIMARY KEY NOT NULL,
    spec          TEXT NOT NULL,
    state         TEXT NOT NULL,
    signing_key   BLOB,
    journal       TEXT,
    cert_serial   TEXT,
    interfaces    TEXT NOT NULL,
    version       TEXT,
    created_at_us BIGINT NOT NULL,
    last_seen_us  BIGINT
);

CREATE TABLE join_tokens (
    hash          BLOB PRIMARY KEY NOT NULL,
    host          TEXT NOT NULL REFERENCES hosts (name),
    expires_at_us BIGINT NOT NULL,
    used_at_us    BIGINT
);

CREATE TABLE vms (
    uuid          TEXT PRIMARY KEY NOT NULL,
    name          TEXT NOT NULL UNIQUE,
    spec          TEXT NOT NULL,
    spec_digest   TEXT NOT NULL,
    state         TEXT NOT NULL,
    host          TEXT REFERENCES hosts (name),
    epoch         BIGINT NOT NULL,
    next_epoch    BIGINT NOT NULL,
    memory_bytes  BIGINT NOT NULL,
    vcpus         BIGINT NOT NULL,
    inventory     TEXT,
    machine       TEXT,
    created_at_us BIGINT NOT NULL
);

CREATE TABLE migrations (
    id              TEXT PRIMARY KEY NOT NULL,
    vm              TEXT NOT NULL REFERENCES vms (uuid),
    vm_name         TEXT NOT NULL,
    source          TEXT NOT NULL REFERENCES hosts (name),
    target          TEXT NOT NULL REFERENCES hosts (name),
    state           TEXT NOT NULL,
    is_open         BIGINT NOT NULL,
    suspended       BIGINT NOT NULL,
    requested_by    TEXT NOT NULL,
    requested_at_us BIGINT NOT NULL,
    ended_at_us     BIGINT,
    intent          TEXT NOT NULL,
    handover        TEXT,
    facts           TEXT NOT NULL
);
-- One open migration per VM, whatever the managers think at the same time.
CREATE UNIQUE INDEX one_open_migration_per_vm ON migrations (vm) WHERE is_open = 1;
CREATE INDEX migrations_by_time ON migrations (requested_at_us);
CREATE UNIQUE INDEX migrations_by_intent ON migrations (intent);

CREATE TABLE permits (
    nonce          TEXT PRIMARY KEY NOT NULL,
    migration      TEXT NOT NULL UNIQUE REFERENCES migrations (id),
    claims         TEXT NOT NULL,
    digest         TEXT,
    token          BLOB,
    issued_at_us   BIGINT NOT NULL,
    consumed_at_us BIGINT
);

CREATE TABLE request_nonces (
    nonce      TEXT PRIMARY KEY NOT NULL,
    used_by    TEXT NOT NULL,
    seen_at_us BIGINT NOT NULL
);

CREATE TABLE reservations (
    migration    TEXT PRIMARY KEY NOT NULL REFERENCES migrations (id),
    host         TEXT NOT NULL REFERENCES hosts (name),
    vm           TEXT NOT NULL REFERENCES vms (uuid),
    memory_bytes BIGINT NOT NULL,
    vcpus        BIGINT NOT NULL
);

CREATE TABLE statements (
    digest         TEXT PRIMARY KEY NOT NULL,
    migration      TEXT NOT NULL REFERENCES migrations (id),
    kind           TEXT NOT NULL,
    host           TEXT NOT NULL,
    token          BLOB NOT NULL,
    received_at_us BIGINT NOT NULL
);
CREATE INDEX statements_by_migration ON statements (migration, kind);

CREATE TABLE migration_events (
    migration TEXT NOT NULL REFERENCES migrations (id),
    sequence  BIGINT NOT NULL,
    at_us     BIGINT NOT NULL,
    host      TEXT NOT NULL,
    kind      TEXT NOT NULL,
    detail    TEXT NOT NULL,
    PRIMARY KEY (migration, sequence)
);

CREATE TABLE audit (
    sequence BIGINT PRIMARY KEY NOT NULL,
    at_us    BIGINT NOT NULL,
    actor    TEXT NOT NULL,
    action   TEXT NOT NULL,
    subject  TEXT NOT NULL,
    detail   TEXT NOT NULL,
    hash     TEXT NOT NULL
);
-- The head is kept apart: without it, cutting entries off the end would leave a shorter chain that verifies.
CREATE TABLE audit_head (
    id       BIGINT PRIMARY KEY NOT NULL,
    sequence BIGINT NOT NULL,
    hash     TEXT NOT NULL
);

CREATE TABLE api_tokens (
    hash          BLOB PRIMARY KEY NOT NULL,
    name          TEXT NOT NULL UNIQUE,
    role          TEXT NOT NULL,
    expires_at_us BIGINT
);
