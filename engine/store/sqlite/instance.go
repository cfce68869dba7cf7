package sqlite

import (
	"context"
	"fmt"
)

var (
	journalModeQuery = &query{`PRAGMA journal_mode`}
	instanceQuery    = &query{`SELECT name FROM instance WHERE one = 1`}
	nextBootQuery    = &query{`UPDATE instance SET boot = boot + 1 WHERE one = 1 RETURNING boot`}
)

// writeAheadInstance reads the instance's name, after making sure that the
// database is in WAL mode: a file system without shared memory refuses that
// silently, and everything here relies on it.
func writeAheadInstance(c *conn) (name string, err error) {
	var mode string
	if _, err := c.one(journalModeQuery, func(row *cursor) { mode = row.text() }); err != nil {
		return "", err
	}
	if mode != "wal" {
		return "", fmt.Errorf("its file system does not allow a write-ahead log (journal mode %q): use a local one", mode)
	}
	found, err := c.one(instanceQuery, func(row *cursor) { name = row.text() })
	if err == nil && !found {
		err = fmt.Errorf("it has lost the row of table instance")
	}
	return name, err
}

// Instance implements store.Store.
func (s *Store) Instance(ctx context.Context) (string, error) {
	return s.instance, ctx.Err()
}

// NextBoot implements store.Store.
func (s *Store) NextBoot(ctx context.Context) (uint64, error) {
	var boot int64
	err := s.write(ctx, func(c *conn) error {
		_, err := c.one(nextBootQuery, func(row *cursor) { boot = row.integer() })
		return err
	})
	if err != nil {
		return 0, err
	}
	return uint64(boot), nil
}
