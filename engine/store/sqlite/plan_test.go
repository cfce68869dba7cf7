package sqlite

import (
	"context"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
)

// plan is how SQLite means to run a statement, a line for each step.
func plan(t *testing.T, s *Store, text string) (steps []string) {
	t.Helper()
	require.NoError(t, s.read(t.Context(), func(c *conn) error {
		st, err := c.statement(`EXPLAIN QUERY PLAN ` + text)
		require.NoError(t, err)
		defer st.close()
		args := make([]any, 21) // as many as any statement has
		n := 0
		for _, m := range regexp.MustCompile(`\$(\d+)`).FindAllStringSubmatch(text, -1) {
			var i int
			for _, digit := range m[1] {
				i = 10*i + int(digit-'0')
			}
			n = max(n, i)
		}
		_, err = c.run(st, -1, func(row *cursor) { row.i = 3; steps = append(steps, row.text()) }, args[:n])
		return err
	}))
	return steps
}

// TestPlans holds every statement to its index: none may read a table that
// grows with the number of keys, nonces or tokens from end to end, nor sort
// what it reads. There are no statistics in these databases, so a plan is the
// same for a thousand rows and for a million.
func TestPlans(t *testing.T) {
	s, err := Open(context.Background(), Config{Path: filepath.Join(t.TempDir(), "keyferry.db")})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()

	key := `SEARCH cmk USING INDEX cmk_key_id (key_id=?)`
	for name, tt := range map[string]struct {
		text string
		want []string
	}{
		"Key":            {keyQuery.text, []string{key}},
		"KeyByVersion":   {keyByVersionQuery.text, []string{`SEARCH cmk USING INDEX cmk_key_version_id (key_version_id=?)`}},
		"UpdateKey, row": {updateQueries[0].text, []string{key}},
		"UpdateKey":      {updateQueries[1].text, []string{key}},
		"UpdateKey, all": {updateQueries[2].text, []string{key}},
		"DeleteKey":      {deleteKeyQuery.text, []string{key}},
		"unchanged":      {keyExistsQuery.text, []string{`SEARCH cmk USING COVERING INDEX cmk_key_id (key_id=?)`}},
		"DueKeys":        {dueKeysQuery.text, []string{`SEARCH cmk USING INDEX cmk_due (due_at<?)`}},
		"LoadImport": {loadImportQuery.text, []string{
			key, `SEARCH import_token USING PRIMARY KEY (id=?) LEFT-JOIN`, `SEARCH pair USING PRIMARY KEY (id=?) LEFT-JOIN`,
		}},
		"UpdateKey, budget": {failuresQuery.text, []string{`SEARCH import_token USING PRIMARY KEY (id=?)`}},
		"CountFailure":      {countFailureQuery.text, []string{`SEARCH import_token USING PRIMARY KEY (id=?)`}},
		"BindPair, bound":   {boundPairsQuery.text, []string{`CO-ROUTINE bound`, `SEARCH pair USING COVERING INDEX pair_bound`, `SCAN bound`}},
		"BindPair, ready":   {readyPairQuery.text, []string{`SEARCH pair USING INDEX pair_ready (spec=? AND algorithm=?)`}},
		"BindPair, shared":  {sharedPairQuery.text, []string{`SEARCH pair USING INDEX pair_bound`}},
		"BindPair, write":   {bindPairQuery.text, []string{`SEARCH pair USING PRIMARY KEY (id=?)`}},
		"Pairs, due":        {duePairsQuery.text, []string{`SEARCH pair USING INDEX pair_expires (expires_at<?)`}},
		"RetirePair":        {retirePairQuery.text, []string{`SEARCH pair USING PRIMARY KEY (id=?)`}},
		"DeletePair":        {deletePairQuery.text, []string{`SEARCH pair USING PRIMARY KEY (id=?)`}},
		"DeletePair, token": {`DELETE FROM import_token WHERE pair_id = $1`, []string{`SEARCH import_token USING INDEX import_token_pair_id (pair_id=?)`}},
		"DeleteKey, token":  {`DELETE FROM import_token WHERE key_id = $1`, []string{`SEARCH import_token USING INDEX import_token_key_id (key_id=?)`}},
		"Usage":             {usageQuery.text, []string{`SEARCH key_usage USING PRIMARY KEY (key_id=?)`}},
		"DeleteNonces": {deleteNoncesQuery.text, []string{
			`SEARCH nonce_batch USING INTEGER PRIMARY KEY (rowid=?)`, `LIST SUBQUERY`,
			`SEARCH nonce_batch USING COVERING INDEX nonce_batch_expires (expires_at<?)`,
		}},
		"Residents":          {dueResidentsQuery.text, []string{`SCAN resident USING INDEX resident_due`}},
		"UpdateKey, holding": {holdQuery.text, []string{`SEARCH resident USING INDEX resident_key (key_id=?)`}},
		"PendingReceipts":    {pendingReceiptsQuery.text, []string{`SCAN receipt USING INDEX receipt_pending`}},
		"LogReceipts":        {logReceiptsQuery.text, []string{`SEARCH receipt USING INDEX receipt_place (place>?)`}},
		"KeyReceipts":        {keyReceiptsQuery.text, []string{`SEARCH receipt USING INDEX receipt_key (key_id=?)`}},
		"ImportReceipt":      {importReceiptQuery.text, []string{`SEARCH receipt USING INDEX receipt_key (key_id=?)`}},
		"ExtendLog":          {placeReceiptQuery.text, []string{`SEARCH receipt USING INTEGER PRIMARY KEY (rowid=?)`}},
		"LogTiles":           {tileQuery.text, []string{`SEARCH receipt_tile USING INDEX`}},
		// In order, and only as far as the page reaches.
		"ListKeys": {listQuery.text, []string{`SCAN cmk USING INDEX cmk_created`}},
		"ListKeys, groups": {mergeText(2), []string{
			`CO-ROUTINE page`, `MERGE (UNION ALL)`,
			`LEFT`, `SEARCH cmk USING COVERING INDEX cmk_group (state=? AND spec=?)`,
			`RIGHT`, `SEARCH cmk USING COVERING INDEX cmk_group (state=? AND spec=?)`,
			`SCAN page`, key,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			steps := plan(t, s, tt.text)
			require.Len(t, steps, len(tt.want), "%q", steps)
			for i, step := range steps {
				require.Contains(t, step, tt.want[i])
			}
		})
	}
}
