package postgres

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// Setting reads a setting of a session.
func (s *Store) Setting(t *testing.T, name string) (value string) {
	t.Helper()
	require.NoError(t, s.read(t.Context(), func(ctx context.Context, c *pgxpool.Conn) error {
		return c.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&value)
	}))
	return value
}

// Statements are those whose tables grow with the number of keys, tokens,
// receipts, nonces or resident objects, as a Store sends them.
func (s *Store) Statements() map[string]string {
	receipt := &store.Receipt{}
	update, _ := s.whole(updateWithinBudgetQuery, append(keyValues(&store.Key{}), nil, nil), receipt, true)
	remove, _ := s.whole(deleteKeyQuery, []any{nil, nil}, receipt, true)
	return map[string]string{
		"Key":                  keyQuery,
		"KeyByVersion":         keyByVersionQuery,
		"UpdateKey":            updateKeyQuery,
		"UpdateKey, whole":     update,
		"UpdateKey, refused":   keyExistsQuery,
		"UpdateKey, spent":     withinBudgetQuery,
		"UpdateKey, holding":   holdQuery,
		"UpdateKey, others":    condemnOthersQuery,
		"DeleteKey":            remove,
		"DeleteKey, tokens":    `DELETE FROM import_token WHERE key_id = $1`, // of the foreign keys
		"DeleteKey, residents": condemnAllQuery,
		"DeletePair":           deletePairQuery,
		"DeletePair, tokens":   `DELETE FROM import_token WHERE pair_id = $1`,
		"DueKeys":              dueKeysQuery,
		"ListKeys":             `SELECT ` + keyColumns + ` FROM cmk ORDER BY created_at, key_id LIMIT $1 OFFSET 10`,
		"LoadImport":           loadImportQuery,
		"CountFailure":         countFailureQuery,
		"BindPair, check":      bindCheckQuery,
		"BindPair, bound":      boundPairsQuery,
		"BindPair, ready":      readyPairQuery,
		"BindPair, shared":     sharedPairQuery,
		"BindPair, write":      bindPairQuery,
		"BindPair, extend":     extendPairQuery,
		"Pairs, due":           duePairsQuery,
		"RetirePair":           retirePairQuery,
		"Usage":                usageQuery,
		"PutUsages":            putUsageQuery,
		"AddNonce":             addNoncesQuery,
		"DeleteNonces":         deleteNoncesQuery,
		"Residents, due":       dueResidentsQuery,
		"CondemnResident":      condemnResidentQuery,
		"RemoveResidents":      removeResidentsQuery,
		"PendingReceipts":      pendingReceiptsQuery,
		"LogReceipts":          logReceiptsQuery,
		"KeyReceipts":          keyReceiptsQuery,
		"ImportReceipt":        importReceiptQuery,
		"LogTiles":             tilesQuery,
		"ExtendLog, entries":   placeReceiptsQuery,
		"ExtendLog, tiles":     putTileQuery,
	}
}

// MigrateBytewise is Migrate as for CockroachDB.
func MigrateBytewise(t *testing.T, dsn string) {
	t.Helper()
	cfg := Config{DSN: dsn}
	poolConfig, err := cfg.connConfig()
	require.NoError(t, err)
	db := stdlib.OpenDB(*poolConfig.ConnConfig)
	defer func() { require.NoError(t, db.Close()) }()
	p, err := newProvider(db, &cfg, true)
	require.NoError(t, err)
	_, err = p.Up(t.Context())
	require.NoError(t, err)
}
