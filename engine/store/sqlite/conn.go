package sqlite

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
)

// query is one SQL statement of this package. Each connection prepares it at
// its first use and keeps it. Parameters are $1, $2, …, as in PostgreSQL.
type query struct{ text string }

// conn is one connection to the database and the statements prepared on it.
// It talks to the driver directly: database/sql would add locks, goroutines
// and conversions to every call, and the connections here have one user at a
// time anyway. Not safe for concurrent use.
//
// No context reaches the driver, which would start a goroutine for each call:
// what this package asks takes microseconds, except where the disk stalls,
// and there no interruption would help. A context bounds the wait for a
// connection instead, and the wait for the writer.
type conn struct {
	driver   driver.Conn
	prepared map[*query]statement
	args     []driver.NamedValue
	row      []driver.Value

	// erased is set by whoever removes key material from a row; see eraser.
	erased bool
}

// statement is what the driver's prepared statements are, beyond driver.Stmt.
type statement interface {
	driver.Stmt
	driver.StmtExecContext
	driver.StmtQueryContext
}

// connect opens a connection.
func connect(ctx context.Context, connector driver.Connector) (*conn, error) {
	c, err := connector.Connect(ctx)
	if err != nil {
		return nil, classify(err)
	}
	return &conn{driver: c, prepared: make(map[*query]statement)}, nil
}

// close releases the statements and the connection.
func (c *conn) close() error {
	var errs []error
	for _, s := range c.prepared {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, c.driver.Close())...)
}

// prepare returns the statement of q on this connection.
func (c *conn) prepare(q *query) (statement, error) {
	if s, ok := c.prepared[q]; ok {
		return s, nil
	}
	s, err := c.statement(q.text)
	if err != nil {
		return nil, err
	}
	c.prepared[q] = s
	return s, nil
}

// statement prepares text, for the caller to close.
func (c *conn) statement(text string) (statement, error) {
	s, err := c.driver.Prepare(text)
	if err != nil {
		return nil, classify(err)
	}
	st, ok := s.(statement)
	if !ok {
		return nil, errors.Join(fmt.Errorf("sqlite: the driver's statement is a %T", s), s.Close())
	}
	return st, nil
}

// exec runs q and returns how many rows it changed.
func (c *conn) exec(q *query, args ...driver.Value) (changed int64, err error) {
	s, err := c.prepare(q)
	if err != nil {
		return 0, err
	}
	res, err := s.ExecContext(context.Background(), c.bind(args))
	if err != nil {
		return 0, classify(err)
	}
	changed, err = res.RowsAffected()
	return changed, classify(err)
}

// one runs q and gives its first row to scan, which copies what it keeps of
// it. It returns false if there is no row.
func (c *conn) one(q *query, scan func(row []driver.Value), args ...driver.Value) (found bool, err error) {
	s, err := c.prepare(q)
	if err != nil {
		return false, err
	}
	return c.run(s, 1, scan, args)
}

// all runs q and gives every row of it to scan.
func (c *conn) all(q *query, scan func(row []driver.Value), args ...driver.Value) error {
	s, err := c.prepare(q)
	if err != nil {
		return err
	}
	_, err = c.run(s, -1, scan, args)
	return err
}

// run gives the first limit rows of s to scan, all of them if limit is
// negative, and reports whether there was any.
func (c *conn) run(s statement, limit int, scan func(row []driver.Value), args []driver.Value) (found bool, err error) {
	rows, err := s.QueryContext(context.Background(), c.bind(args))
	if err != nil {
		return false, classify(err)
	}
	defer func() {
		if e := rows.Close(); e != nil && err == nil {
			err = classify(e)
		}
	}()
	columns := len(rows.Columns())
	if cap(c.row) < columns {
		c.row = make([]driver.Value, columns)
	}
	row := c.row[:columns]
	defer clear(row)
	for ; limit != 0; limit-- {
		switch err := rows.Next(row); {
		case errors.Is(err, io.EOF):
			return found, nil
		case err != nil:
			return found, classify(err)
		}
		found = true
		scan(row)
	}
	return found, nil
}

// bind numbers the arguments as the driver wants them. The result is good
// until the next call.
func (c *conn) bind(args []driver.Value) []driver.NamedValue {
	c.args = c.args[:0]
	for i, v := range args {
		c.args = append(c.args, driver.NamedValue{Ordinal: i + 1, Value: v})
	}
	return c.args
}
