package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/receipt"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// ledger is what one customer was told: every entry of it must hold after the
// server was killed, however often.
type ledger struct {
	*customer
	acknowledged int64             // the expiry of the last import that was answered, 0 before the first
	attempted    int64             // of the last one that was sent
	made         []int64           // the expiries of all imports that took effect
	ciphertexts  map[string]string // of plaintexts, in Base64
	unchecked    map[string]string // those since the last start
}

// work imports and encrypts until the server is gone. It only fails the test
// for answers that no crash explains.
func (l *ledger) work(ctx context.Context, wrapped string, answered func()) error {
	for expire := l.attempted + 1; ; expire++ {
		params := l.params(wrapped)
		params["KeyMaterialExpireUnix"] = strconv.FormatInt(expire, 10)
		l.attempted = expire
		if err := l.call(ctx, "ImportKeyMaterial", params, nil); err != nil {
			return explained(err)
		}
		l.acknowledged, l.made = expire, append(l.made, expire)
		answered()
		plaintext := base64.StdEncoding.EncodeToString([]byte(l.keyID + strconv.FormatInt(expire, 10)))
		var answer struct{ CiphertextBlob string }
		if err := l.call(ctx, "Encrypt", map[string]string{"KeyId": l.keyID, "Plaintext": plaintext}, &answer); err != nil {
			return explained(err)
		}
		l.ciphertexts[plaintext], l.unchecked[plaintext] = answer.CiphertextBlob, answer.CiphertextBlob
		answered()
	}
}

// explained is nil for an error of the connection, which the kill explains.
func explained(err error) error {
	var refused *apiError
	if errors.As(err, &refused) {
		return err
	}
	return nil
}

// check compares the server with the ledger, and has it open ciphertexts.
func (l *ledger) check(t *testing.T, ciphertexts map[string]string) {
	t.Helper()
	var answer struct {
		KeyMetadata struct {
			keyState
			MaterialExpireTime string
		}
	}
	require.NoError(t, l.call(t.Context(), "DescribeKey", map[string]string{"KeyId": l.keyID}, &answer))
	if l.acknowledged == 0 && answer.KeyMetadata.KeyState == "PendingImport" {
		return // the first import was never answered, and was not made
	}
	require.Equal(t, "Enabled", answer.KeyMetadata.KeyState)
	id, err := byok.MaterialID(l.keyID, l.material)
	require.NoError(t, err)
	require.Equal(t, hex.EncodeToString(id[:]), answer.KeyMetadata.KeyMaterialID)
	expires, err := time.Parse(time.RFC3339, answer.KeyMetadata.MaterialExpireTime)
	require.NoError(t, err)
	require.Contains(t, []int64{l.acknowledged, l.attempted}, expires.Unix())
	if len(l.made) == 0 || expires.Unix() != l.made[len(l.made)-1] { // the last one took effect, unanswered
		l.made = append(l.made, expires.Unix())
	}
	l.acknowledged = expires.Unix()
	l.checkReceipts(t)
	for plaintext, blob := range ciphertexts {
		var opened struct{ Plaintext string }
		require.NoError(t, l.call(t.Context(), "Decrypt", map[string]string{"CiphertextBlob": blob}, &opened))
		require.Equal(t, plaintext, opened.Plaintext)
	}
}

// checkReceipts requires that there is an entry for each import that took
// effect, in order, and none for any other.
func (l *ledger) checkReceipts(t *testing.T) {
	t.Helper()
	require.Equal(t, l.made, l.receiptExpiries(t))
}

// receiptExpiries are the expiries of a key's imports by the log of receipts,
// the first one first.
func (c *customer) receiptExpiries(t *testing.T) (expiries []int64) {
	t.Helper()
	for page := 1; ; page++ {
		var answer struct {
			Receipts   struct{ Receipt []struct{ Entry string } }
			TotalCount int
		}
		params := map[string]string{"KeyId": c.keyID, "PageNumber": strconv.Itoa(page), "PageSize": "100"}
		require.NoError(t, c.call(t.Context(), "ListImportReceipts", params, &answer))
		for _, r := range answer.Receipts.Receipt {
			e, err := receipt.ParseEntry([]byte(r.Entry))
			require.NoError(t, err)
			expiries = append(expiries, e.ExpireAt.Unix())
		}
		if len(expiries) == answer.TotalCount {
			break
		}
	}
	slices.Reverse(expiries)
	return expiries
}

