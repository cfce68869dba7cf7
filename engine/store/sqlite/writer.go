package sqlite

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// maxBatch bounds how many writes share a transaction, so that the first of a
// long queue need not wait for all of it to be executed.
const maxBatch = 512

var (
	beginQuery    = &query{`BEGIN IMMEDIATE`}
	commitQuery   = &query{`COMMIT`}
	rollbackQuery = &query{`ROLLBACK`}
)

// writer commits in groups: while one transaction reaches the disk, the writes
// that arrive meanwhile gather, and the next transaction takes all of them, so
// that one fsync pays for many.
type writer struct {
	// Used by the goroutine of run only.
	conn   *conn
	nonces *nonces
	eraser eraser

	mu      sync.Mutex
	waiting []*write
	closed  bool

	wake chan struct{} // holds one token while waiting may be non-empty
	done chan struct{} // closed when run has returned
}

// write is one caller's part of a transaction.
type write struct {
	// do makes the change. It must not write before it is sure to succeed: an
	// answer for which refused holds leaves what it has written in the
	// transaction. It may run more than once, each time on a clean slate.
	do func(*conn) error

	// running is held while do runs and guards abandoned. A caller that gives
	// up sets abandoned, after which do never runs again: what it reads and
	// writes belongs to the caller alone once more.
	running   sync.Mutex
	abandoned bool

	err  error         // of do
	done chan struct{} // closed when the write is committed or has failed
}

func newWriter(c *conn, n *nonces, busyTimeout time.Duration) *writer {
	w := &writer{conn: c, nonces: n, eraser: newEraser(busyTimeout), wake: make(chan struct{}, 1), done: make(chan struct{})}
	go w.run()
	return w
}

// write has do executed within a transaction and returns when that is durable.
// If it returns an error, nothing that do assigned may be used.
func (w *writer) write(ctx context.Context, do func(*conn) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	op := &write{do: do, done: make(chan struct{})}

	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return errClosed
	}
	w.waiting = append(w.waiting, op)
	w.mu.Unlock()
	w.signal()

	select {
	case <-op.done:
		return op.err
	case <-ctx.Done():
		op.running.Lock()
		op.abandoned = true
		op.running.Unlock()
		return ctx.Err()
	}
}

func (w *writer) signal() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// close executes what is waiting, refuses the rest, and closes the connection.
func (w *writer) close() error {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.signal()
	<-w.done
	return w.conn.close()
}

// run is the writer's goroutine.
func (w *writer) run() {
	defer close(w.done)
	for range w.wake {
		for {
			batch, closed := w.take()
			if len(batch) == 0 {
				if closed {
					return
				}
				w.eraser.look(w)
				break
			}
			w.commit(batch)
			w.eraser.look(w)
		}
	}
}

// take removes up to maxBatch writes from the queue.
func (w *writer) take() (batch []*write, closed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	batch, w.waiting = w.waiting, nil
	if len(batch) > maxBatch {
		batch, w.waiting = batch[:maxBatch:maxBatch], batch[maxBatch:]
	}
	return batch, w.closed
}

// commit executes batch in one transaction and answers its members. If one of
// them fails for a reason of its own, it costs the others nothing but time:
// each is tried again by itself.
func (w *writer) commit(batch []*write) {
	err := w.transact(batch)
	if err != nil && len(batch) > 1 && !errors.Is(err, errCommit) {
		for _, op := range batch {
			w.commit([]*write{op})
		}
		return
	}
	for _, op := range batch {
		if err != nil {
			op.err = err
		}
		close(op.done)
	}
}

// errCommit marks the failure of a BEGIN or COMMIT, for which no member of the
// batch is to blame and which would only fail again.
var errCommit = fmt.Errorf("%w: no transaction", store.ErrUnavailable)

// transact executes batch in one transaction. The answer of each member is in
// its err field; the error returned is one that ended the transaction.
func (w *writer) transact(batch []*write) error {
	if _, err := w.conn.exec(beginQuery); err != nil {
		return fmt.Errorf("%w: %v", errCommit, err)
	}
	for _, op := range batch {
		if failed := op.run(w.conn); failed {
			w.rollback()
			return op.err
		}
	}
	if err := w.nonces.write(w.conn); err != nil {
		w.rollback()
		return err
	}
	if _, err := w.conn.exec(commitQuery); err != nil {
		w.rollback()
		return fmt.Errorf("%w: %v", errCommit, err)
	}
	w.nonces.committed()
	return nil
}

// run executes the write unless its caller has given up, and reports whether
// the transaction is spoilt by it.
func (op *write) run(c *conn) (failed bool) {
	op.running.Lock()
	defer op.running.Unlock()
	if op.abandoned {
		return false
	}
	op.err = op.do(c)
	return op.err != nil && !refused(op.err)
}

// rollback ends the transaction. Its only failure is that SQLite has done so
// by itself, as it does after some errors.
func (w *writer) rollback() {
	_, _ = w.conn.exec(rollbackQuery)
	w.nonces.rolledBack()
}
