package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

// pairColumns are the columns of table pair in the order of pairTargets.
const pairColumns = `pair.id, pair.spec, pair.algorithm, pair.fingerprint, pair.created_at, pair.bound_at, pair.expires_at`

const (
	insertGroupQuery = `INSERT INTO pair_group (spec, algorithm) VALUES ($1, $2) ON CONFLICT DO NOTHING`
	insertPairQuery  = `INSERT INTO pair (id, spec, algorithm, fingerprint, created_at) VALUES ($1, $2, $3, $4, $5)`
	pairsQuery       = `SELECT ` + pairColumns + ` FROM pair ORDER BY created_at, id`
	duePairsQuery    = `SELECT ` + pairColumns + ` FROM pair WHERE expires_at <= $1 ORDER BY expires_at, id LIMIT $2`
	pairCountsQuery  = `SELECT spec, algorithm,
	count(*) FILTER (WHERE expires_at IS NULL),
	count(*) FILTER (WHERE bound_at IS NOT NULL AND expires_at > $1),
	max(bound_at)
	FROM pair GROUP BY spec, algorithm ORDER BY spec, algorithm`
	retirePairQuery = `UPDATE pair SET expires_at = $2 WHERE id = $1 AND expires_at IS NULL`
	pairBoundQuery  = `SELECT bound_at IS NOT NULL FROM pair WHERE id = $1`
	deletePairQuery = `DELETE FROM pair WHERE id = $1`
)

// pairTargets are where a row of pairColumns is scanned to.
func pairTargets(p *store.Pair) []any {
	return []any{
		identifier(p.ID[:]), &p.Spec, &p.Algorithm, identifier(p.Fingerprint[:]),
		(*instant)(&p.CreatedAt), (*instant)(&p.BoundAt), (*instant)(&p.ExpiresAt),
	}
}

// AddPair implements store.Store. The group of the pair is there before it.
func (s *Store) AddPair(ctx context.Context, pair store.Pair) error {
	return s.transact(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, insertGroupQuery, pair.Spec, pair.Algorithm); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, insertPairQuery, pair.ID[:], pair.Spec, pair.Algorithm, pair.Fingerprint[:], seconds(pair.CreatedAt))
		return err
	})
}

// Pairs implements store.Store.
func (s *Store) Pairs(ctx context.Context, due time.Time, limit int) ([]store.Pair, error) {
	return dueOf(ctx, s, func(row pgx.CollectableRow) (p store.Pair, err error) {
		err = row.Scan(pairTargets(&p)...)
		return p, err
	}, pairsQuery, duePairsQuery, due, limit)
}

// PairCounts implements store.Store.
func (s *Store) PairCounts(ctx context.Context, now time.Time) ([]store.PairCount, error) {
	return rowsOf(ctx, s, func(row pgx.CollectableRow) (p store.PairCount, err error) {
		err = row.Scan(&p.Spec, &p.Algorithm, &p.Ready, &p.Bound, (*instant)(&p.LastBoundAt))
		return p, err
	}, pairCountsQuery, now.Unix())
}

// RetirePair implements store.Store.
func (s *Store) RetirePair(ctx context.Context, id [16]byte, now time.Time) error {
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		changed, err := c.Exec(ctx, retirePairQuery, id[:], now.Unix())
		if err != nil || changed.RowsAffected() == 1 {
			return err
		}
		var bound bool
		err = c.QueryRow(ctx, pairBoundQuery, id[:]).Scan(&bound)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return fmt.Errorf("pair %x: %w", id, store.ErrNotFound)
		case err != nil:
			return err
		case bound:
			return fmt.Errorf("pair %x is bound: %w", id, store.ErrConflict)
		default: // retired before
			return nil
		}
	})
}

// DeletePair implements store.Store.
func (s *Store) DeletePair(ctx context.Context, id [16]byte) error {
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		_, err := c.Exec(ctx, deletePairQuery, id[:])
		return err
	})
}
