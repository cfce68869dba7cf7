package postgres

import (
	"fmt"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
)

// seconds is t as stored: whole seconds since 1970, NULL for the zero time.
func seconds(t time.Time) pgtype.Int8 {
	if t.IsZero() {
		return pgtype.Int8{}
	}
	return pgtype.Int8{Int64: t.Unix(), Valid: true}
}

// instant scans what seconds stores.
type instant time.Time

// ScanInt64 implements pgtype.Int64Scanner.
func (t *instant) ScanInt64(v pgtype.Int8) error {
	*t = instant{}
	if v.Valid {
		*t = instant(time.Unix(v.Int64, 0).UTC())
	}
	return nil
}

// whole is t as it would be read back.
func whole(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return time.Unix(t.Unix(), 0).UTC()
}

// identifier scans a column of exactly so many bytes, or NULL, which leaves it
// as it is.
type identifier []byte

// ScanBytes implements pgtype.BytesScanner.
func (id identifier) ScanBytes(v []byte) error {
	if v != nil && len(v) != len(id) {
		return fmt.Errorf("%w: %d bytes where %d belong", errRow, len(v), len(id))
	}
	copy(id, v)
	return nil
}

// utf8Bytes scans text that is stored as bytes.
type utf8Bytes string

// ScanBytes implements pgtype.BytesScanner.
func (s *utf8Bytes) ScanBytes(v []byte) error {
	*s = utf8Bytes(v)
	return nil
}
