package sqlite

import (
	"time"
)

// eraseDelay is how long erased material may stay in the write-ahead log: long
// enough for a sweep of many keys to pay for it once.
const eraseDelay = time.Second

// eraser removes from the disk what was deleted from the database. A commit
// only appends new versions of pages to the write-ahead log; the old ones stay
// there, and in the database file until the log is folded into it, for as long
// as nothing else is written. So a moment after key material was removed the
// writer folds the log and empties it; secure_delete has made the pages
// themselves forget.
//
// Its methods run in the writer's goroutine.
type eraser struct {
	noWait, wait, truncate *query

	since time.Time // of the oldest erasure that is still in the log, or zero
}

func newEraser(busyTimeout time.Duration) eraser {
	return eraser{
		noWait:   &query{`PRAGMA busy_timeout = 0`},
		wait:     &query{`PRAGMA busy_timeout = ` + milliseconds(busyTimeout)},
		truncate: &query{`PRAGMA wal_checkpoint(TRUNCATE)`},
	}
}

// look is called after each transaction, and when the delay is over.
func (e *eraser) look(w *writer) {
	if w.conn.erased {
		w.conn.erased = false
		if e.since.IsZero() {
			e.again(w)
		}
	}
	if !e.since.IsZero() && time.Since(e.since) >= eraseDelay {
		e.empty(w)
	}
}

// again has look empty the log when the delay is over.
func (e *eraser) again(w *writer) {
	e.since = time.Now()
	time.AfterFunc(eraseDelay, w.signal)
}

// empty folds the log into the database file and truncates it to nothing. A
// read that is under way prevents that, and is not waited for: the writes that
// come next would have to wait as well.
func (e *eraser) empty(w *writer) {
	ignore := func(*cursor) {}
	var blocked int64
	_, err := w.conn.one(e.noWait, ignore)
	if err == nil {
		_, err = w.conn.one(e.truncate, func(row *cursor) { blocked = row.integer() })
		_, _ = w.conn.one(e.wait, ignore) // fails only if nothing works
	}
	if err != nil || blocked != 0 {
		e.again(w)
		return
	}
	e.since = time.Time{}
}
