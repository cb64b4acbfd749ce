-- The same tables as in ../sqlite/0001_first.sql, and the same statements run on them. Text is ordered by its bytes, as
-- SQLite does it, whatever the database's locale. Times are microseconds since the Unix epoch.

CREATE TABLE hosts (
    name          TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    spec          TEXT COLLATE "C" NOT NULL,
    state         TEXT COLLATE "C" NOT NULL,
    signing_key   BYTEA,
    journal       TEXT COLLATE "C",
    cert_serial   TEXT COLLATE "C",
    interfaces    TEXT COLLATE "C" NOT NULL,
    version       TEXT COLLATE "C",
    created_at_us BIGINT NOT NULL,
    last_seen_us  BIGINT
);

CREATE TABLE join_tokens (
    hash          BYTEA PRIMARY KEY NOT NULL,
    host          TEXT COLLATE "C" NOT NULL REFERENCES hosts (name),
    expires_at_us BIGINT NOT NULL,
    used_at_us    BIGINT
);

CREATE TABLE vms (
    uuid          TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    name          TEXT COLLATE "C" NOT NULL UNIQUE,
    spec          TEXT COLLATE "C" NOT NULL,
    spec_digest   TEXT COLLATE "C" NOT NULL,
    state         TEXT COLLATE "C" NOT NULL,
    host          TEXT COLLATE "C" REFERENCES hosts (name),
    epoch         BIGINT NOT NULL,
    next_epoch    BIGINT NOT NULL,
    memory_bytes  BIGINT NOT NULL,
    vcpus         BIGINT NOT NULL,
    inventory     TEXT COLLATE "C",
    machine       TEXT COLLATE "C",
    created_at_us BIGINT NOT NULL
);

CREATE TABLE migrations (
    id              TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    vm              TEXT COLLATE "C" NOT NULL REFERENCES vms (uuid),
    vm_name         TEXT COLLATE "C" NOT NULL,
    source          TEXT COLLATE "C" NOT NULL REFERENCES hosts (name),
    target          TEXT COLLATE "C" NOT NULL REFERENCES hosts (name),
    state           TEXT COLLATE "C" NOT NULL,
    is_open         BIGINT NOT NULL,
    suspended       BIGINT NOT NULL,
    requested_by    TEXT COLLATE "C" NOT NULL,
    requested_at_us BIGINT NOT NULL,
    ended_at_us     BIGINT,
    intent          TEXT COLLATE "C" NOT NULL,
    handover        TEXT COLLATE "C",
    facts           TEXT COLLATE "C" NOT NULL
);
-- One open migration per VM, whatever the managers think at the same time.
CREATE UNIQUE INDEX one_open_migration_per_vm ON migrations (vm) WHERE is_open = 1;
CREATE INDEX migrations_by_time ON migrations (requested_at_us);
CREATE UNIQUE INDEX migrations_by_intent ON migrations (intent);

CREATE TABLE permits (
    nonce          TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    migration      TEXT COLLATE "C" NOT NULL UNIQUE REFERENCES migrations (id),
    claims         TEXT COLLATE "C" NOT NULL,
    digest         TEXT COLLATE "C",
    token          BYTEA,
    issued_at_us   BIGINT NOT NULL,
    consumed_at_us BIGINT
);

CREATE TABLE request_nonces (
    nonce      TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    used_by    TEXT COLLATE "C" NOT NULL,
    seen_at_us BIGINT NOT NULL
);

CREATE TABLE reservations (
    migration    TEXT COLLATE "C" PRIMARY KEY NOT NULL REFERENCES migrations (id),
    host         TEXT COLLATE "C" NOT NULL REFERENCES hosts (name),
    vm           TEXT COLLATE "C" NOT NULL REFERENCES vms (uuid),
    memory_bytes BIGINT NOT NULL,
    vcpus        BIGINT NOT NULL
);

CREATE TABLE statements (
    digest         TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    migration      TEXT COLLATE "C" NOT NULL REFERENCES migrations (id),
    kind           TEXT COLLATE "C" NOT NULL,
    host           TEXT COLLATE "C" NOT NULL,
    token          BYTEA NOT NULL,
    received_at_us BIGINT NOT NULL
);
CREATE INDEX statements_by_migration ON statements (migration, kind);

CREATE TABLE migration_events (
    migration TEXT COLLATE "C" NOT NULL REFERENCES migrations (id),
    sequence  BIGINT NOT NULL,
    at_us     BIGINT NOT NULL,
    host      TEXT COLLATE "C" NOT NULL,
    kind      TEXT COLLATE "C" NOT NULL,
    detail    TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (migration, sequence)
);

CREATE TABLE audit (
    sequence BIGINT PRIMARY KEY NOT NULL,
    at_us    BIGINT NOT NULL,
    actor    TEXT COLLATE "C" NOT NULL,
    action   TEXT COLLATE "C" NOT NULL,
    subject  TEXT COLLATE "C" NOT NULL,
    detail   TEXT COLLATE "C" NOT NULL,
    hash     TEXT COLLATE "C" NOT NULL
);
-- The head is kept apart: without it, cutting entries off the end would leave a shorter chain that verifies.
CREATE TABLE audit_head (
    id       BIGINT PRIMARY KEY NOT NULL,
    sequence BIGINT NOT NULL,
    hash     TEXT COLLATE "C" NOT NULL
);

CREATE TABLE api_tokens (
    hash          BYTEA PRIMARY KEY NOT NULL,
    name          TEXT COLLATE "C" NOT NULL UNIQUE,
    role          TEXT COLLATE "C" NOT NULL,
    expires_at_us BIGINT
);

-- PostgreSQL only: the number of the last transaction that each process committed. A process whose connection broke
-- while it committed finds out by it what came of that.
CREATE TABLE commit_marks (
    instance TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    number   BIGINT NOT NULL,
    at_us    BIGINT NOT NULL
);
