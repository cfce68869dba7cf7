package engine

import (
	"encoding/binary"
	"time"
)

// A record is a sequence of fields, each a uint32 length, big-endian, and that
// many bytes. Two different sequences never make the same record, so what is
// authenticated over a record is authenticated field by field.

// fieldLen is what a field costs besides its value.
const fieldLen = 4

func appendField[T ~string | ~[]byte](dst []byte, value T) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(value)))
	return append(dst, value...)
}

func appendUint(dst []byte, value uint64) []byte {
	dst = binary.BigEndian.AppendUint32(dst, 8)
	return binary.BigEndian.AppendUint64(dst, value)
}

// appendTime writes seconds since the Unix epoch. The zero time, which means
// none, is an empty field and so no second of any calendar.
func appendTime(dst []byte, t time.Time) []byte {
	if t.IsZero() {
		return appendField(dst, "")
	}
	return appendUint(dst, uint64(t.Unix()))
}

// fields reads a record. After a field that is not there everything reads as
// empty and ok stays false.
type fields struct {
	rest []byte
	ok   bool
}

func readFields(record []byte) fields { return fields{rest: record, ok: true} }

func (f *fields) next() []byte {
	if !f.ok || len(f.rest) < fieldLen {
		f.ok = false
		return nil
	}
	n := binary.BigEndian.Uint32(f.rest)
	f.rest = f.rest[fieldLen:]
	if uint64(n) > uint64(len(f.rest)) {
		f.ok = false
		return nil
	}
	value := f.rest[:n]
	f.rest = f.rest[n:]
	return value
}

// fixed reads a field that has exactly len(dst) bytes.
func (f *fields) fixed(dst []byte) {
	value := f.next()
	if len(value) != len(dst) {
		f.ok = false
		return
	}
	copy(dst, value)
}

func (f *fields) time() time.Time {
	var seconds [8]byte
	f.fixed(seconds[:])
	if !f.ok {
		return time.Time{}
	}
	return time.Unix(int64(binary.BigEndian.Uint64(seconds[:])), 0).UTC()
}

// end reports whether the record held exactly the fields that were read.
func (f *fields) end() bool { return f.ok && len(f.rest) == 0 }
