-- Times are whole seconds since 1970 UTC, NULL where Go has the zero time.
-- What is compared or ordered is so by its bytes (COLLATE "C", which is left out
-- for CockroachDB, whose text is so anyway). Nothing else here is PostgreSQL's
-- alone: no trigger, no function, no type of its own.

-- +goose Up

CREATE TABLE instance (
    one  BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    name TEXT   NOT NULL,
    boot BIGINT NOT NULL
);

INSERT INTO instance (one, name, boot)
    VALUES (1, right(replace(CAST(gen_random_uuid() AS TEXT), '-', ''), 16), 0);

CREATE TABLE cmk (
    key_id                TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    key_version_id        TEXT COLLATE "C" NOT NULL,
    revision              BIGINT NOT NULL,
    spec                  TEXT COLLATE "C" NOT NULL,
    state                 TEXT COLLATE "C" NOT NULL,
    description           BYTEA NOT NULL, -- UTF-8, in which TEXT allows no U+0000
    created_at            BIGINT,
    delete_at             BIGINT,
    kcv                   BYTEA,
    material_id           BYTEA,
    check_value_algorithm TEXT NOT NULL,
    check_value           BYTEA,
    material              BYTEA,
    expire_at             BIGINT,
    wrapping_algorithm    TEXT NOT NULL,
    pair_id               BYTEA,
    pair_fingerprint      BYTEA,
    receipt               BYTEA,
    mac                   BYTEA,
    -- When the sweeper must look at the row: the earlier of delete_at and,
    -- while there is material, expire_at. NULL: never.
    due_at                BIGINT
) WITH (fillfactor = 80); -- a re-import then stays on its page and touches no index

CREATE UNIQUE INDEX cmk_key_version_id ON cmk (key_version_id);
CREATE INDEX cmk_created ON cmk (created_at, key_id);
CREATE INDEX cmk_group ON cmk (state, spec, created_at, key_id);
CREATE INDEX cmk_due ON cmk (due_at, key_id) WHERE due_at IS NOT NULL;

-- A pair is ready while expires_at is NULL, bound once bound_at is set, and
-- retired when only expires_at is.
CREATE TABLE pair (
    id          BYTEA NOT NULL PRIMARY KEY,
    spec        TEXT COLLATE "C" NOT NULL,
    algorithm   TEXT COLLATE "C" NOT NULL,
    fingerprint BYTEA NOT NULL,
    created_at  BIGINT,
    bound_at    BIGINT,
    expires_at  BIGINT
);

CREATE INDEX pair_ready ON pair (spec, algorithm, created_at, id) WHERE expires_at IS NULL;
CREATE INDEX pair_bound ON pair (spec, algorithm, bound_at, expires_at) WHERE bound_at IS NOT NULL;
CREATE INDEX pair_expires ON pair (expires_at, id) WHERE expires_at IS NOT NULL;

-- One row for each spec and algorithm, to be locked by whoever binds a fresh
-- pair: so the bound on outstanding pairs is exact.
CREATE TABLE pair_group (
    spec      TEXT COLLATE "C" NOT NULL,
    algorithm TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (spec, algorithm)
);

CREATE TABLE import_token (
    id         BYTEA  NOT NULL PRIMARY KEY,
    key_id     TEXT COLLATE "C" NOT NULL REFERENCES cmk (key_id) ON DELETE CASCADE,
    pair_id    BYTEA  NOT NULL REFERENCES pair (id) ON DELETE CASCADE,
    issued_at  BIGINT,
    expires_at BIGINT,
    failures   BIGINT NOT NULL
);

CREATE INDEX import_token_key_id ON import_token (key_id);
CREATE INDEX import_token_pair_id ON import_token (pair_id);

CREATE TABLE key_usage (
    key_id TEXT COLLATE "C" NOT NULL PRIMARY KEY REFERENCES cmk (key_id) ON DELETE CASCADE,
    uses   BIGINT NOT NULL,
    boot   BIGINT NOT NULL,
    mac    BYTEA
);

-- 16 bytes of digest stand for a nonce. seen_at is when its signature came.
CREATE TABLE nonce (
    digest     BYTEA  NOT NULL PRIMARY KEY,
    seen_at    BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);

CREATE INDEX nonce_expires ON nonce (expires_at);

-- The log of receipts. See engine/receipt.
CREATE TABLE receipt_log (
    one    BIGINT NOT NULL PRIMARY KEY CHECK (one = 1),
    log_id BYTEA  NOT NULL,
    size   BIGINT NOT NULL,
    head   BYTEA
);

INSERT INTO receipt_log (one, log_id, size)
    VALUES (1, decode(replace(CAST(gen_random_uuid() AS TEXT), '-', ''), 'hex'), 0);

-- No reference to cmk: entries stay when their key goes.
CREATE TABLE receipt (
    seq        BIGINT  GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    place      BIGINT, -- NULL while pending
    key_id     TEXT COLLATE "C" NOT NULL,
    revision   BIGINT  NOT NULL,
    request_id TEXT COLLATE "C" NOT NULL,
    is_import  BOOLEAN NOT NULL,
    entry      BYTEA   NOT NULL,
    row_digest BYTEA   NOT NULL,
    mac        BYTEA   NOT NULL
);

CREATE UNIQUE INDEX receipt_place ON receipt (place) WHERE place IS NOT NULL;
CREATE INDEX receipt_pending ON receipt (seq) WHERE place IS NULL;
CREATE INDEX receipt_key ON receipt (key_id, revision);

CREATE TABLE receipt_tile (
    level  BIGINT NOT NULL,
    n      BIGINT NOT NULL,
    hashes BYTEA  NOT NULL,
    PRIMARY KEY (level, n)
);
