-- Which tenants a token is for (a JSON list; none: it names none), and every policy set that ever was in force.

ALTER TABLE api_tokens ADD COLUMN tenants TEXT;

-- The last row is in force. Applying an older set again makes a new row: nothing here is ever changed.
CREATE TABLE policy_versions (
    sequence      BIGINT PRIMARY KEY NOT NULL,
    digest        TEXT NOT NULL,
    content       TEXT NOT NULL,
    applied_by    TEXT NOT NULL,
    applied_at_us BIGINT NOT NULL
);
CREATE INDEX policy_versions_by_digest ON policy_versions (digest);

-- Signed plans of maintenance. The token says what a plan covers; the rest is for lists.
CREATE TABLE maintenance_plans (
    id            TEXT PRIMARY KEY NOT NULL,
    host          TEXT NOT NULL REFERENCES hosts (name),
    token         BLOB NOT NULL,
    created_by    TEXT NOT NULL,
    created_at_us BIGINT NOT NULL,
    revoked_at_us BIGINT
);
