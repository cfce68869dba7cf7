package sqlite

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// What is bound is what SQLite gets: the bytes as they are, and NULL for what is
// missing, which a column that is NOT NULL refuses.
func TestBind(t *testing.T) {
	s := openTest(t)
	require.NoError(t, s.read(t.Context(), func(c *conn) error {
		var got []string
		q := &query{`SELECT typeof($1), typeof($2), hex($3), hex($4), typeof($5)`}
		found, err := c.one(q, func(row *cursor) {
			for range 5 {
				got = append(got, row.text())
			}
		}, []byte(nil), []byte{}, "a\x00'b", []byte{0, 0xff}, "")
		require.True(t, found)
		require.Equal(t, []string{"null", "blob", "61002762", "00FF", "text"}, got)
		return err
	}))

	key := store.Key{KeyID: "k", KeyVersionID: "v", Revision: 1, MAC: []byte{1}}
	require.NoError(t, s.CreateKey(t.Context(), key))
	key.Revision = 2
	update := store.Update{Key: key, Receipt: &store.Receipt{KeyID: "k", Revision: 2, Entry: []byte{1}, RowDigest: []byte{2}}}
	require.ErrorContains(t, s.UpdateKey(t.Context(), update), "NOT NULL constraint failed: receipt.mac")
	stored, err := s.Key(t.Context(), "k")
	require.NoError(t, err)
	require.EqualValues(t, 1, stored.Revision)
}
