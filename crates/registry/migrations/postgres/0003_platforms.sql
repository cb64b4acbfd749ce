-- As ../sqlite/0003_platforms.sql.

-- One row for each host that proved its TPM when it joined.
CREATE TABLE platforms (
    host           TEXT COLLATE "C" PRIMARY KEY NOT NULL REFERENCES hosts (name),
    enrolled       TEXT COLLATE "C" NOT NULL,
    enrolled_at_us BIGINT NOT NULL,
    clock          TEXT COLLATE "C",
    verdict        TEXT COLLATE "C",
    verdict_at_us  BIGINT,
    reason         TEXT COLLATE "C",
    appraisal      TEXT COLLATE "C"
);

-- Reference values of a host (`host/NAME`) or of a class of hosts (`class/NAME`).
CREATE TABLE reference_values (
    scope     TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    document  TEXT COLLATE "C" NOT NULL,
    set_at_us BIGINT NOT NULL,
    set_by    TEXT COLLATE "C" NOT NULL
);

-- The quotes on which a migration rests: before its permit, and the last one before it converged.
CREATE TABLE quotes (
    migration   TEXT COLLATE "C" NOT NULL REFERENCES migrations (id),
    side        TEXT COLLATE "C" NOT NULL,
    stage       TEXT COLLATE "C" NOT NULL,
    binding     TEXT COLLATE "C" NOT NULL,
    evidence    BYTEA NOT NULL,
    appraisal   TEXT COLLATE "C" NOT NULL,
    taken_at_us BIGINT NOT NULL,
    PRIMARY KEY (migration, side, stage)
);
