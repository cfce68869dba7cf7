package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// pairColumns are the columns of table pair in the order of cursor.pair.
const pairColumns = `pair.id, pair.spec, pair.algorithm, pair.fingerprint, pair.created_at, pair.bound_at, pair.expires_at`

var (
	insertPairQuery = &query{`INSERT INTO pair (id, spec, algorithm, fingerprint, created_at) VALUES ($1, $2, $3, $4, $5)`}
	pairsQuery      = &query{`SELECT ` + pairColumns + ` FROM pair ORDER BY created_at, id`}
	duePairsQuery   = &query{`SELECT ` + pairColumns + ` FROM pair WHERE expires_at <= $1 ORDER BY expires_at, id LIMIT $2`}
	pairCountsQuery = &query{`SELECT spec, algorithm,
	count(*) FILTER (WHERE expires_at IS NULL),
	count(*) FILTER (WHERE bound_at IS NOT NULL AND expires_at > $1),
	max(bound_at)
	FROM pair GROUP BY spec, algorithm ORDER BY spec, algorithm`}
	retirePairQuery = &query{`UPDATE pair SET expires_at = $2 WHERE id = $1 AND expires_at IS NULL`}
	pairBoundQuery  = &query{`SELECT bound_at FROM pair WHERE id = $1`}
	deletePairQuery = &query{`DELETE FROM pair WHERE id = $1`}
)

// pair reads pairColumns.
func (c *cursor) pair() (p store.Pair) {
	c.id(p.ID[:])
	p.Spec = c.text()
	p.Algorithm = c.text()
	c.id(p.Fingerprint[:])
	p.CreatedAt = c.time()
	p.BoundAt = c.time()
	p.ExpiresAt = c.time()
	return p
}

// AddPair implements store.Store.
func (s *Store) AddPair(ctx context.Context, pair store.Pair) error {
	return s.write(ctx, func(c *conn) error {
		_, err := c.exec(insertPairQuery, pair.ID[:], pair.Spec, pair.Algorithm, pair.Fingerprint[:], seconds(pair.CreatedAt))
		return err
	})
}

// Pairs implements store.Store.
func (s *Store) Pairs(ctx context.Context, due time.Time, limit int) ([]store.Pair, error) {
	return dueOf(ctx, s, (*cursor).pair, pairsQuery, duePairsQuery, due, limit)
}

// PairCounts implements store.Store.
func (s *Store) PairCounts(ctx context.Context, now time.Time) ([]store.PairCount, error) {
	return rowsOf(ctx, s, func(c *cursor) store.PairCount {
		return store.PairCount{Spec: c.text(), Algorithm: c.text(), Ready: int(c.integer()), Bound: int(c.integer()), LastBoundAt: c.time()}
	}, pairCountsQuery, now.Unix())
}

// RetirePair implements store.Store.
func (s *Store) RetirePair(ctx context.Context, id [16]byte, now time.Time) error {
	return s.write(ctx, func(c *conn) error {
		changed, err := c.exec(retirePairQuery, id[:], now.Unix())
		if err != nil || changed == 1 {
			return err
		}
		var bound bool
		found, err := c.one(pairBoundQuery, func(row *cursor) { bound = !row.null() }, id[:])
		switch {
		case err != nil:
			return err
		case !found:
			return fmt.Errorf("pair %x: %w", id, store.ErrNotFound)
		case bound:
			return fmt.Errorf("pair %x is bound: %w", id, store.ErrConflict)
		default: // retired before
			return nil
		}
	})
}

// DeletePair implements store.Store.
func (s *Store) DeletePair(ctx context.Context, id [16]byte) error {
	return s.write(ctx, func(c *conn) error {
		_, err := c.exec(deletePairQuery, id[:])
		return err
	})
}
