-- What hosts are measured against, and what they proved. Documents are JSON of the room `attest`, which reads them.

-- One row for each host that proved its TPM when it joined.
CREATE TABLE platforms (
    host           TEXT PRIMARY KEY NOT NULL REFERENCES hosts (name),
    enrolled       TEXT NOT NULL,
    enrolled_at_us BIGINT NOT NULL,
    -- The TPM's clock in the last good quote: what the next one is compared with.
    clock          TEXT,
    -- What came of the last question: trusted, or refused with its reason.
    verdict        TEXT,
    verdict_at_us  BIGINT,
    reason         TEXT,
    -- The record of that appraisal; null where there was no evidence to appraise.
    appraisal      TEXT
);

-- Reference values of a host (`host/NAME`) or of a class of hosts (`class/NAME`).
CREATE TABLE reference_values (
    scope     TEXT PRIMARY KEY NOT NULL,
    document  TEXT NOT NULL,
    set_at_us BIGINT NOT NULL,
    set_by    TEXT NOT NULL
);

-- The quotes on which a migration rests: before its permit, and the last one before it converged.
CREATE TABLE quotes (
    migration   TEXT NOT NULL REFERENCES migrations (id),
    side        TEXT NOT NULL,
    stage       TEXT NOT NULL,
    binding     TEXT NOT NULL,
    evidence    BLOB NOT NULL,
    appraisal   TEXT NOT NULL,
    taken_at_us BIGINT NOT NULL,
    PRIMARY KEY (migration, side, stage)
);
