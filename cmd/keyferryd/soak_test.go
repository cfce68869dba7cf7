package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm/hsmtest"
)

// soakVariable is how long TestSoak loads a server; "make soak" sets 30m.
const soakVariable = "KEYFERRY_SOAK"

// soakDirVariable names the directory of the server to the process that is it.
const soakDirVariable = "KEYFERRY_SOAK_DIR"

const shortSoak = 20 * time.Second

// Bounds of the soak. Between two looks the load rests, so that what is counted
// stands still.
const (
	soakLooks    = 12 // of which the first quarter is to warm up
	longestPause = 15 * time.Second
	soakCallers  = 16
	soakKeys     = 12 // that a caller has at a time
)

// A server under mixed load ends with as many goroutines, sessions, objects of
// the token and files open as it had when it was warm. The server is in one
// process with its callers and this test, where all of them can be counted; and
// that is a process of its own, as other tests open and close things here.
func TestSoak(t *testing.T) {
	t.Parallel()
	if dir := os.Getenv(soakDirVariable); dir != "" {
		soak(t, dir)
		return
	}
	dir := t.TempDir()
	require.NoError(t, startDevServer(t, dir).stop())
	usePairs(t, dir, fewPairs)
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(exe, "-test.run=^TestSoak$", "-test.v", "-test.timeout=0")
	cmd.Env = append(os.Environ(), soakDirVariable+"="+dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
}

func soak(t *testing.T, dir string) {
	t.Helper()
	duration, err := time.ParseDuration(cmp.Or(os.Getenv(soakVariable), shortSoak.String()))
	require.NoError(t, err, soakVariable)
	cfg, err := loadConfig(filepath.Join(dir, devConfigFile))
	require.NoError(t, err)
	require.NoError(t, cfg.applyEnvironment())
	census := hsmtest.Count(t, cfg.Token.Module)
	ctx, stop := context.WithCancel(t.Context())
	// What is logged at Error is no part of the load.
	var log bytes.Buffer
	s, err := openService(ctx, &cfg, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})))
	require.NoError(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- serveHTTP(ctx, listener, s.handler, slog.New(slog.DiscardHandler)) }()
	credentials := readCredentials(t, dir)
	credentials.Endpoint = listener.Addr().String()

	var done atomic.Int64
	callers := make([]*soaker, soakCallers)
	for i := range callers {
		c := clientOf(credentials)
		callers[i] = &soaker{client: c, random: mathrand.New(mathrand.NewPCG(1, uint64(i))), done: &done}
	}
	looks := max(soakLooks, int(duration/longestPause))
	var counts []count
	for range looks {
		turn, end := context.WithTimeout(ctx, duration/time.Duration(looks))
		var wg sync.WaitGroup
		errs := make([]error, len(callers))
		for i, c := range callers {
			wg.Go(func() { errs[i] = c.work(ctx, turn) })
		}
		wg.Wait()
		end()
		require.NoError(t, errors.Join(errs...), log.String())
		counts = append(counts, countAtRest(t, s, census, cfg.Token.Label))
	}
	warm := counts[len(counts)/4:]
	t.Logf("%d requests in %s; when warm: %+v; in the end: %+v", done.Load(), duration, warm[0], warm[len(warm)-1])
	for name := range warm[0] {
		values := make([]float64, len(warm))
		for i := range warm {
			values[i] = float64(warm[i][name])
		}
		if grown := trend(values) * float64(len(values)-1); grown > allowedGrowth {
			var stacks bytes.Buffer
			_ = pprof.Lookup("goroutine").WriteTo(&stacks, 1)
			t.Errorf("%s grow: %v, by a trend of %.1f from first to last\n%s", name, values, grown, stacks.String())
		}
	}
	require.Empty(t, log.String())
	for _, c := range callers {
		c.http.CloseIdleConnections()
	}
	stop()
	require.NoError(t, <-served)
	require.NoError(t, s.close())
	require.Zero(t, census.Sessions(), "sessions that nobody closed")
}

// allowedGrowth is what a trend may show by chance: a timer, or a pair on its
// way into the pool, was there at one look and not at another.
const allowedGrowth = 2.0

// count is what there is while the load rests, by its name. Keys that are open,
// and wrapping pairs, are objects of the token by right; those beyond them are
// not.
type count map[string]int

// countAtRest takes the least of some counts: what works in the background may
// be at work at any one of them.
func countAtRest(t *testing.T, s *service, census *hsmtest.Census, label string) count {
	t.Helper()
	least := count{}
	for i := range 10 {
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skipf("no /proc/self/fd to count files in: %v", err)
		}
		stats, err := s.engine.Stats(t.Context())
		require.NoError(t, err)
		objects, err := census.Objects(label)
		require.NoError(t, err)
		objects -= stats.OpenKeys
		for _, p := range stats.Pairs {
			objects -= p.Ready + p.Bound
		}
		now := count{"goroutines": runtime.NumGoroutine(), "files": len(files), "sessions": census.Sessions(), "objects": objects}
		for name, n := range now {
			if i == 0 || n < least[name] {
				least[name] = n
			}
		}
	}
	return least
}

// trend is the slope of the line that fits best.
func trend(values []float64) float64 {
	n := float64(len(values))
	var x, y, xx, xy float64
	for i, v := range values {
		x, y, xx, xy = x+float64(i), y+v, xx+float64(i*i), xy+float64(i)*v
	}
	return (n*xy - x*y) / (n*xx - x*x)
}

