package sqlite

import (
	"context"
	"errors"
	"fmt"

	driver "modernc.org/sqlite"
	result "modernc.org/sqlite/lib"

	"github.com/keyferry/keyferry/engine/store"
)

// errClosed is what every call gets once Close was called.
var errClosed = fmt.Errorf("%w: the database is closed", store.ErrUnavailable)

// resultCode is the extended result code of SQLite in err, or 0.
// https://www.sqlite.org/rescode.html
func resultCode(err error) int {
	if f, ok := errors.AsType[*fault](err); ok {
		return int(f.code)
	}
	if e, ok := errors.AsType[*driver.Error](err); ok { // while it is migrated
		return e.Code()
	}
	return 0
}

// classify gives an error of SQLite the kind that package store promises. The
// low byte of an extended code is the primary one.
func classify(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	code := resultCode(err)
	switch code {
	case result.SQLITE_CONSTRAINT_PRIMARYKEY, result.SQLITE_CONSTRAINT_UNIQUE, result.SQLITE_CONSTRAINT_ROWID:
		return fmt.Errorf("%w: %v", store.ErrExists, err)
	}
	switch code & 0xff {
	case result.SQLITE_BUSY, result.SQLITE_LOCKED, result.SQLITE_FULL, result.SQLITE_IOERR,
		result.SQLITE_READONLY, result.SQLITE_CANTOPEN, result.SQLITE_PROTOCOL, result.SQLITE_NOMEM:
		return fmt.Errorf("%w: %v", store.ErrUnavailable, err)
	}
	return fmt.Errorf("sqlite: %w", err)
}

// refused reports whether err is an answer of package store about rows, after
// which the transaction is as good as before, and not a failure of the
// database.
func refused(err error) bool {
	return errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrExists) ||
		errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNoPair) || errors.Is(err, store.ErrLimit) || errors.Is(err, store.ErrSpent)
}
