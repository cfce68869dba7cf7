package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// States stand as numbers in these statements: 1 is store.ResidentExpected, 2
// store.ResidentKept and 3 store.ResidentCondemned.
var (
	insertResidentQuery = &query{`INSERT INTO resident (id, key_id, node, since, state) VALUES ($1, $2, $3, $4, 1)`}
	countResidentsQuery = &query{`SELECT count(*) FROM resident`}
	residentsQuery      = &query{`SELECT id, key_id, node, since, state FROM resident ORDER BY since, id`}
	dueResidentsQuery   = &query{`SELECT id, key_id, node, since, state FROM resident
	WHERE state <> 2 AND (state = 3 OR since <= $1) ORDER BY since, id LIMIT $2`}
	residentStateQuery   = &query{`SELECT state FROM resident WHERE id = $1`}
	condemnResidentQuery = &query{`UPDATE resident SET state = 3 WHERE id = $1 AND state <> 2`}
	removeResidentQuery  = &query{`DELETE FROM resident WHERE id = $1 AND state <> 2`}
	checkHoldingQuery    = &query{`SELECT 1 FROM resident WHERE id = $1 AND key_id = $2 AND state <> 3`}
	holdQuery            = &query{`UPDATE resident SET state = CASE WHEN id = $2 THEN 2 ELSE 3 END
	WHERE key_id = $1 AND (state = 2 OR id = $2)`}
	condemnAllQuery = &query{`UPDATE resident SET state = 3 WHERE key_id = $1`}
)

// checkHolding returns ErrCondemned before anything is written.
func checkHolding(c *conn, keyID string, h *store.Holding) error {
	if h == nil || h.ID == nil {
		return nil
	}
	found, err := c.one(checkHoldingQuery, func(*cursor) {}, h.ID, keyID)
	if err == nil && !found {
		err = fmt.Errorf("key %q: %w", keyID, store.ErrCondemned)
	}
	return err
}

// holdOnly changes the entries of a CMK as its Holding says.
func holdOnly(c *conn, keyID string, h *store.Holding) error {
	if h == nil {
		return nil
	}
	_, err := c.exec(holdQuery, keyID, h.ID)
	return err
}

// AddResident implements store.Store.
func (s *Store) AddResident(ctx context.Context, r store.Resident, limit int) error {
	return s.write(ctx, func(c *conn) error {
		if limit > 0 {
			var n int64
			if _, err := c.one(countResidentsQuery, func(row *cursor) { n = row.integer() }); err != nil {
				return err
			}
			if n >= int64(limit) {
				return fmt.Errorf("%d objects in the token: %w", n, store.ErrLimit)
			}
		}
		_, err := c.exec(insertResidentQuery, r.ID[:], r.KeyID, r.Node, seconds(r.Since))
		return err
	})
}

// Residents implements store.Store.
func (s *Store) Residents(ctx context.Context, due time.Time, limit int) ([]store.Resident, error) {
	return dueOf(ctx, s, func(c *cursor) (r store.Resident) {
		c.id(r.ID[:])
		r.KeyID, r.Node, r.Since, r.State = c.text(), c.text(), c.time(), store.ResidentState(c.integer())
		return r
	}, residentsQuery, dueResidentsQuery, due, limit)
}

// CondemnResident implements store.Store.
func (s *Store) CondemnResident(ctx context.Context, id [16]byte) error {
	return s.write(ctx, func(c *conn) error {
		changed, err := c.exec(condemnResidentQuery, id[:])
		if err != nil || changed == 1 {
			return err
		}
		found, err := c.one(residentStateQuery, func(*cursor) {}, id[:])
		switch {
		case err != nil:
			return err
		case found:
			return fmt.Errorf("object %x is kept: %w", id, store.ErrConflict)
		default:
			return fmt.Errorf("object %x: %w", id, store.ErrNotFound)
		}
	})
}

// RemoveResidents implements store.Store.
func (s *Store) RemoveResidents(ctx context.Context, ids [][16]byte) error {
	return s.write(ctx, func(c *conn) error {
		for _, id := range ids {
			if _, err := c.exec(removeResidentQuery, id[:]); err != nil {
				return err
			}
		}
		return nil
	})
}
