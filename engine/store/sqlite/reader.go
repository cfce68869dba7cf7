package sqlite

import (
	"context"
	"errors"
	"sync"
	"time"
)

// readers is a pool of read-only connections. In WAL mode they see what is
// committed and durable, and neither wait for the writer nor hold it up.
type readers struct {
	idle      chan *conn
	closed    chan struct{}
	closeOnce sync.Once
}

func openReaders(ctx context.Context, uri string, n int, pragmas []string) (*readers, error) {
	r := &readers{idle: make(chan *conn, n), closed: make(chan struct{})}
	for range n {
		c, err := connect(ctx, uri, pragmas)
		if err != nil {
			return nil, errors.Join(err, r.drain(len(r.idle)))
		}
		r.idle <- c
	}
	return r, nil
}

// read gives do a connection, once one is idle.
func (r *readers) read(ctx context.Context, do func(*conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-r.closed:
		return errClosed
	default:
	}
	select {
	case c := <-r.idle:
		defer func() { r.idle <- c }()
		return do(c)
	case <-r.closed:
		return errClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// snapshot is read with all that do asks answered as of one moment.
func (r *readers) snapshot(ctx context.Context, do func(*conn) error) error {
	return r.read(ctx, func(c *conn) (err error) {
		if _, err := c.exec(beginReadQuery); err != nil {
			return err
		}
		defer func() {
			if _, e := c.exec(rollbackQuery); e != nil && err == nil {
				err = e
			}
		}()
		return do(c)
	})
}

var beginReadQuery = &query{`BEGIN`}

// close waits for the reads under way and closes the connections.
func (r *readers) close() (err error) {
	r.closeOnce.Do(func() {
		close(r.closed)
		err = r.drain(cap(r.idle))
	})
	return err
}

// drain closes n connections.
func (r *readers) drain(n int) error {
	var errs []error
	for range n {
		errs = append(errs, (<-r.idle).close())
	}
	return errors.Join(errs...)
}

// rowsOf asks one question and reads every row of the answer.
func rowsOf[T any](ctx context.Context, s *Store, scan func(*cursor) T, q *query, args ...any) (list []T, err error) {
	err = s.read(ctx, func(c *conn) error {
		return c.all(q, func(row *cursor) { list = append(list, scan(row)) }, args...)
	})
	return list, err
}

// dueOf is rowsOf of every row, or with due set of at most limit that are due.
func dueOf[T any](ctx context.Context, s *Store, scan func(*cursor) T, all, some *query, due time.Time, limit int) ([]T, error) {
	if due.IsZero() {
		return rowsOf(ctx, s, scan, all)
	}
	return rowsOf(ctx, s, scan, some, due.Unix(), int64(max(limit, 0)))
}