// Twenty times the server is killed while customers import and encrypt, each
// time after another number of answers. What was answered is there afterwards.
func TestKillsDuringImports(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, startDevServer(t, dir).stop())
	shareOnePair(t, dir)
	killWhileImporting(t, dir, 20)
}

// The same of material that is resident, a few times: what is on the token then
// is the material of every key that has any, and nothing else once the sweep has
// been there.
func TestKillsDuringResidentImports(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, startDevServer(t, dir).stop())
	shareOnePair(t, dir)
	path := filepath.Join(dir, devConfigFile)
	diagnosed, err := keyferryd(t, "doctor", "--quick", "--json", "--config", path).Output()
	require.NoError(t, err)
	var d diagnosis
	require.NoError(t, json.Unmarshal(diagnosed, &d))
	for _, f := range d.Capabilities {
		if f.ID == hsm.FindResident && f.Verdict != hsm.Proven {
			t.Skipf("no resident key material on this token, but on that of \"make softhsm\": %s", f.Evidence)
		}
	}
	configure(t, dir, func(cfg *config) { cfg.Custody = hsm.Resident.String() })
	all := killWhileImporting(t, dir, 4)

	exe, err := exec.LookPath(aftermathCommand)
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, path)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	require.NoError(t, err)
	var left aftermathOf
	require.NoError(t, json.Unmarshal(text, &left))
	enabled := 0
	for _, l := range all {
		if l.acknowledged != 0 {
			enabled++
		}
	}
	require.Equal(t, aftermathOf{Entries: enabled, Objects: enabled}, left)
}

// aftermathCommand is this binary as a server that starts when all that a crash
// has left is old, sweeps, and says what there is.
const aftermathCommand = "keyferryd-test-aftermath"

type aftermathOf struct{ Entries, Objects int } // of resident material, in the journal and on the token

func aftermath() {
	left, err := sweepLater(context.Background(), os.Args[1])
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(left)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "aftermath:", err)
		os.Exit(1)
	}
}

