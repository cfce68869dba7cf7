package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/sethvargo/go-retry"
)

// readTries is how often a read is made whose connection is lost. The second
// connection is a new one; if that is lost as well, so is the server.
const readTries = 3

// read has do ask one question, which may be asked again.
func (s *Store) read(ctx context.Context, do func(context.Context, *pgxpool.Conn) error) error {
	return s.run(ctx, readTries, do)
}

// write has do make one statement, which is its own transaction.
func (s *Store) write(ctx context.Context, do func(context.Context, *pgxpool.Conn) error) error {
	return s.run(ctx, 1, do)
}

// transact has do executed in a transaction of the level READ COMMITTED: each
// statement sees what was committed before it began, and waits for the rows
// that another transaction is changing. (CockroachDB may make it SERIALIZABLE,
// under which nothing here breaks.)
func (s *Store) transact(ctx context.Context, do func(context.Context, pgx.Tx) error) error {
	return s.run(ctx, 1, inTransaction(pgx.TxOptions{IsoLevel: pgx.ReadCommitted}, do))
}

// snapshot has do ask several questions, which are answered as of one moment.
func (s *Store) snapshot(ctx context.Context, do func(context.Context, pgx.Tx) error) error {
	return s.run(ctx, readTries, inTransaction(pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, do))
}

func inTransaction(options pgx.TxOptions, do func(context.Context, pgx.Tx) error) func(context.Context, *pgxpool.Conn) error {
	return func(ctx context.Context, c *pgxpool.Conn) (err error) {
		tx, err := c.BeginTx(ctx, options)
		if err != nil {
			return &notBegunError{err}
		}
		defer func() {
			if err != nil { // a connection on which this fails is closed, and the server rolls back
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpDelay)
				defer cancel()
				_ = tx.Rollback(ctx)
			}
		}()
		if err := do(ctx, tx); err != nil {
			return err
		}
		return tx.Commit(ctx)
	}
}

// notBegunError is a failure before anything was asked that changes anything.
// What pgconn.SafeToRetry says is not relied on: it holds for the last message,
// and of some that were sent it says otherwise.
type notBegunError struct{ error }

func (e *notBegunError) Unwrap() error { return e.error }

// run has do use a connection. It runs do again where the server has rolled
// back what it did, or where it had not begun; and up to tries times where the
// connection was lost. All attempts together have Config.Timeout.
func (s *Store) run(caller context.Context, tries int, do func(context.Context, *pgxpool.Conn) error) error {
	if err := caller.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return errClosed
	}
	ctx, cancel := context.WithTimeout(caller, s.timeout)
	defer cancel()
	pause := retry.WithJitterPercent(50, retry.WithCappedDuration(50*time.Millisecond, retry.NewExponential(time.Millisecond)))
	lost := 0
	err := retry.Do(ctx, pause, func(ctx context.Context) error {
		err := s.once(ctx, do)
		switch {
		case err == nil, ctx.Err() != nil, refused(err):
			return err
		case rolledBack(err):
			return retry.RetryableError(err)
		case answered(err), s.closed.Load(), errors.Is(err, errRow):
			return err
		}
		lost++
		var notBegun *notBegunError
		if lost < tries || lost < readTries && errors.As(err, &notBegun) {
			return retry.RetryableError(err)
		}
		return err
	})
	if err != nil && !refused(err) && !answered(err) && s.closed.Load() {
		return errClosed
	}
	return outcome(caller, err)
}

// once has do use a connection once. If that is lost, or leads to a server
// that takes no writes any more, the others that are idle are not trusted
// either.
func (s *Store) once(ctx context.Context, do func(context.Context, *pgxpool.Conn) error) error {
	c, err := s.pool.Acquire(ctx)
	if err != nil {
		return &notBegunError{err}
	}
	defer c.Release()
	err = do(ctx, c)
	if c.Conn().IsClosed() && ctx.Err() == nil || sqlState(err) == readOnlyTransaction {
		s.pool.Reset()
	}
	return err
}

// rowsOf asks one question and scans every row of the answer.
func rowsOf[T any](ctx context.Context, s *Store, scan func(pgx.CollectableRow) (T, error), query string, args ...any) (list []T, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		rows, err := c.Query(ctx, query, args...)
		if err == nil {
			list, err = pgx.AppendRows([]T(nil), rows, scan)
		}
		return err
	})
	return list, err
}

// dueOf is rowsOf of every row, or with due set of at most limit that are due.
func dueOf[T any](
	ctx context.Context, s *Store, scan func(pgx.CollectableRow) (T, error), all, some string, due time.Time, limit int,
) ([]T, error) {
	if due.IsZero() {
		return rowsOf(ctx, s, scan, all)
	}
	return rowsOf(ctx, s, scan, some, due.Unix(), max(limit, 0))
}
