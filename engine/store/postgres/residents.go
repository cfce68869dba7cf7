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

// States stand as numbers in these statements: 1 is store.ResidentExpected, 2
// store.ResidentKept and 3 store.ResidentCondemned.
const (
	insertResidentQuery = `INSERT INTO resident (id, key_id, node, since, state)
	SELECT CAST($1 AS BYTEA), CAST($2 AS TEXT), CAST($3 AS TEXT), CAST($4 AS BIGINT), 1
	WHERE CAST($5 AS BIGINT) = 0 OR (SELECT count(*) FROM resident) < $5`
	residentsQuery    = `SELECT id, key_id, node, since, state FROM resident ORDER BY since, id`
	dueResidentsQuery = `SELECT id, key_id, node, since, state FROM resident
	WHERE state <> 2 AND (state = 3 OR since <= $1) ORDER BY since, id LIMIT $2`
	residentExistsQuery  = `SELECT EXISTS (SELECT 1 FROM resident WHERE id = $1)`
	condemnResidentQuery = `UPDATE resident SET state = 3 WHERE id = $1 AND state <> 2`
	removeResidentsQuery = `DELETE FROM resident WHERE id = ANY($1) AND state <> 2`
	holdQuery            = `UPDATE resident SET state = 2 WHERE id = $1 AND key_id = $2 AND state <> 3`
	condemnOthersQuery   = `UPDATE resident SET state = 3 WHERE key_id = $1 AND state = 2 AND id IS DISTINCT FROM $2`
	condemnAllQuery      = `UPDATE resident SET state = 3 WHERE key_id = $1`
)

// hold changes the entries of a CMK as its Holding says.
func hold(ctx context.Context, tx pgx.Tx, keyID string, h *store.Holding) error {
	if h.ID != nil {
		changed, err := tx.Exec(ctx, holdQuery, h.ID, keyID)
		if err != nil {
			return err
		}
		if changed.RowsAffected() != 1 {
			return fmt.Errorf("key %q: %w", keyID, store.ErrCondemned)
		}
	}
	_, err := tx.Exec(ctx, condemnOthersQuery, keyID, h.ID)
	return err
}

// AddResident implements store.Store.
func (s *Store) AddResident(ctx context.Context, r store.Resident, limit int) error {
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		added, err := c.Exec(ctx, insertResidentQuery, r.ID[:], r.KeyID, r.Node, seconds(r.Since), int64(max(limit, 0)))
		if err == nil && added.RowsAffected() == 0 {
			err = fmt.Errorf("%d objects in the token or more: %w", limit, store.ErrLimit)
		}
		return err
	})
}

// Residents implements store.Store.
func (s *Store) Residents(ctx context.Context, due time.Time, limit int) ([]store.Resident, error) {
	return dueOf(ctx, s, func(row pgx.CollectableRow) (r store.Resident, err error) {
		err = row.Scan(identifier(r.ID[:]), &r.KeyID, &r.Node, (*instant)(&r.Since), &r.State)
		return r, err
	}, residentsQuery, dueResidentsQuery, due, limit)
}

// CondemnResident implements store.Store.
func (s *Store) CondemnResident(ctx context.Context, id [16]byte) error {
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		changed, err := c.Exec(ctx, condemnResidentQuery, id[:])
		if err != nil || changed.RowsAffected() == 1 {
			return err
		}
		var found bool
		err = c.QueryRow(ctx, residentExistsQuery, id[:]).Scan(&found)
		switch {
		case errors.Is(err, pgx.ErrNoRows), err == nil && !found:
			return fmt.Errorf("object %x: %w", id, store.ErrNotFound)
		case err != nil:
			return err
		default:
			return fmt.Errorf("object %x is kept: %w", id, store.ErrConflict)
		}
	})
}

// RemoveResidents implements store.Store.
func (s *Store) RemoveResidents(ctx context.Context, ids [][16]byte) error {
	list := make([][]byte, len(ids))
	for i := range ids {
		list[i] = ids[i][:]
	}
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		_, err := c.Exec(ctx, removeResidentsQuery, list)
		return err
	})
}
