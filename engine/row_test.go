package engine_test

import (
	"database/sql"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite"

	"github.com/keyferry/keyferry/engine"
)

// burgle opens the database as somebody does who can write to its file.
func (h *house) burgle(tb testing.TB) *sql.DB {
	tb.Helper()
	db, err := sql.Open("sqlite", "file:"+h.database.Path+"?_pragma=busy_timeout(10000)")
	require.NoError(tb, err)
	return db
}

func (h *house) exec(tb testing.TB, query string, args ...any) {
	tb.Helper()
	db := h.burgle(tb)
	defer func() { require.NoError(tb, db.Close()) }()
	_, err := db.ExecContext(tb.Context(), query, args...)
	require.NoError(tb, err)
}

// columns of table cmk and what they hold in one row.
func (h *house) columns(tb testing.TB, keyID string) (names []string, values []any) {
	tb.Helper()
	db := h.burgle(tb)
	defer func() { require.NoError(tb, db.Close()) }()
	rows, err := db.QueryContext(tb.Context(), "SELECT * FROM cmk WHERE key_id = ?", keyID)
	require.NoError(tb, err)
	defer func() { require.NoError(tb, rows.Close()) }()
	names, err = rows.Columns()
	require.NoError(tb, err)
	require.True(tb, rows.Next())
	values = make([]any, len(names))
	pointers := make([]any, len(names))
	for i := range values {
		pointers[i] = &values[i]
	}
	require.NoError(tb, rows.Scan(pointers...))
	require.NoError(tb, rows.Err())
	return names, values
}

// requireRefused fails unless every use of a CMK is refused as an internal
// failure.
func (h *house) requireRefused(tb testing.TB, keyID string) {
	tb.Helper()
	_, err := h.DescribeKey(tb.Context(), keyID)
	requireKind(tb, engine.Internal, err)
	_, err = h.Encrypt(tb.Context(), keyID, []byte("x"), nil)
	requireKind(tb, engine.Internal, err)
	requireKind(tb, engine.Internal, h.EnableKey(tb.Context(), keyID))
	requireKind(tb, engine.Internal, h.DeleteKeyMaterial(tb.Context(), keyID))
	requireKind(tb, engine.Internal, h.ScheduleKeyDeletion(tb.Context(), keyID, 7))
}

// A row of which one column was edited is refused, whichever column it is.
func TestEditedRowIsRefused(t *testing.T) {
	h := newHouse(t, withPairs(2))
	keyID, material := h.enabledKey(t)
	other, _ := h.enabledKey(t)
	params := h.parameters(t, keyID)
	names, values := h.columns(t, keyID)
	_, others := h.columns(t, other)

	for i, column := range names {
		// due_at only tells the sweeper where to look; what it does is decided
		// by the other columns.
		if column == "due_at" || column == "key_id" {
			continue
		}
		t.Run(column, func(t *testing.T) {
			for _, edited := range edits(values[i], others[i]) {
				if column == "key_version_id" && edited == others[i] {
					continue // it is unique
				}
				if s, ok := edited.(string); ok && s == values[i] {
					continue // the other row has the same
				}
				h.exec(t, fmt.Sprintf("UPDATE cmk SET %s = ? WHERE key_id = ?", column), edited, keyID)
				h.requireRefused(t, keyID)
				_, err := h.ImportKeyMaterial(t.Context(), input(t, params, material))
				requireKind(t, engine.Internal, err)
				_, total, err := h.ListKeys(t.Context(), engine.ListKeysInput{KeyIDs: []string{keyID}})
				require.NoError(t, err)
				require.Equal(t, 1, total)
			}
			h.exec(t, fmt.Sprintf("UPDATE cmk SET %s = ? WHERE key_id = ?", column), values[i], keyID)
			h.describe(t, keyID)
		})
	}
	h.encrypt(t, keyID, "nothing was changed for good")
}

// edits are other values of a column, of its type.
func edits(value, of any) []any {
	switch value := value.(type) {
	case nil:
		return []any{int64(1)}
	case int64:
		return []any{value + 1, value - 1}
	case string:
		return []any{value + "x", "", of}
	case []byte:
		flipped := append([]byte(nil), value...)
		flipped[len(flipped)-1] ^= 1
		return []any{flipped, nil, value[:len(value)-1], of}
	}
	panic(fmt.Sprintf("a column of type %T", value))
}

// A database writer who owns a CMK makes its row, or parts of it, another's.
func TestRowsAreNotExchanged(t *testing.T) { onEveryRoute(t, testRowsAreNotExchanged) }

func testRowsAreNotExchanged(t *testing.T, h *house) {
	mine, _ := h.enabledKey(t)
	victims, _ := h.enabledKey(t)
	names, values := h.columns(t, victims)
	restore := func() {
		for i, column := range names {
			h.exec(t, fmt.Sprintf("UPDATE cmk SET %s = ? WHERE rowid = (SELECT max(rowid) FROM cmk)", column), values[i])
		}
		h.describe(t, victims)
	}
	copied := func(columns ...string) {
		t.Helper()
		for _, column := range columns {
			h.exec(t, fmt.Sprintf("UPDATE cmk SET %s = (SELECT %s FROM cmk WHERE key_id = ?) WHERE key_id = ?", column, column), mine, victims)
		}
		h.requireRefused(t, victims)
		restore()
	}
	copied("material")
	copied("material", "mac")
	copied("material", "material_id", "kcv", "check_value", "pair_id", "pair_fingerprint")
	copied("material", "material_id", "kcv", "check_value", "pair_id", "pair_fingerprint", "revision", "mac")

	// The whole row under the victim's name, and under its version.
	h.exec(t, "DELETE FROM cmk WHERE key_id = ?", victims)
	h.exec(t, "UPDATE cmk SET key_id = ? WHERE key_id = ?", victims, mine)
	h.requireRefused(t, victims)
	_, err := h.DescribeKey(t.Context(), mine)
	requireKind(t, engine.KeyNotFound, err)
}

// Deleted material does not come back by way of another CMK's row, and a key
// that is open is not re-read: what is in the cache was verified.
func TestOpenKeyOutlivesTampering(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	blob := h.encrypt(t, keyID, "secret")
	h.exec(t, "UPDATE cmk SET material = x'00' WHERE key_id = ?", keyID)
	h.requireDecrypts(t, blob, "secret")
	h.reopen(t)
	_, err := h.Decrypt(t.Context(), blob, nil)
	requireKind(t, engine.Internal, err)
}

// That a row was tampered with is logged with its key.
func TestTamperingIsLogged(t *testing.T) {
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }))
	keyID, _ := h.enabledKey(t)
	h.exec(t, "UPDATE cmk SET state = 'Disabled' WHERE key_id = ?", keyID)
	_, err := h.DescribeKey(t.Context(), keyID)
	requireKind(t, engine.Internal, err)
	require.Contains(t, log.String(), `"level":"ERROR"`)
	require.Contains(t, log.String(), keyID)
}
