-- Material that is an object of the token. See store.Resident.

-- +goose Up

ALTER TABLE cmk ADD COLUMN custody TEXT NOT NULL DEFAULT '';

-- No reference to cmk: an entry stays until its object is gone.
CREATE TABLE resident (
    id     BLOB    NOT NULL PRIMARY KEY,
    key_id TEXT    NOT NULL,
    node   TEXT    NOT NULL,
    since  INTEGER,
    state  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX resident_key ON resident (key_id);
CREATE INDEX resident_due ON resident (since, id) WHERE state <> 2;
