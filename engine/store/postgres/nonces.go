package postgres

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

const (
	// A nonce that is there and has not expired stays as it is, and is not
	// returned.
	addNoncesQuery = `INSERT INTO nonce (digest, seen_at, expires_at)
	SELECT * FROM unnest(CAST($1 AS BYTEA[]), CAST($2 AS BIGINT[]), CAST($3 AS BIGINT[]))
	ON CONFLICT (digest) DO UPDATE SET seen_at = excluded.seen_at, expires_at = excluded.expires_at
	WHERE nonce.expires_at <= excluded.seen_at
	RETURNING digest`
	// Of an array each is found by the index; a subquery might be joined with
	// the whole table.
	deleteNoncesQuery = `DELETE FROM nonce WHERE digest = ANY (ARRAY
	(SELECT digest FROM nonce WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED))`
)

const (
	// nonceBatch bounds how many nonces one statement adds.
	nonceBatch = 512
	// nonceWriters is how many statements add nonces at a time.
	nonceWriters = 2
	// sweepStep is how many nonces one statement forgets, so that a sweep of
	// many locks none for long.
	sweepStep = 1000
)

// digest stands for a nonce, as in package sqlite.
type digest [16]byte

// nonceDigest is a hash of both, the first with its length before it.
func nonceDigest(accessKeyID, value string) digest {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 128), uint32(len(accessKeyID)))
	b = append(b, accessKeyID...)
	sum := sha256.Sum256(append(b, value...))
	return digest(sum[:])
}

// nonceWriter adds nonces in groups: those of the requests that arrive while
// one statement is under way go into the next. There is one for every signed
// request, and a commit each would be the most expensive thing about it.
type nonceWriter struct {
	store *Store

	mu      sync.Mutex
	waiting []*newNonce
	running int // goroutines of run
	closed  bool
	idle    sync.WaitGroup
}

type newNonce struct {
	digest        digest
	seen, expires int64

	fresh bool  // after done
	err   error // after done
	done  chan struct{}
}

func newNonceWriter(s *Store) *nonceWriter { return &nonceWriter{store: s} }

// add waits until n is written, or ctx ends.
func (w *nonceWriter) add(ctx context.Context, n *newNonce) (fresh bool, err error) {
	w.mu.Lock()
	if w.closed {
		w.mu.Unlock()
		return false, errClosed
	}
	w.waiting = append(w.waiting, n)
	if w.running < nonceWriters {
		w.running++
		w.idle.Go(w.run)
	}
	w.mu.Unlock()
	select {
	case <-n.done:
		return n.fresh, n.err
	case <-ctx.Done():
		return false, ctx.Err()
	}
}

// run writes what is waiting until nothing is.
func (w *nonceWriter) run() {
	for {
		w.mu.Lock()
		batch := w.waiting
		if len(batch) > nonceBatch {
			batch = batch[:nonceBatch:nonceBatch]
		}
		w.waiting = w.waiting[len(batch):]
		if len(batch) == 0 {
			w.running--
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		err := w.write(batch)
		for _, n := range batch {
			n.fresh, n.err = n.fresh && err == nil, err
			close(n.done)
		}
	}
}

// write adds a batch in one statement. Of several equal nonces the first is
// the new one. They are sorted, so that two nodes do not wait for each other.
func (w *nonceWriter) write(batch []*newNonce) error {
	byDigest := make(map[digest]*newNonce, len(batch))
	for _, n := range batch {
		if byDigest[n.digest] == nil {
			byDigest[n.digest] = n
		}
	}
	digests := make([][]byte, 0, len(byDigest))
	for d := range byDigest {
		digests = append(digests, bytes.Clone(d[:]))
	}
	slices.SortFunc(digests, bytes.Compare)
	seen, expires := make([]int64, len(digests)), make([]int64, len(digests))
	for i, d := range digests {
		n := byDigest[digest(d)]
		seen[i], expires[i] = n.seen, n.expires
	}
	// Each waits as long as its own context lets it.
	return w.store.write(context.Background(), func(ctx context.Context, c *pgxpool.Conn) error {
		rows, err := c.Query(ctx, addNoncesQuery, digests, seen, expires)
		if err != nil {
			return err
		}
		added, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
		if err != nil {
			return err
		}
		for _, d := range added {
			if n := byDigest[digest(d)]; n != nil {
				n.fresh = true
			}
		}
		return nil
	})
}

// close lets the writing end and refuses what comes later.
func (w *nonceWriter) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.idle.Wait()
}

// AddNonce implements store.Store. Expiry is rounded up to the second: a nonce
// is never forgotten early.
func (s *Store) AddNonce(ctx context.Context, nonce store.Nonce, now time.Time) (fresh bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	return s.nonces.add(ctx, &newNonce{
		digest:  nonceDigest(nonce.AccessKeyID, nonce.Value),
		seen:    now.Unix(),
		expires: nonce.ExpiresAt.Add(time.Second - 1).Unix(),
		done:    make(chan struct{}),
	})
}

// DeleteNonces implements store.Store.
func (s *Store) DeleteNonces(ctx context.Context, now time.Time) error {
	for {
		var deleted int64
		err := s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
			tag, err := c.Exec(ctx, deleteNoncesQuery, now.Unix(), sweepStep)
			deleted = tag.RowsAffected()
			return err
		})
		if err != nil || deleted < sweepStep {
			return err
		}
	}
}
