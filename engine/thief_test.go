package engine_test

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// A thief who writes to the database and has no PIN: what row_test.go and
// usage_test.go do not try. Each attempt answers nil if it went through.
func TestDatabaseWriter(t *testing.T) {
	h := newHouse(t, withPairs(4), with(func(c *engine.Config) { c.FailureBudget = 1000 }))
	victims, victimsMaterial := h.enabledKey(t)
	thiefs, thiefsMaterial := h.enabledKey(t)
	secret := h.encrypt(t, victims, "secret")
	forVictim, forThief := h.parameters(t, victims), h.parameters(t, thiefs)
	require.NotEqual(t, forVictim.PublicKey, forThief.PublicKey)
	captured := input(t, forVictim, victimsMaterial)

	imports := func(in engine.ImportInput) error {
		_, err := h.ImportKeyMaterial(t.Context(), in)
		return err
	}
	attempts, through := 0, 0
	try := func(name string, do func() error, want engine.Kind) {
		t.Helper()
		attempts++
		err := do()
		if want == "" { // softhsm.KnownHoles S3
			require.NoError(t, err, name)
			through++
			return
		}
		require.ErrorIs(t, err, want, name)
	}

	// Import tokens: what was captured is to be imported into the thief's CMK.
	tokens := h.rows(t, "import_token")
	for name, edit := range map[string]string{
		"token given to the thief's CMK":   "UPDATE import_token SET key_id = '" + thiefs + "'",
		"token bound to the thief's pair":  "UPDATE import_token SET pair_id = (SELECT pair_id FROM import_token WHERE key_id = '" + thiefs + "' LIMIT 1)",
		"token bound to the victim's pair": "UPDATE import_token SET pair_id = (SELECT pair_id FROM import_token WHERE key_id = '" + victims + "' ORDER BY issued_at DESC LIMIT 1)",
		"token of a longer life":           "UPDATE import_token SET expires_at = expires_at + 1000000",
		"token issued later":               "UPDATE import_token SET issued_at = issued_at + 1",
		"tokens that exchange their CMKs":  "UPDATE import_token SET key_id = CASE key_id WHEN '" + thiefs + "' THEN '" + victims + "' ELSE '" + thiefs + "' END",
		"tokens that are gone":             "DELETE FROM import_token",
	} {
		h.exec(t, edit)
		in := captured
		in.KeyID = thiefs
		try(name+", imported as the thief", func() error { return imports(in) }, engine.InvalidImportToken)
		if name != "token bound to the victim's pair" {
			try(name+", imported as the victim", func() error { return imports(captured) }, engine.InvalidImportToken)
		}
		tokens.restore(t)
	}

	// Pairs: a customer is to wrap under the thief's key, or by an algorithm
	// that can be broken.
	pairs := h.rows(t, "pair")
	for name, edit := range map[string]string{
		"pair with another fingerprint":     "UPDATE pair SET fingerprint = zeroblob(32)",
		"pair for PKCS#1 v1.5":              "UPDATE pair SET algorithm = 'RSAES_PKCS1_V1_5'",
		"pair of another size":              "UPDATE pair SET spec = 'RSA_4096'",
		"pair with the thief's fingerprint": fmt.Sprintf("UPDATE pair SET fingerprint = x'%x'", sha256.Sum256(forThief.PublicKey)),
	} {
		h.exec(t, edit)
		try(name+", imported", func() error { return imports(captured) }, engine.InvalidImportToken)
		try(name+", given to a customer", func() error {
			params, err := h.GetParametersForImport(t.Context(), victims, hsm.RSA2048, hsm.OAEPSHA1)
			if err != nil {
				return err // too many pairs are not what their rows say
			}
			// The edited ones are put aside; the private half of this is in the token.
			require.NoError(t, imports(input(t, params, victimsMaterial)), name)
			return &engine.Error{Kind: engine.Unavailable}
		}, engine.Unavailable)
		pairs.restore(t)
		tokens.restore(t)
	}
	require.NoError(t, imports(captured), "everything is as it was")

	// The thief's own key in the place of the victim's, with everything that he
	// can compute for it.
	before := h.rows(t, "cmk")
	for _, columns := range []string{
		"material", "material, mac", "kcv, material_id, check_value", "material, kcv, material_id, check_value, mac",
		"material, kcv, material_id, check_value, pair_id, pair_fingerprint, revision, mac", "state, mac", "expire_at, due_at, mac",
	} {
		var set []string
		for column := range strings.SplitSeq(columns, ", ") {
			set = append(set, fmt.Sprintf("%s = (SELECT %s FROM cmk WHERE key_id = '%s')", column, column, thiefs))
		}
		h.exec(t, "UPDATE cmk SET "+strings.Join(set, ", ")+" WHERE key_id = ?", victims)
		h.reopen(t)
		try(columns+" of the thief's CMK", func() error {
			_, err := h.Encrypt(t.Context(), victims, []byte("for the thief"), nil)
			return err
		}, engine.Internal)
		before.restore(t)
	}

	// Rows that were once right are right for ever (S3). The server cannot know;
	// the log of imports does.
	used := h.rows(t, "key_usage")
	disabled := h.rows(t, "cmk")
	require.NoError(t, h.DisableKey(t.Context(), victims))
	disabled.restore(t)
	h.reopen(t)
	try("enabled by the row of before", func() error {
		_, err := h.Decrypt(t.Context(), secret, nil)
		return err
	}, "")
	deleted := h.rows(t, "cmk")
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), victims))
	deleted.restore(t)
	h.reopen(t)
	brought := engine.Kind("")
	if h.cfg.Custody == hsm.Resident { // what is destroyed in the token no row brings back
		brought = engine.MaterialLost
	}
	try("deleted material by the row of before", func() error {
		_, err := h.Decrypt(t.Context(), secret, nil)
		return err
	}, brought)
	h.importInto(t, victims, victimsMaterial)
	h.encrypt(t, victims, "counted")
	h.shut(t)
	used.restore(t)
	h.open(t)
	try("uses forgotten by the count of before", func() error {
		_, err := h.Encrypt(t.Context(), victims, []byte("x"), nil)
		return err
	}, "")
	nonce := store.Nonce{AccessKeyID: "someone", Value: "once", ExpiresAt: h.clock.in(time.Hour)}
	fresh, err := h.store.AddNonce(t.Context(), nonce, h.clock.Now())
	require.NoError(t, err)
	require.True(t, fresh)
	h.exec(t, "DELETE FROM nonce_batch")
	replay := func() error {
		fresh, err := h.store.AddNonce(t.Context(), nonce, h.clock.Now())
		if err == nil && !fresh {
			return &engine.Error{Kind: engine.InvalidParameter}
		}
		return err
	}
	try("nonces deleted while the server runs", replay, engine.InvalidParameter)
	h.exec(t, "DELETE FROM nonce_batch")
	h.reopen(t)
	try("nonces deleted before the server starts", replay, "")

	// The thief's own CMK was good for nothing else.
	_, err = h.Decrypt(t.Context(), secret, nil)
	require.NoError(t, err)
	require.NoError(t, imports(input(t, h.parameters(t, thiefs), thiefsMaterial)))
	t.Logf("database writer: %d attempts, %d refused, %d through S3", attempts, attempts-through, through)
	for _, id := range []string{"S3", "T18"} { // a row of before is what a backup has
		require.True(t, slices.ContainsFunc(softhsm.KnownHoles, func(hole softhsm.Hole) bool { return hole.ID == id && hole.Shown == "engine" }))
	}
}

