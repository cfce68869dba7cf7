package main

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/enginebench"
)

// The whole of it, in a second: no number that comes out means anything, but each
// is there, and nothing else is left where it ran.
func TestBench(t *testing.T) {
	t.Parallel()
	s := newSite(t, "")
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	sealed, err := os.ReadFile(s.config)
	require.NoError(t, err)
	s.write(t, "keyferryd.yaml", "custody: resident\n"+string(sealed))
	objects := func() map[string]string {
		files := snapshot(t, filepath.Join(s.dir, "tokens"))
		maps.DeleteFunc(files, func(path, _ string) bool { return filepath.Base(path) == "generation" }) // counts changes
		return files
	}
	before := objects()
	files, err := os.ReadDir(s.dir)
	require.NoError(t, err)

	tables := 7
	measure := func() (stdout, stderr string, err error) {
		return s.keyferryd(t, "bench", "--duration", "1s", "--keys", "256", "--callers", "2", "--json")
	}
	stdout, stderr, err := measure()
	if strings.Contains(stderr, "custody: resident asks for what the token has not") { // as stock SoftHSM2
		s.write(t, "keyferryd.yaml", string(sealed))
		tables--
		stdout, stderr, err = measure()
	}
	require.NoError(t, err, stderr)
	var m measurement
	require.NoError(t, json.Unmarshal([]byte(stdout), &m), stdout)
	titles := map[string]*enginebench.Table{}
	for _, table := range m.Tables {
		require.NotEmpty(t, table.Rows, table.Title)
		for _, row := range table.Rows {
			for _, metric := range row.Metrics {
				if !strings.Contains(metric.Name, "extra") {
					require.Positive(t, metric.Value, "%s, %s: %s", table.Title, row.Name, metric.Name)
				}
			}
		}
		title, _, _ := strings.Cut(table.Title, " ")
		titles[title] = table
	}
	require.Len(t, titles, tables) // by the first word of the title
	require.Equal(t, "RSAES_OAEP_SHA_1 with RSA_2048", titles["Import"].Rows[0].Name)

	require.Equal(t, before, objects(), "nothing is left on the token")
	left, err := os.ReadDir(s.dir)
	require.NoError(t, err)
	require.Len(t, left, len(files), "nor beside the database")
	var text strings.Builder
	require.NoError(t, m.write(&text))
	require.Contains(t, text.String(), "extra-cpu-µs")
}
