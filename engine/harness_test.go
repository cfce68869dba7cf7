package engine_test

import (
	"context"
	"crypto/rand"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// TestMain lets the tests share tokens, since making one takes a second; each
// test has a database of its own, and so pairs of its own.
//
// Each random walk of a property test takes a token some tenths of a second;
// there are few of them unless slow tests are wanted.
func TestMain(m *testing.M) {
	beNode()
	settings := map[string]string{"rapid.nofailfile": "true"} // materials are random anyway
	if os.Getenv("KEYFERRY_SLOW") == "" {
		settings["rapid.checks"] = "15"
	}
	for name, value := range settings {
		if err := flag.Set(name, value); err != nil {
			panic(err)
		}
	}
	code := m.Run()
	shared.end()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// shared is the testing.TB of what lives as long as the process.
var shared process

type process struct{ cleanups []func() }

func (*process) Helper()                   {}
func (*process) Fatalf(f string, a ...any) { panic(fmt.Sprintf(f, a...)) }
func (p *process) Cleanup(f func())        { p.cleanups = append(p.cleanups, f) }

func (p *process) TempDir() string {
	dir, err := os.MkdirTemp("", "keyferry-engine-")
	if err != nil {
		panic(err)
	}
	p.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (p *process) end() {
	for _, f := range slices.Backward(p.cleanups) {
		f()
	}
}

// plainToken offers RSAES_OAEP; pkcs1Token RSAES_PKCS1_V1_5 as well.
var (
	plainToken = sync.OnceValue(func() *hsm.Token { return openShared(tokenConfig()) })
	pkcs1Token = sync.OnceValue(func() *hsm.Token {
		cfg := tokenConfig()
		cfg.AllowPKCS1v15 = true
		return openShared(cfg)
	})
)

// tokenConfig makes a token that lives as long as the process.
func tokenConfig() hsm.Config { return softhsm.New(&shared, softhsm.WithKeys()).Config() }

func dataDir() string { return shared.TempDir() }

func openShared(cfg hsm.Config) *hsm.Token {
	token, err := hsm.Open(context.Background(), cfg)
	if err != nil {
		panic(err)
	}
	shared.Cleanup(func() { _ = token.Close() })
	return token
}

// house is an engine on a token, with a database of its own.
type house struct {
	*engine.Engine
	clock    *clock
	cfg      engine.Config
	database sqlite.Config
	between  func(store.Store) store.Store // what stands between engine and database
	store    *sqlite.Store
	instance string
	route    route                              // of what is imported
	asked    map[string]engine.ImportParameters // by PKCS#1 v1.5, whose pairs are few
}

// newHouse builds a house whose clock stands still, that sweeps only when it is
// told to, and that makes as few pairs as it can, since each takes the token a
// fifth of a second. Settings change that.
func newHouse(tb testing.TB, settings ...func(*house)) *house {
	tb.Helper()
	h := &house{clock: newClock(), route: defaultRoute, asked: map[string]engine.ImportParameters{}, between: func(s store.Store) store.Store { return s }}
	h.database.Path = filepath.Join(tb.TempDir(), "keyferry.db")
	h.cfg = engine.Config{
		Now: h.clock.Now, ManualSweep: true, PoolSize: 1, PairBound: 1, FailureFloor: time.Millisecond,
	}
	if os.Getenv("KEYFERRY_CUSTODY") == hsm.Resident.String() {
		h.cfg.Custody = hsm.Resident
	}
	for _, set := range settings {
		set(h)
	}
	if h.cfg.Token == nil {
		h.cfg.Token = plainToken()
	}
	h.open(tb)
	tb.Cleanup(func() {
		h.shut(tb)
		pairs, err := h.cfg.Token.Pairs(context.Background(), h.instance)
		require.NoError(tb, err)
		for _, pair := range pairs {
			require.NoError(tb, h.cfg.Token.DestroyPair(context.Background(), pair.ID))
		}
		h.destroyResidents(tb)
	})
	return h
}

func with(change func(*engine.Config)) func(*house) {
	return func(h *house) { change(&h.cfg) }
}

// withPairs lets so many be outstanding before they are shared.
func withPairs(n int) func(*house) {
	return with(func(c *engine.Config) { c.PairBound = n })
}

func withToken(token *hsm.Token) func(*house) {
	return with(func(c *engine.Config) { c.Token = token })
}

// sealed is for tests of the calls that sealing makes, in whatever custody the
// others are.
var sealed = with(func(c *engine.Config) { c.Custody = hsm.Sealed })

// withStore puts something between the engine and its database.
func withStore(between func(store.Store) store.Store) func(*house) {
	return func(h *house) { h.between = between }
}

func (h *house) open(tb testing.TB) {
	tb.Helper()
	var err error
	h.store, err = sqlite.Open(context.Background(), h.database)
	require.NoError(tb, err)
	h.instance, err = h.store.Instance(context.Background())
	require.NoError(tb, err)
	h.cfg.Store = h.between(h.store)
	h.start(tb)
}

func (h *house) start(tb testing.TB) {
	tb.Helper()
	var err error
	h.Engine, err = engine.New(context.Background(), h.cfg)
	require.NoError(tb, err)
}

// shut closes engine and database. Closing again does nothing.
func (h *house) shut(tb testing.TB) {
	tb.Helper()
	require.NoError(tb, h.Engine.Close())
	require.NoError(tb, h.store.Close())
}

// restart ends the engine and starts another, on the database as it is open.
func (h *house) restart(tb testing.TB) {
	tb.Helper()
	require.NoError(tb, h.Engine.Close())
	h.start(tb)
}

// reopen is restart with the database opened anew.
func (h *house) reopen(tb testing.TB) {
	tb.Helper()
	h.shut(tb)
	h.open(tb)
}

// residents lists the objects of the house in the token.
func (h *house) residents(tb testing.TB) []hsm.ResidentObject {
	tb.Helper()
	objects, err := h.cfg.Token.Residents(context.Background(), h.instance)
	require.NoError(tb, err)
	return objects
}

func (h *house) destroyResidents(tb testing.TB) {
	tb.Helper()
	for _, o := range h.residents(tb) {
		require.NoError(tb, h.cfg.Token.DestroyResident(context.Background(), h.instance, o.ID))
	}
}

// newKey makes a CMK that waits for material. It is resident, where that is
// what KEYFERRY_CUSTODY says, unless it is of SM4.
func (h *house) newKey(tb testing.TB, spec engine.KeySpec) string {
	tb.Helper()
	in := engine.CreateKeyInput{Spec: spec}
	if spec == engine.AliyunSM4 {
		in.Custody = hsm.Sealed
	}
	key, err := h.CreateKey(context.Background(), in)
	require.NoError(tb, err)
	require.Equal(tb, engine.PendingImport, key.State)
	return key.KeyID
}

// parameters asks for import parameters of the house's route.
func (h *house) parameters(tb testing.TB, keyID string) engine.ImportParameters {
	tb.Helper()
	if params, ok := h.asked[keyID]; ok {
		return params
	}
	params := h.parametersOf(tb, keyID, h.route.pair, h.route.alg)
	if h.route.alg == hsm.PKCS1v15 {
		h.asked[keyID] = params
	}
	return params
}

func (h *house) parametersV15(tb testing.TB, keyID string) engine.ImportParameters {
	tb.Helper()
	return h.parametersOf(tb, keyID, hsm.RSA2048, hsm.PKCS1v15)
}

func (h *house) parametersOf(tb testing.TB, keyID string, pair hsm.PairSpec, alg hsm.Algorithm) engine.ImportParameters {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	params, err := h.GetParametersForImport(ctx, keyID, pair, alg)
	require.NoError(tb, err)
	return params
}

// input is the request of a customer who wraps material as he should.
func input(tb testing.TB, params engine.ImportParameters, material []byte) engine.ImportInput {
	tb.Helper()
	return inputFor(tb, params, hsm.OAEPSHA1, material)
}

func inputFor(tb testing.TB, params engine.ImportParameters, alg hsm.Algorithm, material []byte) engine.ImportInput {
	tb.Helper()
	wrapped, err := byok.Wrap(string(alg), params.PublicKey, material)
	require.NoError(tb, err)
	return engine.ImportInput{KeyID: params.KeyID, EncryptedKeyMaterial: wrapped, ImportToken: params.ImportToken}
}

// importInto imports material into a CMK and fails the test if that fails.
func (h *house) importInto(tb testing.TB, keyID string, material []byte) engine.KeyMetadata {
	tb.Helper()
	key, err := h.ImportKeyMaterial(context.Background(), h.input(tb, h.parameters(tb, keyID), material))
	require.NoError(tb, err)
	return key
}

// enabledKey makes a CMK of the house's route with material of its own.
func (h *house) enabledKey(tb testing.TB) (keyID string, material []byte) {
	tb.Helper()
	keyID, material = h.newKey(tb, h.route.spec), h.route.material()
	require.Equal(tb, engine.Enabled, h.importInto(tb, keyID, material).State)
	return keyID, material
}

func (h *house) describe(tb testing.TB, keyID string) engine.KeyMetadata {
	tb.Helper()
	key, err := h.DescribeKey(context.Background(), keyID)
	require.NoError(tb, err)
	return key
}

func (h *house) encrypt(tb testing.TB, keyID, plaintext string) []byte {
	tb.Helper()
	out, err := h.Encrypt(context.Background(), keyID, []byte(plaintext), nil)
	require.NoError(tb, err)
	return out.Blob
}

func (h *house) requireDecrypts(tb testing.TB, blob []byte, plaintext string) {
	tb.Helper()
	out, err := h.Decrypt(context.Background(), blob, nil)
	require.NoError(tb, err)
	require.Equal(tb, plaintext, string(out.Plaintext))
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

// requireKind fails unless err is an *engine.Error of that kind.
func requireKind(tb testing.TB, kind engine.Kind, err error) *engine.Error {
	tb.Helper()
	var e *engine.Error
	require.ErrorAs(tb, err, &e)
	require.Equal(tb, kind, e.Kind, "%v", err)
	return e
}

// clock is a time that only the test moves.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)} }

// Now is the clock's time, not on the second as real ones are not.
func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now.Add(300 * time.Millisecond)
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// in is the second that is d from now.
func (c *clock) in(d time.Duration) time.Time { return c.Now().Truncate(time.Second).Add(d) }

// lines is what was logged, one JSON object each.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func newLog() (*lines, *slog.Logger) {
	l := &lines{}
	return l, slog.New(slog.NewJSONHandler(l, nil))
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
