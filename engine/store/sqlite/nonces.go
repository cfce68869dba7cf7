package sqlite

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

var (
	loadNoncesQuery   = &query{`SELECT nonces FROM nonce_batch`}
	insertNoncesQuery = &query{`INSERT INTO nonce_batch (expires_at, nonces) VALUES ($1, $2)`}
	deleteNoncesQuery = &query{`DELETE FROM nonce_batch WHERE seq IN
	(SELECT seq FROM nonce_batch WHERE expires_at <= $1 ORDER BY expires_at LIMIT $2)`}
)

const (
	// sweepStep is how many batches of nonces one write forgets, so that a
	// sweep of many does not hold up the other writes.
	sweepStep = 200
	// generation is how many seconds' worth of nonces are kept together. A
	// look-up visits every generation, which are about as many as the minutes
	// that a signature is good for.
	generation = 64
	// nonceLen is the length of a nonce in a batch: its digest and its expiry.
	nonceLen = len(digest{}) + 8
)

// digest stands for a nonce: rows and memory stay small however long the
// nonces are that callers choose. 128 bits of SHA-256 are enough, as a
// collision harms only the caller who has found it.
type digest [16]byte

// nonces are all that the database remembers. There is one for every signed
// request, thousands a second, and to look for each in an index of millions
// would be the most expensive thing about a request. But no other process
// writes to the database: so memory answers, 17 bytes for each nonce and the
// slack of a map, and the database need only keep the nonces for the next
// start. It keeps those of one transaction in one row.
//
// Used by the writer's goroutine only.
type nonces struct {
	// seconds of expiry, by generation and digest. The keys of the outer map
	// are expiries divided by generation, the values of the inner ones are the
	// remainders.
	generations map[int64]map[digest]uint8

	batch  []byte // of the transaction under way
	latest int64  // expiry in it
}

// loadNonces reads what the database remembers.
func loadNonces(c *conn) (*nonces, error) {
	n := &nonces{generations: make(map[int64]map[digest]uint8)}
	var broken bool
	err := c.all(loadNoncesQuery, func(row *cursor) {
		batch := row.bytes()
		broken = broken || len(batch)%nonceLen != 0
		for d, expires := range entries(batch) {
			n.put(d, expires)
		}
	})
	if err == nil && broken {
		err = fmt.Errorf("its table nonce_batch is damaged")
	}
	return n, err
}

// entries are the nonces of a batch and when they expire.
func entries(batch []byte) func(yield func(digest, int64) bool) {
	return func(yield func(digest, int64) bool) {
		for ; len(batch) >= nonceLen; batch = batch[nonceLen:] {
			expires := int64(binary.BigEndian.Uint64(batch[len(digest{}):nonceLen]))
			if !yield(digest(batch), expires) {
				return
			}
		}
	}
}

// add remembers d until expires and reports whether it is new at now.
func (n *nonces) add(d digest, expires, now int64) bool {
	for g, ds := range n.generations {
		if remainder, ok := ds[d]; ok && g*generation+int64(remainder) > now {
			return false
		}
	}
	n.put(d, expires)
	n.batch = binary.BigEndian.AppendUint64(append(n.batch, d[:]...), uint64(expires))
	n.latest = max(n.latest, expires)
	return true
}

func (n *nonces) put(d digest, expires int64) {
	g := expires / generation
	if n.generations[g] == nil {
		n.generations[g] = make(map[digest]uint8)
	}
	n.generations[g][d] = uint8(expires % generation)
}

// write adds the transaction's batch to the database.
func (n *nonces) write(c *conn) error {
	if len(n.batch) == 0 {
		return nil
	}
	_, err := c.exec(insertNoncesQuery, n.latest, n.batch)
	return err
}

// committed ends a transaction.
func (n *nonces) committed() { n.batch, n.latest = n.batch[:0], 0 }

// rolledBack ends a transaction and forgets what was added in it.
func (n *nonces) rolledBack() {
	for d, expires := range entries(n.batch) {
		delete(n.generations[expires/generation], d)
	}
	n.committed()
}

// forget drops the generations of which nothing is left at now.
func (n *nonces) forget(now int64) {
	for g := range n.generations {
		if (g+1)*generation <= now {
			delete(n.generations, g)
		}
	}
}

// AddNonce implements store.Store. Expiry is rounded up to the second: a nonce
// is never forgotten early.
func (s *Store) AddNonce(ctx context.Context, nonce store.Nonce, now time.Time) (fresh bool, err error) {
	d := nonceDigest(nonce.AccessKeyID, nonce.Value)
	expires := nonce.ExpiresAt.Add(time.Second - 1).Unix()
	var added bool
	err = s.write(ctx, func(*conn) error {
		added = s.nonces.add(d, expires, now.Unix())
		return nil
	})
	return err == nil && added, err
}

// nonceDigest is a hash of both, the first with its length before it.
func nonceDigest(accessKeyID, value string) digest {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 128), uint32(len(accessKeyID)))
	b = append(b, accessKeyID...)
	sum := sha256.Sum256(append(b, value...))
	return digest(sum[:])
}

// DeleteNonces implements store.Store.
func (s *Store) DeleteNonces(ctx context.Context, now time.Time) error {
	for {
		var deleted int64
		err := s.write(ctx, func(c *conn) (err error) {
			s.nonces.forget(now.Unix())
			deleted, err = c.exec(deleteNoncesQuery, now.Unix(), int64(sweepStep))
			return err
		})
		if err != nil || deleted < sweepStep {
			return err
		}
	}
}
