package sqlite

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"modernc.org/libc"
	lite "modernc.org/sqlite/lib"
)

// query is one SQL statement of this package. Each connection prepares it at
// its first use and keeps it. Parameters are $1, $2, …, as in PostgreSQL.
type query struct{ text string }

// conn is one connection to the database and the statements prepared on it.
// It makes the calls of SQLite's C interface itself: database/sql would add locks,
// goroutines and conversions to every call, and the driver below it asks for the
// names and declared types of all columns before it reads any row, and for the
// name of every parameter, which takes longer than what SQLite does here.
//
// Not safe for concurrent use: SQLite is told so, and takes no locks for it. A
// connection has one statement under way at a time.
//
// No context reaches SQLite: what this package asks takes microseconds, except
// where the disk stalls, and there no interruption would help. A context bounds
// the wait for a connection instead, and the wait for the writer.
type conn struct {
	tls      *libc.TLS
	db       uintptr // sqlite3*
	prepared map[*query]*statement
	busy     bool // a statement is under way, and uses room

	// room is memory of SQLite's for the texts and blobs of one statement's
	// parameters, which SQLite does not copy: they stay until the next.
	room uintptr
	size int

	// erased is set by whoever removes key material from a row; see eraser.
	erased bool
}

// statement is a prepared statement.
type statement struct {
	c    *conn
	p    uintptr // sqlite3_stmt*
	args []int   // which argument, from 0, each parameter is
}

