-- Who does what only one node at a time does.

-- +goose Up

CREATE TABLE lease (
    name    TEXT COLLATE "C" NOT NULL PRIMARY KEY,
    holder  TEXT COLLATE "C" NOT NULL,
    ends_at TIMESTAMPTZ NOT NULL
);
