package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/softhsm"
)

// slow reports whether tests may take long.
func slow() bool { return os.Getenv("KEYFERRY_SLOW") != "" }

// fleet is a keyferryd on a token, and a manifest of materials for it.
type fleet struct {
	dir, listen string
	daemon      *daemon
	client      *client
	manifest    string
	results     string
	materials   map[string][]byte // by the item's name
	lines       int
}

// newFleet starts a server that has one wrapping pair outstanding and shares it:
// thousands of materials need no thousands of pairs.
func newFleet(t *testing.T) *fleet {
	t.Helper()
	dir := t.TempDir()
	f := &fleet{dir: dir, listen: freePort(t), materials: map[string][]byte{}}
	f.manifest, f.results = filepath.Join(dir, "keys.jsonl"), filepath.Join(dir, "keys.jsonl.results")
	data := filepath.Join(dir, "data")
	f.start(t)
	require.NoError(t, f.daemon.stop())
	config := filepath.Join(data, "keyferryd.yaml")
	text, err := os.ReadFile(config)
	require.NoError(t, err)
	few := regexp.MustCompile(`(?m)^(\s+)ready: 2$`).ReplaceAll(text, []byte("${1}ready: 1\n${1}outstanding: 1\n${1}specs: [RSA_2048]"))
	require.NotEqual(t, text, few)
	few = bytes.ReplaceAll(few, []byte("allow_pkcs1_v15: true"), []byte("allow_pkcs1_v15: false"))
	require.NoError(t, os.WriteFile(config, few, 0o600))
	f.start(t)
	conn := connection{credentials: filepath.Join(data, "credentials.json")}
	f.client, err = conn.client(&streams{err: io.Discard})
	require.NoError(t, err)
	return f
}

func (f *fleet) start(t *testing.T) {
	t.Helper()
	data := filepath.Join(f.dir, "data")
	var err error
	f.daemon, err = startDaemon(data, f.listen)
	require.NoError(t, err)
	d := f.daemon
	t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			_ = d.cmd.Process.Kill()
			_ = d.cmd.Wait()
		}
		if t.Failed() {
			log, _ := os.ReadFile(data + ".log")
			t.Logf("the end of the server's log:\n%s", log[max(0, len(log)-2000):])
		}
	})
}

// freePort is an address that the server can have again after a restart.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return l.Addr().String()
}

// write makes a manifest of n lines: of ten, seven make a key, two are for a
// key that is there, and one is of wrapped material.
func (f *fleet) write(t *testing.T, n int) {
	t.Helper()
	var manifest bytes.Buffer
	for i := range n {
		material := make([]byte, 32)
		_, err := rand.Read(material)
		require.NoError(t, err)
		line := map[string]string{"name": fmt.Sprintf("key %d", i)}
		f.materials[line["name"]] = material
		if i%10 != 9 {
			line["material_file"] = fmt.Sprintf("material-%d", i)
			require.NoError(t, os.WriteFile(filepath.Join(f.dir, line["material_file"]), material, 0o600))
		}
		if i%10 >= 7 {
			line["key_id"] = f.createKey(t)
		} else {
			line["description"] = "one of many"
		}
		if i%10 == 9 {
			line["encrypted_key_material"], line["import_token"] = f.wrap(t, line["key_id"], material)
		}
		if i%3 == 0 {
			line["expire"] = "2099-01-31T00:00:00Z"
		}
		text, err := json.Marshal(line)
		require.NoError(t, err)
		manifest.Write(append(text, '\n'))
	}
	f.lines = n
	require.NoError(t, os.WriteFile(f.manifest, manifest.Bytes(), 0o600))
}

func (f *fleet) createKey(t *testing.T) string {
	t.Helper()
	var answer struct{ KeyMetadata keyMetadata }
	require.NoError(t, f.client.call(t.Context(), "CreateKey", url.Values{"Origin": {origin}, "KeySpec": {byok.AES256}}, &answer))
	return answer.KeyMetadata.KeyID
}

func (f *fleet) wrap(t *testing.T, keyID string, material []byte) (wrapped, token string) {
	t.Helper()
	var answer struct{ PublicKey, ImportToken string }
	require.NoError(t, f.client.call(t.Context(), "GetParametersForImport", url.Values{
		"KeyId": {keyID}, "WrappingAlgorithm": {byok.OAEPSHA1}, "WrappingKeySpec": {"RSA_2048"},
	}, &answer))
	spki, err := base64.StdEncoding.DecodeString(answer.PublicKey)
	require.NoError(t, err)
	b, err := byok.Wrap(byok.OAEPSHA1, spki, material)
	require.NoError(t, err)
	return base64.StdEncoding.EncodeToString(b), answer.ImportToken
}

// keyferry is the command that imports the manifest, not yet started.
func (f *fleet) keyferry(t *testing.T) (cmd *exec.Cmd, stderr *bytes.Buffer) {
	t.Helper()
	exe, err := exec.LookPath("keyferry")
	require.NoError(t, err)
	cmd = exec.Command(exe, "import", "--manifest", f.manifest, "--algorithm", byok.OAEPSHA1, "--json",
		"--credentials", filepath.Join(f.dir, "data", "credentials.json"))
	stderr = &bytes.Buffer{}
	cmd.Stderr = stderr
	return cmd, stderr
}