func TestTrend(t *testing.T) {
	t.Parallel()
	require.InDelta(t, 0, trend([]float64{5, 5, 5, 5}), 1e-9)
	require.InDelta(t, 2, trend([]float64{1, 3, 5, 7, 9}), 1e-9)
	require.InDelta(t, 0, trend([]float64{7, 9, 7, 9, 7}), 0.01)
}

// soaker is a caller with keys of its own.
type soaker struct {
	*client
	random *mathrand.Rand
	done   *atomic.Int64
	keys   []*soakKey
}

type soakKey struct {
	id, blob string // blob: of Encrypt under the material that it has, or ""
	params   map[string]string
}

// expected are refusals that the load asks for: keys expire, and are disabled
// by it.
var expected = []string{"Rejected.PendingImport", "Rejected.Disabled", "Rejected.StateModifiedFailed"}

// work does one thing after another until the turn ends.
func (s *soaker) work(ctx, turn context.Context) error {
	for turn.Err() == nil {
		if len(s.keys) < soakKeys {
			if err := s.create(ctx); err != nil {
				return err
			}
			continue
		}
		err := s.do(ctx, s.keys[s.random.IntN(len(s.keys))])
		s.done.Add(1)
		if err != nil && !slices.Contains(expected, codeOf(err)) {
			return err
		}
	}
	return nil
}

// create makes a key and imports material into it.
func (s *soaker) create(ctx context.Context) error {
	params, err := importKey(ctx, s.client, randomMaterial(byok.MaterialLen(byok.AES256)), &sync.Map{})
	if err != nil {
		return err
	}
	s.done.Add(3)
	s.keys = append(s.keys, &soakKey{id: params["KeyId"], params: params})
	return nil
}

// do is one of the things that customers do.
func (s *soaker) do(ctx context.Context, k *soakKey) error {
	id := map[string]string{"KeyId": k.id}
	switch n := s.random.IntN(100); {
	case n < 15:
		delete(k.params, "KeyMaterialExpireUnix")
		return s.call(ctx, "ImportKeyMaterial", k.params, nil)
	case n < 18: // material that expires, in use until then
		k.params["KeyMaterialExpireUnix"] = strconv.FormatInt(time.Now().Unix()+2, 10)
		return s.call(ctx, "ImportKeyMaterial", k.params, nil)
	case n < 45:
		var answer struct{ CiphertextBlob string }
		err := s.call(ctx, "Encrypt", map[string]string{"KeyId": k.id, "Plaintext": plaintextOf}, &answer)
		if err == nil {
			k.blob = answer.CiphertextBlob
		}
		return err
	case n < 60 && k.blob != "":
		var answer struct{ Plaintext string }
		err := s.call(ctx, "Decrypt", map[string]string{"CiphertextBlob": k.blob}, &answer)
		if err == nil && answer.Plaintext != plaintextOf {
			err = fmt.Errorf("key %s has another plaintext", k.id)
		}
		return err
	case n < 66:
		return s.call(ctx, "GenerateDataKey", id, nil)
	case n < 70:
		return s.call(ctx, "GenerateDataKeyWithoutPlaintext", id, nil)
	case n < 73 && k.blob != "":
		return s.call(ctx, "ReEncrypt", map[string]string{"CiphertextBlob": k.blob, "DestinationKeyId": s.keys[0].id}, nil)
	case n < 83:
		return s.call(ctx, "DescribeKey", id, nil)
	case n < 86:
		return s.call(ctx, "ListKeys", map[string]string{"PageSize": "50"}, nil)
	case n < 88:
		return s.call(ctx, "ListImportReceipts", id, nil)
	case n < 90:
		return s.call(ctx, "GetImportReceipt", id, nil)
	case n < 92:
		return s.call(ctx, "DeleteKeyMaterial", id, nil)
	case n < 94:
		return errors.Join(s.call(ctx, "DisableKey", id, nil), s.call(ctx, "EnableKey", id, nil))
	case n < 95: // refused, as its material is another's
		return s.importOther(ctx, k)
	case n < 96:
		s.keys = slices.DeleteFunc(s.keys, func(other *soakKey) bool { return other == k })
		return s.call(ctx, "ScheduleKeyDeletion", map[string]string{"KeyId": k.id, "PendingWindowInDays": "7"}, nil)
	}
	return s.call(ctx, "GetParametersForImport", map[string]string{
		"KeyId": k.id, "WrappingAlgorithm": byok.OAEPSHA1, "WrappingKeySpec": "RSA_2048",
	}, nil)
}

// importOther imports a damaged blob.
func (s *soaker) importOther(ctx context.Context, k *soakKey) error {
	blob, err := base64.StdEncoding.DecodeString(k.params["EncryptedKeyMaterial"])
	if err != nil {
		return err
	}
	blob[len(blob)/2] ^= 1
	err = s.call(ctx, "ImportKeyMaterial", map[string]string{
		"KeyId": k.id, "ImportToken": k.params["ImportToken"], "EncryptedKeyMaterial": base64.StdEncoding.EncodeToString(blob),
	}, nil)
	if code := codeOf(err); code == "InvalidKeyMaterial" || code == "InvalidImportToken" {
		return nil
	}
	return cmp.Or[error](err, fmt.Errorf("damaged material was imported into key %s", k.id))
}
