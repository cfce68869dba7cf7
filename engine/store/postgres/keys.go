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

// keyColumns are the columns of table cmk in the order of keyTargets.
const keyColumns = `cmk.key_id, cmk.key_version_id, cmk.revision, cmk.spec, cmk.state, cmk.description,
	cmk.created_at, cmk.delete_at, cmk.kcv, cmk.material_id, cmk.check_value_algorithm, cmk.check_value,
	cmk.material, cmk.expire_at, cmk.wrapping_algorithm, cmk.pair_id, cmk.pair_fingerprint, cmk.custody, cmk.receipt, cmk.mac`

const (
	insertKeyQuery = `INSERT INTO cmk (key_id, key_version_id, revision, spec, state, description,
	created_at, delete_at, kcv, material_id, check_value_algorithm, check_value,
	material, expire_at, wrapping_algorithm, pair_id, pair_fingerprint, custody, receipt, mac, due_at)
	VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)`
	updateKeyQuery = `UPDATE cmk SET key_version_id = $2, revision = $3, spec = $4, state = $5, description = $6,
	created_at = $7, delete_at = $8, kcv = $9, material_id = $10, check_value_algorithm = $11, check_value = $12,
	material = $13, expire_at = $14, wrapping_algorithm = $15, pair_id = $16, pair_fingerprint = $17, custody = $18,
	receipt = $19, mac = $20, due_at = $21
	WHERE key_id = $1 AND revision = $3 - 1`
	updateWithinBudgetQuery = updateKeyQuery + `
	AND EXISTS (SELECT 1 FROM import_token WHERE id = $22 AND failures < $23)`
	withinBudgetQuery = `SELECT EXISTS (SELECT 1 FROM import_token WHERE id = $1 AND failures < $2)`
	keyQuery          = `SELECT ` + keyColumns + ` FROM cmk WHERE key_id = $1`
	keyByVersionQuery = `SELECT ` + keyColumns + ` FROM cmk WHERE key_version_id = $1`
	deleteKeyQuery    = `DELETE FROM cmk WHERE key_id = $1 AND revision = $2`
	keyExistsQuery    = `SELECT EXISTS (SELECT 1 FROM cmk WHERE key_id = $1)`
	dueKeysQuery      = `SELECT ` + keyColumns + ` FROM cmk WHERE due_at <= $1 ORDER BY due_at, key_id LIMIT $2`
)

// keyValues are the values of a row of table cmk: keyColumns and due_at.
func keyValues(k *store.Key) []any {
	return []any{
		k.KeyID, k.KeyVersionID, k.Revision, k.Spec, k.State, []byte(k.Description),
		seconds(k.CreatedAt), seconds(k.DeleteAt), k.KCV, k.MaterialID, k.CheckValueAlgorithm, k.CheckValue,
		k.Material, seconds(k.ExpireAt), k.WrappingAlgorithm, k.PairID, k.PairFingerprint, k.Custody, k.Receipt, k.MAC,
		seconds(due(k)),
	}
}

// keyTargets are where a row of keyColumns is scanned to.
func keyTargets(k *store.Key) []any {
	return []any{
		&k.KeyID, &k.KeyVersionID, &k.Revision, &k.Spec, &k.State, (*utf8Bytes)(&k.Description),
		(*instant)(&k.CreatedAt), (*instant)(&k.DeleteAt), &k.KCV, &k.MaterialID, &k.CheckValueAlgorithm, &k.CheckValue,
		&k.Material, (*instant)(&k.ExpireAt), &k.WrappingAlgorithm, &k.PairID, &k.PairFingerprint, &k.Custody, &k.Receipt, &k.MAC,
	}
}

// due is when DueKeys begins to return the row; zero: never.
func due(k *store.Key) time.Time {
	at := k.DeleteAt
	if k.Material != nil && !k.ExpireAt.IsZero() && (at.IsZero() || k.ExpireAt.Before(at)) {
		at = k.ExpireAt
	}
	return at
}

// collectKey scans keyColumns.
func collectKey(row pgx.CollectableRow) (key store.Key, err error) {
	err = row.Scan(keyTargets(&key)...)
	return key, err
}

// CreateKey implements store.Store.
func (s *Store) CreateKey(ctx context.Context, key store.Key) error {
	if key.Revision != 1 {
		return fmt.Errorf("postgres: a new key has revision 1, not %d", key.Revision)
	}
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		_, err := c.Exec(ctx, insertKeyQuery, keyValues(&key)...)
		return err
	})
}

// Key implements store.Store.
func (s *Store) Key(ctx context.Context, keyID string) (store.Key, error) {
	return s.oneKey(ctx, keyQuery, keyID)
}

// KeyByVersion implements store.Store.
func (s *Store) KeyByVersion(ctx context.Context, versionID string) (store.Key, error) {
	return s.oneKey(ctx, keyByVersionQuery, versionID)
}