// connect opens a connection to the database that uri names, and sets it up.
func connect(ctx context.Context, uri string, pragmas []string) (_ *conn, err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c := &conn{tls: libc.NewTLS(), prepared: make(map[*query]*statement)}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close())
		}
	}()
	name, err := libc.CString(uri)
	if err != nil {
		return nil, err
	}
	defer libc.Xfree(c.tls, name)
	out := c.tls.Alloc(pointerLen)
	defer c.tls.Free(pointerLen)
	rc := lite.Xsqlite3_open_v2(c.tls, name, out, lite.SQLITE_OPEN_READWRITE|lite.SQLITE_OPEN_NOMUTEX|lite.SQLITE_OPEN_URI, 0)
	c.db = libc.AtomicLoadPUintptr(out) // also of a database that did not open
	if rc != lite.SQLITE_OK {
		return nil, classify(c.fault(rc))
	}
	lite.Xsqlite3_extended_result_codes(c.tls, c.db, 1) // fails only for no connection
	for _, pragma := range pragmas {
		if err := c.set(pragma); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// set runs one PRAGMA.
func (c *conn) set(pragma string) error {
	s, err := c.statement(`PRAGMA ` + pragma)
	if err != nil {
		return err
	}
	_, err = c.run(s, -1, func(*cursor) {}, nil)
	s.close()
	return err
}

// pointerLen is the size of a pointer in C.
const pointerLen = strconv.IntSize / 8

// close releases the statements and the connection.
func (c *conn) close() error {
	for _, s := range c.prepared {
		s.close()
	}
	var err error
	if c.db != 0 {
		if rc := lite.Xsqlite3_close_v2(c.tls, c.db); rc != lite.SQLITE_OK {
			err = classify(c.fault(rc))
		}
	}
	if c.room != 0 {
		libc.Xfree(c.tls, c.room)
	}
	c.tls.Close()
	return err
}

// prepare returns the statement of q on this connection.
func (c *conn) prepare(q *query) (*statement, error) {
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
func (c *conn) statement(text string) (*statement, error) {
	sql, err := libc.CString(text)
	if err != nil {
		return nil, err
	}
	defer libc.Xfree(c.tls, sql)
	out := c.tls.Alloc(pointerLen)
	defer c.tls.Free(pointerLen)
	if rc := lite.Xsqlite3_prepare_v3(c.tls, c.db, sql, -1, lite.SQLITE_PREPARE_PERSISTENT, out, 0); rc != lite.SQLITE_OK {
		return nil, classify(c.fault(rc))
	}
	s := &statement{c: c, p: libc.AtomicLoadPUintptr(out)}
	for i := range lite.Xsqlite3_bind_parameter_count(c.tls, s.p) {
		// SQLite numbers names in the order in which it meets them.
		name := libc.GoString(lite.Xsqlite3_bind_parameter_name(c.tls, s.p, i+1))
		n, err := strconv.Atoi(name[min(1, len(name)):])
		if err != nil || n < 1 {
			s.close()
			return nil, fmt.Errorf("sqlite: parameter %q of %s is not a number", name, text)
		}
		s.args = append(s.args, n-1)
	}
	return s, nil
}

// close releases the statement.
func (s *statement) close() { lite.Xsqlite3_finalize(s.c.tls, s.p) } // its error is that of the last run

// exec runs q and returns how many rows it changed.
func (c *conn) exec(q *query, args ...any) (changed int64, err error) {
	s, err := c.prepare(q)
	if err != nil {
		return 0, err
	}
	if _, err := c.run(s, -1, func(*cursor) {}, args); err != nil {
		return 0, err
	}
	return int64(lite.Xsqlite3_changes(c.tls, c.db)), nil
}

// one runs q and gives its first row to scan, which copies what it keeps of
// it. It returns false if there is no row.
func (c *conn) one(q *query, scan func(*cursor), args ...any) (found bool, err error) {
	s, err := c.prepare(q)
	if err != nil {
		return false, err
	}
	return c.run(s, 1, scan, args)
}

// all runs q and gives every row of it to scan.
func (c *conn) all(q *query, scan func(*cursor), args ...any) error {
	s, err := c.prepare(q)
	if err != nil {
		return err
	}
	_, err = c.run(s, -1, scan, args)
	return err
}

// run gives the first limit rows of s to scan, all of them if limit is
// negative, and reports whether there was any. scan must not run another
// statement.
func (c *conn) run(s *statement, limit int, scan func(*cursor), args []any) (found bool, err error) {
	if c.busy {
		return false, errors.New("sqlite: a statement is under way on the connection")
	}
	c.busy = true
	defer func() {
		lite.Xsqlite3_reset(c.tls, s.p) // its error is that of the last step
		c.busy = false
	}()
	if err := s.bind(args); err != nil {
		return false, err
	}
	for ; limit != 0; limit-- {
		switch rc := lite.Xsqlite3_step(c.tls, s.p); rc {
		case lite.SQLITE_DONE:
			return found, nil
		case lite.SQLITE_ROW:
			found = true
			scan(&cursor{tls: c.tls, stmt: s.p})
		default:
			return found, classify(c.fault(rc))
		}
	}
	return found, nil
}

// bind gives the statement its arguments: nil, int64, string or []byte, of which
// a nil one is NULL, so that NOT NULL refuses what was left out.
func (s *statement) bind(args []any) error {
	need := 0
	for _, arg := range args {
		switch v := arg.(type) {
		case string:
			need += len(v)
		case []byte:
			need += len(v)
		}
	}
	c := s.c
	at, err := c.reserve(need)
	if err != nil {
		return err
	}
	for i, n := range s.args {
		if n >= len(args) {
			return fmt.Errorf("sqlite: %d arguments, and there is a parameter $%d", len(args), n+1)
		}
		var rc int32
		parameter := int32(i + 1)
		switch v := args[n].(type) {
		case nil:
			rc = lite.Xsqlite3_bind_null(c.tls, s.p, parameter)
		case int64:
			rc = lite.Xsqlite3_bind_int64(c.tls, s.p, parameter, v)
		case string:
			copy(libc.GoBytes(at, len(v)), v)
			rc = lite.Xsqlite3_bind_text(c.tls, s.p, parameter, at, int32(len(v)), lite.SQLITE_STATIC)
			at += uintptr(len(v))
		case []byte:
			if v == nil {
				rc = lite.Xsqlite3_bind_null(c.tls, s.p, parameter)
				break
			}
			copy(libc.GoBytes(at, len(v)), v)
			rc = lite.Xsqlite3_bind_blob(c.tls, s.p, parameter, at, int32(len(v)), lite.SQLITE_STATIC)
			at += uintptr(len(v))
		default:
			return fmt.Errorf("sqlite: an argument is a %T", v)
		}
		if rc != lite.SQLITE_OK {
			return classify(c.fault(rc))
		}
	}
	return nil
}

// reserve makes sure that room has so many bytes, and one for what has none.
func (c *conn) reserve(n int) (uintptr, error) {
	if n < c.size {
		return c.room, nil
	}
	size := max(2*c.size, n+1, 1024)
	p := libc.Xmalloc(c.tls, uint64(size))
	if p == 0 {
		return 0, classify(&fault{code: lite.SQLITE_NOMEM, text: "out of memory"})
	}
	if c.room != 0 {
		libc.Xfree(c.tls, c.room)
	}
	c.room, c.size = p, size
	return p, nil
}

// fault is an error of SQLite.
type fault struct {
	code int32 // the extended result code
	text string
}

func (f *fault) Error() string { return fmt.Sprintf("%s (%d)", f.text, f.code) }

// fault describes a result code of the call that was made last.
func (c *conn) fault(rc int32) error {
	text := libc.GoString(lite.Xsqlite3_errstr(c.tls, rc))
	// What the connection says may be about another call; see rescode.html.
	if said := lite.Xsqlite3_extended_errcode(c.tls, c.db); said == rc || said&0xff == rc&0xff {
		if more := libc.GoString(lite.Xsqlite3_errmsg(c.tls, c.db)); more != text {
			text += ": " + more
		}
	}
	return &fault{code: rc, text: text}
}
