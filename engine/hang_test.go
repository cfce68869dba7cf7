package engine_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// hang makes the next calls of a function hang until release, all if none are
// named. It is hsm/lend_test.go's for the engine.
func hang(tap *hsmtest.Tap, call string, calls int) (hanging <-chan struct{}, release func()) {
	in, out := make(chan struct{}, 1000), make(chan struct{})
	var mu sync.Mutex
	tap.Hold(call, func() {
		mu.Lock()
		calls--
		free := calls == -1
		mu.Unlock()
		if free {
			tap.Hold(call, func() {})
			return
		}
		in <- struct{}{}
		<-out
	})
	return in, sync.OnceFunc(func() { tap.Hold(call, func() {}); close(out) })
}

const allCalls = -2

// hangable opens a token of its own, whose calls can be made to hang.
func hangable(t *testing.T, sessions int) (*hsm.Token, *hsmtest.Tap) {
	t.Helper()
	on := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, on.Module)
	cfg := on.Config()
	cfg.Sessions, cfg.Patience = sessions, time.Minute
	token, err := hsm.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	return token, tap
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// What the engine does of its own accord says once that it waits for a token
// that does not answer, gives that up, and goes on by other sessions.
func TestBackgroundOutlivesCallsThatHang(t *testing.T) {
	softhsm.Once(t)
	for name, c := range map[string]struct {
		call, work string
		start      func(h *house)
		done       func(t *testing.T, h *house) bool
	}{
		"the generator": {
			call: "C_GenerateKeyPair", work: `"work":"wrapping pairs"`,
			start: func(*house) {},
			done: func(t *testing.T, h *house) bool {
				t.Helper()
				counts, err := h.store.PairCounts(t.Context(), h.clock.in(0))
				require.NoError(t, err)
				return len(counts) == len(h.Algorithms())
			},
		},
		"the sweep": {
			call: "C_FindObjectsInit", work: `"work":"sweep"`,
			start: func(h *house) { h.clock.advance(2 * time.Hour) }, // token and store are compared
			done:  func(*testing.T, *house) bool { return true },
		},
	} {
		t.Run(name, func(t *testing.T) {
			token, tap := hangable(t, 8)
			log, logger := newLog()
			h := newHouse(t, withToken(token), withPairs(5), with(func(c *engine.Config) {
				c.Logger, c.PairSpecs, c.ManualSweep, c.SweepInterval = logger, []hsm.PairSpec{hsm.RSA2048}, false, 10*time.Millisecond
				c.SetBounds(1500*time.Millisecond, 300*time.Millisecond, time.Second, 10*time.Second)
			}))
			newCustomer(t, h)
			require.Eventually(t, func() bool { return c.done(t, h) }, time.Minute, 10*time.Millisecond)
			hanging, release := hang(tap, c.call, 2)
			defer release()
			c.start(h)
			h.parameters(t, h.newKey(t, engine.AliyunAES256)) // takes a pair
			<-hanging
			<-hanging
			said := func(what string) (lines int) {
				for line := range strings.Lines(log.String()) {
					if strings.Contains(line, "work in the background "+what) && strings.Contains(line, c.work) {
						lines++
					}
				}
				return lines
			}
			require.Eventually(t, func() bool {
				return said("waits") > 0 && said("waits") == said("goes on") && c.done(t, h)
			}, 20*time.Second, 10*time.Millisecond, "it is said once: %s", log)
			require.NoError(t, h.Health(t.Context()))
		})
	}
}

// Close waits for calls that do not return no longer than it says, however
// many keys they use.
func TestCloseOutlivesCallsThatHang(t *testing.T) {
	softhsm.Once(t)
	const keys = 5
	token, tap := hangable(t, 2*keys)
	h := newHouse(t, withToken(token), withPairs(2*keys), with(func(c *engine.Config) {
		c.SetBounds(time.Minute, time.Minute, 50*time.Millisecond, 500*time.Millisecond)
	}))
	var customers []*customer
	for range keys {
		customers = append(customers, newCustomer(t, h))
	}
	h.waitForPairs(t, keys)
	uses, releaseUses := hang(tap, "C_EncryptInit", allCalls)
	defer releaseUses()
	for _, c := range customers {
		_, err := h.Encrypt(soon(t), c.keyID, []byte("x"), nil)
		requireKind(t, engine.Unavailable, err)
		<-uses
	}
	pairs, releasePairs := hang(tap, "C_GenerateKeyPair", allCalls)
	defer releasePairs()
	h.parameters(t, h.newKey(t, engine.AliyunAES256))
	<-pairs
	start := time.Now()
	err := h.Engine.Close()
	require.Less(t, time.Since(start), 5*time.Second)
	e := requireKind(t, engine.Unavailable, err)
	require.ErrorContains(t, e, "left behind")
	require.NoError(t, h.Engine.Close())

	// The log and the counts had their turn beside what hangs.
	row, err := h.store.Usage(t.Context(), customers[0].keyID)
	require.NoError(t, err)
	require.GreaterOrEqual(t, row.Uses, uint64(2))
	releaseUses()
	releasePairs()
}

// watcher is a store that can tell of changes by others.
type watcher struct {
	store.Store
	stale func(keyID, versionID string)
}

func (w *watcher) Watch(stale func(keyID, versionID string)) { w.stale = stale }

// A key whose use hangs holds up nobody for long: not whoever changes its CMK,
// not whoever needs its room in the cache, and not the news of other nodes.
func TestKeyThatHangsHoldsUpNobody(t *testing.T) {
	const long = 5 * time.Second
	news := &watcher{}
	token, tap := hangable(t, 8)
	h := newHouse(t, withToken(token), with(func(c *engine.Config) { c.CacheSize = 2 }),
		withStore(func(s store.Store) store.Store { news.Store = s; return news }))
	customers := make([]*customer, 4)
	for i := range customers {
		customers[i] = newCustomer(t, h)
	}
	hangs := func(c *customer) (release func()) {
		h.requireDecrypts(t, c.blob, "secret") // it is open
		in, release := hang(tap, "C_EncryptInit", 1)
		_, err := h.Encrypt(soon(t), c.keyID, []byte("x"), nil)
		requireKind(t, engine.Unavailable, err)
		<-in
		return release
	}
	quickly := func(do func()) {
		t.Helper()
		start := time.Now()
		do()
		require.Less(t, time.Since(start), long)
	}

	defer hangs(customers[0])()
	quickly(func() { require.NoError(t, h.DisableKey(t.Context(), customers[0].keyID)) })
	_, err := h.Encrypt(t.Context(), customers[0].keyID, []byte("x"), nil)
	requireKind(t, engine.KeyDisabled, err)

	defer hangs(customers[1])()
	quickly(func() {
		for _, c := range customers[2:] {
			h.requireDecrypts(t, c.blob, "secret")
		}
	})
	require.Equal(t, 2, h.OpenKeys())

	defer hangs(customers[2])()
	row, err := h.store.Key(t.Context(), customers[2].keyID)
	require.NoError(t, err)
	start := time.Now()
	news.stale(row.KeyID, row.KeyVersionID)
	require.Less(t, time.Since(start), time.Second, "others are told at once")
	h.requireDecrypts(t, customers[2].blob, "secret")
}
