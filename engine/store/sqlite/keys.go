package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/keyferry/keyferry/engine/store"
)

// keyColumns are the columns of table cmk in the order of cursor.key.
const keyColumns = `cmk.key_id, cmk.key_version_id, cmk.revision, cmk.spec, cmk.state, cmk.description,
	cmk.created_at, cmk.delete_at, cmk.kcv, cmk.material_id, cmk.check_value_algorithm, cmk.check_value,
	cmk.material, cmk.expire_at, cmk.wrapping_algorithm, cmk.pair_id, cmk.pair_fingerprint, cmk.custody, cmk.receipt, cmk.mac`

var (
	insertKeyQuery = &query{`INSERT INTO cmk (key_id, key_version_id, revision, spec, state, description,
	created_at, delete_at, kcv, material_id, check_value_algorithm, check_value,
	material, expire_at, wrapping_algorithm, pair_id, pair_fingerprint, custody, receipt, mac, due_at)
	VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)`}
	keyQuery          = &query{`SELECT ` + keyColumns + ` FROM cmk WHERE key_id = $1`}
	keyByVersionQuery = &query{`SELECT ` + keyColumns + ` FROM cmk WHERE key_version_id = $1`}
	deleteKeyQuery    = &query{`DELETE FROM cmk WHERE key_id = $1 AND revision = $2`}
	keyExistsQuery    = &query{`SELECT 1 FROM cmk WHERE key_id = $1`}
	dueKeysQuery      = &query{`SELECT ` + keyColumns + ` FROM cmk WHERE due_at <= $1 ORDER BY due_at, key_id LIMIT $2`}
)

// updateQueries replace a row, from the cheapest to the one that always may.
// SQLite rewrites an index whenever a statement sets a column of it, changed
// or not, and each index of a large table is another page to write: so the
// first two leave columns with an index alone, and apply only to rows where
// those do not change. Parameters are those of keyValues.
//
//	0: a re-import, a new description: the row itself is all there is to write
//	1: an import, expiry, deletion: the state changes, or when the row is due
//	2: anything
var updateQueries = [...]*query{
	{updateText(``, `AND spec = $4 AND state = $5 AND due_at IS NOT DISTINCT FROM $21
	AND key_version_id = $2 AND created_at IS NOT DISTINCT FROM $7`)},
	{updateText(`, spec = $4, state = $5, due_at = $21`, `AND key_version_id = $2 AND created_at IS NOT DISTINCT FROM $7`)},
	{updateText(`, spec = $4, state = $5, due_at = $21, key_version_id = $2, created_at = $7`, ``)},
}

func updateText(set, where string) string {
	return `UPDATE cmk SET revision = $3, description = $6, delete_at = $8, kcv = $9, material_id = $10,
	check_value_algorithm = $11, check_value = $12, material = $13, expire_at = $14, wrapping_algorithm = $15,
	pair_id = $16, pair_fingerprint = $17, custody = $18, receipt = $19, mac = $20` + set + `
	WHERE key_id = $1 AND revision = $3 - 1 ` + where
}

// keyValues are the values of a row of table cmk: keyColumns and due_at.
func keyValues(k *store.Key) []any {
	return []any{
		k.KeyID, k.KeyVersionID, k.Revision, k.Spec, k.State, k.Description,
		seconds(k.CreatedAt), seconds(k.DeleteAt), k.KCV, k.MaterialID, k.CheckValueAlgorithm, k.CheckValue,
		k.Material, seconds(k.ExpireAt), k.WrappingAlgorithm, k.PairID, k.PairFingerprint, k.Custody, k.Receipt, k.MAC,
		seconds(due(k)),
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

// key reads keyColumns.
func (c *cursor) key() store.Key {
	return store.Key{
		KeyID:               c.text(),
		KeyVersionID:        c.text(),
		Revision:            c.integer(),
		Spec:                c.text(),
		State:               c.text(),
		Description:         c.text(),
		CreatedAt:           c.time(),
		DeleteAt:            c.time(),
		KCV:                 c.bytes(),
		MaterialID:          c.bytes(),
		CheckValueAlgorithm: c.text(),
		CheckValue:          c.bytes(),
		Material:            c.bytes(),
		ExpireAt:            c.time(),
		WrappingAlgorithm:   c.text(),
		PairID:              c.bytes(),
		PairFingerprint:     c.bytes(),
		Custody:             c.text(),
		Receipt:             c.bytes(),
		MAC:                 c.bytes(),
	}
}

// CreateKey implements store.Store.
func (s *Store) CreateKey(ctx context.Context, key store.Key) error {
	if key.Revision != 1 {
		return fmt.Errorf("sqlite: a new key has revision 1, not %d", key.Revision)
	}
	return s.write(ctx, func(c *conn) error {
		_, err := c.exec(insertKeyQuery, keyValues(&key)...)
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

func (s *Store) oneKey(ctx context.Context, q *query, id string) (key store.Key, err error) {
	err = s.read(ctx, func(c *conn) error {
		found, err := c.one(q, func(row *cursor) { key = row.key() }, id)
		if err == nil && !found {
			err = fmt.Errorf("key %q: %w", id, store.ErrNotFound)
		}
		return err
	})
	return key, err
}

// UpdateKey implements store.Store.
func (s *Store) UpdateKey(ctx context.Context, update store.Update) error {
	key := &update.Key
	return s.write(ctx, func(c *conn) error {
		if err := checkHolding(c, key.KeyID, update.Holding); err != nil {
			return err
		}
		if err := checkBudget(c, update.Budget); err != nil {
			return err
		}
		values := keyValues(key)
		queries := updateQueries[:]
		if key.Revision == 2 {
			queries = queries[1:] // nearly always the first import, which changes the state
		}
		for _, q := range queries {
			changed, err := c.exec(q, values...)
			if err != nil {
				return err
			}
			if changed == 1 {
				c.erased = c.erased || key.Material == nil
				if err := holdOnly(c, key.KeyID, update.Holding); err != nil {
					return err
				}
				return addReceipt(c, update.Receipt)
			}
		}
		return unchanged(c, key.KeyID)
	})
}

// DeleteKey implements store.Store.
func (s *Store) DeleteKey(ctx context.Context, deletion store.Deletion) error {
	return s.write(ctx, func(c *conn) error {
		changed, err := c.exec(deleteKeyQuery, deletion.KeyID, deletion.Revision)
		if err != nil {
			return err
		}
		if changed == 1 {
			c.erased = true
			if _, err := c.exec(condemnAllQuery, deletion.KeyID); err != nil {
				return err
			}
			return addReceipt(c, deletion.Receipt)
		}
		return unchanged(c, deletion.KeyID)
	})
}

// unchanged says why no row was changed: it is another revision, or none.
func unchanged(c *conn, keyID string) error {
	found, err := c.one(keyExistsQuery, func(*cursor) {}, keyID)
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
	return rowsOf(ctx, s, (*cursor).key, dueKeysQuery, now.Unix(), int64(max(limit, 0)))
}