// rows are those of one table at one time.
type rows struct {
	h     *house
	table string
	names []string
	all   [][]any
}

func (h *house) rows(tb testing.TB, table string) *rows {
	tb.Helper()
	db := h.burgle(tb)
	defer func() { require.NoError(tb, db.Close()) }()
	found, err := db.QueryContext(tb.Context(), "SELECT * FROM "+table)
	require.NoError(tb, err)
	defer func() { require.NoError(tb, found.Close()) }()
	r := &rows{h: h, table: table}
	r.names, err = found.Columns()
	require.NoError(tb, err)
	for found.Next() {
		values, pointers := make([]any, len(r.names)), make([]any, len(r.names))
		for i := range values {
			pointers[i] = &values[i]
		}
		require.NoError(tb, found.Scan(pointers...))
		r.all = append(r.all, values)
	}
	require.NoError(tb, found.Err())
	return r
}

// restore puts the rows back that the table had. Others stay.
func (r *rows) restore(tb testing.TB) {
	tb.Helper()
	for _, values := range r.all {
		places := strings.TrimSuffix(strings.Repeat("?, ", len(values)), ", ")
		r.h.exec(tb, "INSERT OR REPLACE INTO "+r.table+" ("+strings.Join(r.names, ", ")+") VALUES ("+places+")", values...)
	}
}