// await waits until the results have that many lines about items.
func (f *fleet) await(t *testing.T, lines int) {
	t.Helper()
	require.Eventually(t, func() bool {
		data, err := os.ReadFile(f.results)
		return err == nil && bytes.Count(data, []byte("\n")) > lines
	}, time.Minute, time.Millisecond)
}

// read returns the last line about each item, and how many of them say that it
// was imported.
func (f *fleet) read(t *testing.T) (last map[string]result, imported map[string]int) {
	t.Helper()
	file, err := os.Open(f.results)
	require.NoError(t, err)
	defer file.Close() //nolint:errcheck // nothing was written
	last, imported = map[string]result{}, map[string]int{}
	lines := bufio.NewScanner(file)
	require.True(t, lines.Scan())
	for lines.Scan() {
		var r result
		require.NoError(t, json.Unmarshal(lines.Bytes(), &r))
		last[r.Name] = r
		if r.done() {
			imported[r.Name]++
		}
	}
	require.NoError(t, lines.Err())
	return last, imported
}

// check compares keys, materials and receipts with the manifest: every item was
// imported, into a key of its own, once.
func (f *fleet) check(t *testing.T) {
	t.Helper()
	var list struct{ TotalCount int }
	require.NoError(t, f.client.call(t.Context(), "ListKeys", nil, &list))
	require.Equal(t, f.lines, list.TotalCount, "keys")
	last, imported := f.read(t)
	require.Len(t, last, f.lines)
	keys := map[string]bool{}
	for name, material := range f.materials {
		r := last[name]
		require.True(t, r.done(), "%s: %s", name, r.Error)
		require.Equal(t, 1, imported[name])
		require.True(t, r.MeasuredByKMS)
		kcv, err := byok.KCV(byok.AES256, material)
		require.NoError(t, err)
		id, err := byok.MaterialID(r.KeyID, material)
		require.NoError(t, err)
		require.Equal(t, hex.EncodeToString(kcv[:]), r.KCV)
		require.Equal(t, hex.EncodeToString(id[:]), r.MaterialID)
		keys[r.KeyID] = true
		var receipts struct{ TotalCount int }
		require.NoError(t, f.client.call(t.Context(), "ListImportReceipts", url.Values{"KeyId": {r.KeyID}}, &receipts))
		require.Equal(t, 1, receipts.TotalCount, "imports of %s", name)
	}
	require.Len(t, keys, f.lines)
}

// The client is killed twice and the server restarted once while hundreds of
// materials (thousands where time allows) are imported. In the end each is in a
// key, and none was imported and no key made twice.
func TestManifestSurvivesKills(t *testing.T) {
	softhsm.Once(t)
	n := 300
	if slow() {
		n = 5000
	}
	f := newFleet(t)
	f.write(t, n)

	for _, lines := range []int{n / 5, n / 2} {
		cmd, stderr := f.keyferry(t)
		require.NoError(t, cmd.Start())
		f.await(t, lines)
		require.NoError(t, cmd.Process.Kill())
		require.Error(t, cmd.Wait(), stderr)
	}

	cmd, stderr := f.keyferry(t)
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	require.NoError(t, cmd.Start())
	f.await(t, n)
	if slow() { // what was under way must be known to have come to nothing, which takes a while
		require.NoError(t, f.daemon.cmd.Process.Kill())
		require.Error(t, f.daemon.cmd.Wait())
	} else {
		require.NoError(t, f.daemon.stop())
	}
	f.start(t)
	require.NoError(t, cmd.Wait(), stderr)
	var report bulkReport
	require.NoError(t, json.Unmarshal(stdout.Bytes(), &report))
	require.Equal(t, n, report.Items)
	require.Equal(t, n, report.Imported+report.Present+report.Earlier)
	require.NotZero(t, report.Imported)
	f.check(t)

	// What is done is not looked at again: the materials may be gone by then.
	files, err := filepath.Glob(filepath.Join(f.dir, "material-*"))
	require.NoError(t, err)
	for _, file := range files {
		require.NoError(t, os.Remove(file))
	}
	cmd, stderr = f.keyferry(t)
	out, err := cmd.Output()
	require.NoError(t, err, stderr)
	require.JSONEq(t, `{"items":`+strconv.Itoa(n)+`,"imported":0,"present":0,"earlier":`+strconv.Itoa(n)+`,"failed":0,"left":0}`, string(out))

	// Without the results of an earlier run the KMS says what it has.
	require.NoError(t, os.Remove(f.results))
	name := "key 7"
	line, err := json.Marshal(map[string]string{"name": name, "key_id": f.keyOf(t, 7), "material_file": "material-7"})
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(f.dir, "material-7"), f.materials[name], 0o600))
	require.NoError(t, os.WriteFile(f.manifest, line, 0o600))
	cmd, stderr = f.keyferry(t)
	out, err = cmd.Output()
	require.NoError(t, err, stderr)
	require.JSONEq(t, `{"items":1,"imported":0,"present":1,"earlier":0,"failed":0,"left":0}`, string(out))
	require.NoError(t, f.daemon.stop())
}

// keyOf is the key that line i of the manifest names.
func (f *fleet) keyOf(t *testing.T, i int) string {
	t.Helper()
	text, err := os.ReadFile(f.manifest)
	require.NoError(t, err)
	var line struct {
		KeyID string `json:"key_id"`
	}
	require.NoError(t, json.Unmarshal(bytes.Split(text, []byte("\n"))[i], &line))
	require.NotEmpty(t, line.KeyID)
	return line.KeyID
}
