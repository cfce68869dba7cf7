package sqlite

import (
	"database/sql/driver"
	"time"
)

// seconds is t as stored: whole seconds since 1970, NULL for the zero time.
func seconds(t time.Time) driver.Value {
	if t.IsZero() {
		return nil
	}
	return t.Unix()
}

// bytes is b as stored: NULL for nil, which is not the same as empty.
func bytes(b []byte) driver.Value {
	if b == nil {
		return nil
	}
	return b
}

// cursor reads the columns of a row one after the other. The columns have the
// types of a STRICT table, and NULL reads as the zero value.
type cursor struct{ row []driver.Value }

func (c *cursor) next() driver.Value {
	v := c.row[0]
	c.row = c.row[1:]
	return v
}

func (c *cursor) text() string {
	s, _ := c.next().(string)
	return s
}

func (c *cursor) integer() int64 {
	n, _ := c.next().(int64)
	return n
}

func (c *cursor) time() time.Time {
	n, ok := c.next().(int64)
	if !ok {
		return time.Time{}
	}
	return time.Unix(n, 0).UTC()
}

// bytes returns a slice that belongs to the caller. The driver reads an empty
// blob as nil of type []byte.
func (c *cursor) bytes() []byte {
	b, ok := c.next().([]byte)
	if ok && b == nil {
		return []byte{}
	}
	return b
}

// id fills dst, and leaves it alone if the column is NULL.
func (c *cursor) id(dst []byte) {
	copy(dst, c.bytes())
}
