package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/keyferry/keyferry/engine/store"
)

// errClosed is what every call gets once Close was called.
var errClosed = fmt.Errorf("%w: the database is closed", store.ErrUnavailable)

// SQLSTATE codes. https://www.postgresql.org/docs/current/errcodes-appendix.html
const (
	foreignKeyViolation  = "23503"
	uniqueViolation      = "23505"
	readOnlyTransaction  = "25006"
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	undefinedTable       = "42P01"
	lockNotAvailable     = "55P03"
)

// sqlState is the code of an error that the server answered, or "".
func sqlState(err error) string {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		return e.Code
	}
	return ""
}

// answered reports whether err is a server's answer to a statement. Whatever
// else there is, short of the answers of package store, is a failure of the
// connection, after which a statement may have been executed or not.
func answered(err error) bool { return sqlState(err) != "" }

// rolledBack reports whether the server has undone the transaction because it
// met another one, so that it may be tried again.
func rolledBack(err error) bool {
	code := sqlState(err)
	return code == serializationFailure || code == deadlockDetected
}

// refused reports whether err is an answer of package store about rows.
func refused(err error) bool {
	return errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrExists) ||
		errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrNoPair) || errors.Is(err, store.ErrLimit) || errors.Is(err, store.ErrSpent)
}

// classify gives an error the kind that package store promises.
func classify(err error) error {
	switch {
	case err == nil || refused(err) || errors.Is(err, store.ErrUnavailable):
		return err
	case errors.Is(err, errRow):
		return err
	}
	code := sqlState(err)
	if code == "" {
		return fmt.Errorf("%w: the connection to the database failed: %v", store.ErrUnavailable, err)
	}
	switch code {
	case uniqueViolation:
		return fmt.Errorf("%w: %v", store.ErrExists, err)
	case readOnlyTransaction, serializationFailure, deadlockDetected, lockNotAvailable:
		return fmt.Errorf("%w: %v", store.ErrUnavailable, err)
	}
	switch code[:2] {
	case "08", // connection exception
		"25", // invalid transaction state: ended by the server meanwhile
		"28", // invalid authorization, of a new connection
		"40", // transaction rollback
		"53", // insufficient resources: disk full, out of memory, too many connections
		"57", // operator intervention: shutdown, crash, time-out
		"58": // system error: input and output
		return fmt.Errorf("%w: %v", store.ErrUnavailable, err)
	}
	return fmt.Errorf("postgres: %w", err)
}

// errRow: a row does not hold what this program writes.
var errRow = errors.New("postgres: a row is not of the expected form")

// outcome is the error of a call: that of its caller's context where that has
// ended, and else a classified one.
func outcome(caller context.Context, err error) error {
	if err == nil || refused(err) {
		return err
	}
	if cause := caller.Err(); cause != nil {
		return cause
	}
	return classify(err)
}