func (s *Store) oneKey(ctx context.Context, query, id string) (key store.Key, err error) {
	err = s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		key = store.Key{}
		err := c.QueryRow(ctx, query, id).Scan(keyTargets(&key)...)
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("key %q: %w", id, store.ErrNotFound)
		}
		return err
	})
	return key, err
}

// UpdateKey implements store.Store.
func (s *Store) UpdateKey(ctx context.Context, update store.Update) error {
	query, args := updateKeyQuery, keyValues(&update.Key)
	if b := update.Budget; b != nil {
		query, args = updateWithinBudgetQuery, append(args, b.TokenID[:], int64(b.Failures))
	}
	query, args = s.whole(query, args, update.Receipt, update.Stale)
	if update.Holding == nil {
		return s.change(ctx, update.Key.KeyID, update.Budget, query, args)
	}
	return s.changeHolding(ctx, update.Key.KeyID, update.Budget, query, args, func(ctx context.Context, tx pgx.Tx) error {
		return hold(ctx, tx, update.Key.KeyID, update.Holding)
	})
}

// DeleteKey implements store.Store.
func (s *Store) DeleteKey(ctx context.Context, deletion store.Deletion) error {
	query, args := s.whole(deleteKeyQuery, []any{deletion.KeyID, deletion.Revision}, deletion.Receipt, true)
	return s.changeHolding(ctx, deletion.KeyID, nil, query, args, func(ctx context.Context, tx pgx.Tx) error {
		_, err := tx.Exec(ctx, condemnAllQuery, deletion.KeyID)
		return err
	})
}

// whole makes one statement of one that changes the row of a key and of those
// that add a pending receipt and notify the other nodes, if the row was
// changed. It affects as many rows as the first.
//
// Transactions that notify commit one after the other, forced writes and all:
// so only those do that must.
func (s *Store) whole(query string, args []any, receipt *store.Receipt, stale bool) (string, []any) {
	stale = stale && s.watcher != nil
	if receipt == nil && !stale {
		return query, args
	}
	query = `WITH changed AS (` + query + ` RETURNING key_id, key_version_id)`
	if receipt != nil {
		query, args = withReceipt(query, args, receipt)
	}
	if !stale {
		return query + ` SELECT key_id FROM changed`, args
	}
	args = append(args, channel, s.watcher.name)
	return fmt.Sprintf(`%s SELECT CAST(pg_notify($%d, $%d || ' ' || key_id || ' ' || key_version_id) AS TEXT) FROM changed`,
		query, len(args)-1, len(args)), args
}

// change has one statement change the row of a key, if its revision is the
// right one and the budget allows it.
func (s *Store) change(ctx context.Context, keyID string, budget *store.Budget, query string, args []any) error {
	return s.write(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		changed, err := c.Exec(ctx, query, args...)
		if err != nil || changed.RowsAffected() == 1 {
			return err
		}
		return unchanged(ctx, c, keyID, budget)
	})
}

// changeHolding is change with more to do in the same transaction.
func (s *Store) changeHolding(
	ctx context.Context, keyID string, budget *store.Budget, query string, args []any, more func(context.Context, pgx.Tx) error,
) error {
	return s.transact(ctx, func(ctx context.Context, tx pgx.Tx) error {
		changed, err := tx.Exec(ctx, query, args...)
		if err != nil {
			return err
		}
		if changed.RowsAffected() != 1 {
			return unchanged(ctx, tx, keyID, budget)
		}
		return more(ctx, tx)
	})
}

// querier is a connection, or a transaction on one.
type querier interface {
	QueryRow(ctx context.Context, query string, args ...any) pgx.Row
}

// unchanged says why no row was changed: the budget does not allow it, it is
// another revision, or there is none.
func unchanged(ctx context.Context, c querier, keyID string, b *store.Budget) error {
	var found, allowed bool
	if b != nil {
		if err := c.QueryRow(ctx, withinBudgetQuery, b.TokenID[:], int64(b.Failures)).Scan(&allowed); err != nil {
			return err
		}
		if !allowed {
			return fmt.Errorf("import token %x: %w", b.TokenID, store.ErrSpent)
		}
	}
	err := c.QueryRow(ctx, keyExistsQuery, keyID).Scan(&found)
	switch {
	case err != nil:
		return err
	case found:
		return fmt.Errorf("key %q: %w", keyID, store.ErrConflict)
	default:
		return fmt.Errorf("key %q: %w", keyID, store.ErrNotFound)
	}
}

// DueKeys implements store.Store.
func (s *Store) DueKeys(ctx context.Context, now time.Time, limit int) ([]store.Key, error) {
	return rowsOf(ctx, s, collectKey, dueKeysQuery, now.Unix(), max(limit, 0))
}
