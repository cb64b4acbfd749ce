-- As ../sqlite/0004_checkpoints.sql.

-- Roots of the perfect subtrees that the entry completes, 32 bytes each, its own leaf first. Empty in entries of an
-- older version until they are hashed.
ALTER TABLE audit ADD COLUMN nodes BYTEA;
-- How many entries the tree has, and the roots of the perfect subtrees that it is made of, the largest first.
ALTER TABLE audit_head ADD COLUMN tree_size BIGINT;
ALTER TABLE audit_head ADD COLUMN frontier BYTEA;

-- One row. Generation: how often an operator accepted that the log had lost entries. Standing: trusted, restored or
-- distrusted; anything but trusted decides nothing new.
CREATE TABLE audit_log (
    id             BIGINT PRIMARY KEY NOT NULL,
    log            TEXT COLLATE "C" NOT NULL,
    generation     BIGINT NOT NULL,
    standing       TEXT COLLATE "C" NOT NULL,
    why            TEXT COLLATE "C" NOT NULL,
    since_us       BIGINT NOT NULL,
    first_bad      BIGINT,
    accepted_at_us BIGINT NOT NULL
);

-- Public halves of the permit keys of every manager that ever ran on this registry.
CREATE TABLE manager_keys (
    key_id        TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    manager       TEXT COLLATE "C" NOT NULL,
    public_key    BYTEA NOT NULL,
    first_seen_us BIGINT NOT NULL
);
