-- Who serves this registry, and who works on which migration.

-- Terms count up by one for the whole registry, and are never given out twice: the row with id 1 holds the last.
CREATE TABLE terms (
    id   BIGINT PRIMARY KEY NOT NULL,
    last BIGINT NOT NULL
);

-- One row for each manager; its term is that of the process that runs under its name now.
CREATE TABLE managers (
    name          TEXT PRIMARY KEY NOT NULL,
    term          BIGINT NOT NULL,
    address       TEXT NOT NULL,
    version       TEXT NOT NULL,
    started_at_us BIGINT NOT NULL,
    seen_at_us    BIGINT NOT NULL
);

-- At most one manager works on a migration. Each tenure has a term of its own.
CREATE TABLE leases (
    migration     TEXT PRIMARY KEY NOT NULL REFERENCES migrations (id),
    manager       TEXT NOT NULL REFERENCES managers (name),
    manager_term  BIGINT NOT NULL,
    term          BIGINT NOT NULL UNIQUE,
    expires_at_us BIGINT NOT NULL
);
CREATE INDEX leases_by_manager ON leases (manager, manager_term);
