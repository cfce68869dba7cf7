package sqlite

import (
	"time"

	"modernc.org/libc"
	lite "modernc.org/sqlite/lib"
)

// seconds is t as stored: whole seconds since 1970, NULL for the zero time.
func seconds(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.Unix()
}

// cursor reads the columns of the row at which a statement stands, one after the
// other. The columns have the types of a STRICT table, and NULL reads as the zero
// value. It is good until the statement goes on; what it returns is the caller's.
type cursor struct {
	tls  *libc.TLS
	stmt uintptr
	i    int32 // the next column
}

func (c *cursor) next() int32 {
	c.i++
	return c.i - 1
}

// null reports whether the next column is NULL, and goes past it then.
func (c *cursor) null() bool {
	if lite.Xsqlite3_column_type(c.tls, c.stmt, c.i) != lite.SQLITE_NULL {
		return false
	}
	c.i++
	return true
}

func (c *cursor) text() string {
	i := c.next()
	p := lite.Xsqlite3_column_text(c.tls, c.stmt, i)
	if p == 0 {
		return ""
	}
	return string(libc.GoBytes(p, int(lite.Xsqlite3_column_bytes(c.tls, c.stmt, i))))
}

func (c *cursor) integer() int64 { return lite.Xsqlite3_column_int64(c.tls, c.stmt, c.next()) }

func (c *cursor) time() time.Time {
	if c.null() {
		return time.Time{}
	}
	return time.Unix(c.integer(), 0).UTC()
}

// bytes returns nil for NULL alone.
func (c *cursor) bytes() []byte {
	if c.null() {
		return nil
	}
	return append([]byte{}, c.view()...)
}

// view is the next column where SQLite has it.
func (c *cursor) view() []byte {
	i := c.next()
	p := lite.Xsqlite3_column_blob(c.tls, c.stmt, i)
	if p == 0 {
		return nil
	}
	return libc.GoBytes(p, int(lite.Xsqlite3_column_bytes(c.tls, c.stmt, i)))
}

// id fills dst, and leaves it alone if the column is NULL.
func (c *cursor) id(dst []byte) { copy(dst, c.view()) }