func sweepLater(ctx context.Context, path string) (left aftermathOf, err error) {
	cfg, err := loadConfig(path)
	if err != nil {
		return left, err
	}
	log := slog.New(slog.DiscardHandler)
	token, err := openToken(ctx, &cfg, log)
	if err != nil {
		return left, err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	db, err := openStore(ctx, &cfg.Store, log)
	if err != nil {
		return left, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	e, err := engine.New(ctx, engine.Config{
		Token: token, Store: db, Custody: cfg.custody(), ManualSweep: true,
		Now: func() time.Time { return time.Now().Add(11 * time.Minute) },
	})
	if err != nil {
		return left, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	if err := e.Sweep(ctx); err != nil {
		return left, err
	}
	entries, err := db.Residents(ctx, time.Time{}, 0)
	if err != nil {
		return left, err
	}
	instance, err := db.Instance(ctx)
	if err != nil {
		return left, err
	}
	objects, err := token.Residents(ctx, instance)
	return aftermathOf{len(entries), len(objects)}, err
}

// killWhileImporting kills the server of a dev directory so many times, and
// returns what its customers were told.
func killWhileImporting(t *testing.T, dir string, kills int) []*ledger {
	t.Helper()
	const customers = 4
	s := startDevServer(t, dir)
	far := time.Now().Add(1000 * time.Hour).Unix()
	var all []*ledger
	for kill := range kills {
		c := s.client(t)
		if kill%5 == 0 { // new customers, whose first imports are to be interrupted too
			for range customers {
				all = append(all, &ledger{
					customer: newCustomer(t, c), attempted: far,
					ciphertexts: map[string]string{}, unchecked: map[string]string{},
				})
			}
		}
		working := all[len(all)-customers:]
		var answers atomic.Int32
		enough := make(chan struct{})
		answered := func() {
			if answers.Add(1) == int32(1+3*kill) {
				close(enough)
			}
		}
		var wg sync.WaitGroup
		errs := make([]error, customers)
		for i, l := range working {
			l.client = c
			blob := wrapped(t, byok.OAEPSHA1, l.publicKey, l.material)
			wg.Go(func() { errs[i] = l.work(t.Context(), blob, answered) })
		}
		<-enough
		s.kill(t)
		wg.Wait()
		require.NoError(t, errors.Join(errs...))

		s = startDevServer(t, dir)
		for _, l := range working {
			l.client = s.client(t)
			l.check(t, l.unchecked)
			clear(l.unchecked)
		}
	}
	for _, l := range all {
		l.client = s.client(t)
		l.check(t, l.ciphertexts)
	}
	checkLog(t, s.client(t), all)
	require.NoError(t, s.stop())
	return all
}

// checkLog verifies the whole log of receipts, which has every import of all
// customers and nothing else.
func checkLog(t *testing.T, c *client, all []*ledger) {
	t.Helper()
	var head struct {
		Head      string
		Size      int64
		PublicKey []byte
	}
	require.NoError(t, c.call(t.Context(), "GetReceiptLogHead", nil, &head))
	key, err := receipt.ParsePublicKey(head.PublicKey)
	require.NoError(t, err)
	var log bytes.Buffer
	w, err := receipt.NewLogWriter(&log, []byte(head.Head), key)
	require.NoError(t, err)
	for start := int64(0); start < head.Size; {
		var page struct {
			Entries struct {
				Entry []struct {
					Index int64
					Hash  receipt.Hash
					Text  string
				}
			}
		}
		require.NoError(t, c.call(t.Context(), "GetReceiptLog", map[string]string{"Start": strconv.FormatInt(start, 10)}, &page))
		require.NotEmpty(t, page.Entries.Entry)
		for _, e := range page.Entries.Entry {
			require.NoError(t, w.Write(receipt.LogEntry{Index: e.Index, Hash: e.Hash, Entry: []byte(e.Text)}))
		}
		start += int64(len(page.Entries.Entry))
	}
	report, err := receipt.VerifyLog(&log, key, receipt.LogChecks{})
	require.NoError(t, err)
	made := 0
	for _, l := range all {
		made += len(l.made)
	}
	require.EqualValues(t, made, report.Imports)
}

// shareOnePair leaves the server of a dev directory with next to no wrapping
// pairs to make, which would take more time than all that is tested.
func shareOnePair(t *testing.T, dir string) {
	t.Helper()
	usePairs(t, dir, pairsConfig{Specs: []hsm.PairSpec{hsm.RSA2048}, Ready: 1, Outstanding: 1})
}

// usePairs configures the wrapping pairs of a dev directory, none of them by
// PKCS#1 v1.5.
func usePairs(t testing.TB, dir string, pairs pairsConfig) {
	t.Helper()
	configure(t, dir, func(cfg *config) {
		cfg.Token.AllowPKCS1v15 = false
		cfg.Pairs = pairs
	})
}

// configure changes the configuration of a dev directory.
func configure(t testing.TB, dir string, change func(*config)) {
	t.Helper()
	path := filepath.Join(dir, devConfigFile)
	cfg, err := loadConfig(path)
	require.NoError(t, err)
	change(&cfg)
	text, err := yaml.Marshal(cfg)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, text, 0o600))
}

// The first set-up is killed as soon as a file of it appears; the next start
// finishes it.
func TestKillsDuringFirstSetUp(t *testing.T) {
	softhsm.Once(t)
	for _, file := range []string{
		devUnfinished, devSecret, "tokens/*", "tokens/*/token.object", "tokens/*/*-*.object", devConfigFile, devDatabase, devCredentials,
	} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			killWhenThere(t, dir, file)
			s := startDevServer(t, dir)
			c := newCustomer(t, s.client(t))
			require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)), nil))
			require.Equal(t, "Enabled", c.state(t).KeyState)
			require.NoFileExists(t, filepath.Join(dir, devUnfinished))
			require.NoError(t, s.stop())
		})
	}
}

// killWhenThere starts a server and kills it when a file is there.
func killWhenThere(t *testing.T, dir, pattern string) {
	t.Helper()
	cmd := keyferryd(t, "dev", "--data", dir)
	require.NoError(t, cmd.Start())
	defer func() { require.Error(t, cmd.Wait()) }()
	require.Eventually(t, func() bool {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		return err == nil && len(found) > 0
	}, 30*time.Second, time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
}

// A first set-up that was interrupted anywhere is begun anew, and what is not
// its own is never touched.
func TestSetUpNeverRemovesWhatItDidNotMake(t *testing.T) {
	for _, name := range []string{"tokens/real/token.object", devDatabase, devSOPIN, devUserPIN, devSecret} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, name)
			require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
			require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
			status, stderr := run(t, "dev", "--data", dir)
			require.Equal(t, 1, status)
			require.Contains(t, stderr, "choose an empty directory")
			kept, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, "precious", string(kept))
		})
	}
}
