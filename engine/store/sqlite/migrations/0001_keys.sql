-- Tables are STRICT: a value of the wrong type is refused, as PostgreSQL would.
-- Times are whole seconds since 1970 UTC, NULL where Go has the zero time.

-- +goose Up

CREATE TABLE instance (
    one  INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    name TEXT    NOT NULL,
    boot INTEGER NOT NULL
) STRICT;

INSERT INTO instance (one, name, boot) VALUES (1, lower(hex(randomblob(8))), 0);

CREATE TABLE cmk (
    key_id                TEXT    NOT NULL,
    key_version_id        TEXT    NOT NULL,
    revision              INTEGER NOT NULL,
    spec                  TEXT    NOT NULL,
    state                 TEXT    NOT NULL,
    description           TEXT    NOT NULL,
    created_at            INTEGER,
    delete_at             INTEGER,
    kcv                   BLOB,
    material_id           BLOB,
    check_value_algorithm TEXT    NOT NULL,
    check_value           BLOB,
    material              BLOB,
    expire_at             INTEGER,
    wrapping_algorithm    TEXT    NOT NULL,
    pair_id               BLOB,
    pair_fingerprint      BLOB,
    mac                   BLOB,
    -- When the sweeper must look at the row: the earlier of delete_at and,
    -- while there is material, expire_at. NULL: never.
    due_at                INTEGER
) STRICT;

CREATE UNIQUE INDEX cmk_key_version_id ON cmk (key_version_id);
CREATE UNIQUE INDEX cmk_key_id ON cmk (key_id);
CREATE INDEX cmk_created ON cmk (created_at, key_id);
CREATE INDEX cmk_group ON cmk (state, spec, created_at, key_id);
CREATE INDEX cmk_due ON cmk (due_at, key_id) WHERE due_at IS NOT NULL;

-- How many rows of cmk there are of each state and spec: a list says how many
-- rows match in all, and counting a million of them takes a tenth of a second.
CREATE TABLE cmk_count (
    state TEXT    NOT NULL,
    spec  TEXT    NOT NULL,
    n     INTEGER NOT NULL,
    PRIMARY KEY (state, spec)
) STRICT, WITHOUT ROWID;

-- +goose StatementBegin
CREATE TRIGGER cmk_count_insert AFTER INSERT ON cmk BEGIN
    INSERT INTO cmk_count (state, spec, n) VALUES (NEW.state, NEW.spec, 1)
        ON CONFLICT (state, spec) DO UPDATE SET n = cmk_count.n + 1;
END;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TRIGGER cmk_count_delete AFTER DELETE ON cmk BEGIN
    UPDATE cmk_count SET n = n - 1 WHERE state = OLD.state AND spec = OLD.spec;
END;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE TRIGGER cmk_count_update AFTER UPDATE OF state, spec ON cmk
    WHEN OLD.state <> NEW.state OR OLD.spec <> NEW.spec BEGIN
    UPDATE cmk_count SET n = n - 1 WHERE state = OLD.state AND spec = OLD.spec;
    INSERT INTO cmk_count (state, spec, n) VALUES (NEW.state, NEW.spec, 1)
        ON CONFLICT (state, spec) DO UPDATE SET n = cmk_count.n + 1;
END;
-- +goose StatementEnd

-- A pair is ready while expires_at is NULL, bound once bound_at is set, and
-- retired when only expires_at is.
CREATE TABLE pair (
    id          BLOB NOT NULL PRIMARY KEY,
    spec        TEXT NOT NULL,
    algorithm   TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    created_at  INTEGER,
    bound_at    INTEGER,
    expires_at  INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX pair_ready ON pair (spec, algorithm, created_at, id) WHERE expires_at IS NULL;
CREATE INDEX pair_bound ON pair (spec, algorithm, bound_at, expires_at) WHERE bound_at IS NOT NULL;
CREATE INDEX pair_expires ON pair (expires_at, id) WHERE expires_at IS NOT NULL;

CREATE TABLE import_token (
    id         BLOB    NOT NULL PRIMARY KEY,
    key_id     TEXT    NOT NULL REFERENCES cmk (key_id) ON DELETE CASCADE,
    pair_id    BLOB    NOT NULL REFERENCES pair (id) ON DELETE CASCADE,
    issued_at  INTEGER,
    expires_at INTEGER,
    failures   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX import_token_key_id ON import_token (key_id);
CREATE INDEX import_token_pair_id ON import_token (pair_id);

CREATE TABLE key_usage (
    key_id TEXT    NOT NULL PRIMARY KEY REFERENCES cmk (key_id) ON DELETE CASCADE,
    uses   INTEGER NOT NULL,
    boot   INTEGER NOT NULL,
    mac    BLOB
) STRICT, WITHOUT ROWID;

-- The nonces of one transaction: for each, 16 bytes of digest and its expiry as
-- 8 bytes, big-endian. expires_at is that of the last to expire.
CREATE TABLE nonce_batch (
    seq        INTEGER NOT NULL PRIMARY KEY,
    expires_at INTEGER NOT NULL,
    nonces     BLOB    NOT NULL
) STRICT;

CREATE INDEX nonce_batch_expires ON nonce_batch (expires_at);
