-- The log of receipts. See engine/receipt.

-- +goose Up

ALTER TABLE cmk ADD COLUMN receipt BLOB;

CREATE TABLE receipt_log (
    one    INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    log_id BLOB    NOT NULL,
    size   INTEGER NOT NULL,
    head   BLOB
) STRICT;

INSERT INTO receipt_log (one, log_id, size) VALUES (1, randomblob(16), 0);

-- No reference to cmk: entries stay when their key goes.
CREATE TABLE receipt (
    seq        INTEGER NOT NULL PRIMARY KEY,
    place      INTEGER, -- NULL while pending
    key_id     TEXT    NOT NULL,
    revision   INTEGER NOT NULL,
    request_id TEXT    NOT NULL,
    is_import  INTEGER NOT NULL,
    entry      BLOB    NOT NULL,
    row_digest BLOB    NOT NULL,
    mac        BLOB    NOT NULL
) STRICT;

CREATE UNIQUE INDEX receipt_place ON receipt (place) WHERE place IS NOT NULL;
CREATE INDEX receipt_pending ON receipt (seq) WHERE place IS NULL;
CREATE INDEX receipt_key ON receipt (key_id, revision);

CREATE TABLE receipt_tile (
    level  INTEGER NOT NULL,
    n      INTEGER NOT NULL,
    hashes BLOB    NOT NULL,
    PRIMARY KEY (level, n)
) STRICT;
