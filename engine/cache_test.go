package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

// vault opens keys for a cache under test and counts those that are open.
type vault struct {
	*cache
	opened    atomic.Int64
	discarded atomic.Int64

	// during is called while a key is being opened.
	during func(ctx context.Context, ref keyRef) error
}

func newVault(size int) *vault {
	v := &vault{during: func(context.Context, keyRef) error { return nil }}
	v.cache = newCache(size, v.open, func(k *openKey, wait time.Duration) {
		_ = k.key.CloseWithin(wait)
		v.discarded.Add(1)
	}, func(bool) {})
	return v
}

// open opens CMKs whose KeyID is "key-x" and whose KeyVersionID is
// "version-x".
func (v *vault) open(ctx context.Context, ref keyRef) (*openKey, error) {
	if err := v.during(ctx, ref); err != nil {
		return nil, err
	}
	v.opened.Add(1)
	name := ref.id[len("key-"):]
	if ref.version {
		name = ref.id[len("version-"):]
	}
	return &openKey{keyID: "key-" + name, versionID: "version-" + name, key: &fakeMaterial{}}, nil
}

func byKey(name string) keyRef     { return keyRef{id: "key-" + name} }
func byVersion(name string) keyRef { return keyRef{id: "version-" + name, version: true} }

func (v *vault) mustGet(tb testing.TB, ref keyRef) *openKey {
	tb.Helper()
	k, err := v.get(context.Background(), ref)
	require.NoError(tb, err)
	return k
}

type fakeMaterial struct{ closed atomic.Bool }

func (m *fakeMaterial) Encrypt(_ context.Context, dst, _, _ []byte) ([]byte, error) {
	if m.closed.Load() {
		return nil, hsm.ErrKeyLost
	}
	return dst, nil
}

func (m *fakeMaterial) Decrypt(ctx context.Context, dst, _, _ []byte) ([]byte, error) {
	return m.Encrypt(ctx, dst, nil, nil)
}

func (m *fakeMaterial) CloseWithin(time.Duration) error {
	m.closed.Store(true)
	return nil
}

func isClosed(k *openKey) bool { return k.key.(*fakeMaterial).closed.Load() }

func TestCacheHit(t *testing.T) {
	v := newVault(10)
	k := v.mustGet(t, byKey("a"))
	require.Same(t, k, v.mustGet(t, byKey("a")))
	require.Same(t, k, v.mustGet(t, byVersion("a")))
	require.EqualValues(t, 1, v.opened.Load())
}

func TestCacheEvictsWhatWasNotUsedForLongest(t *testing.T) {
	v := newVault(2)
	a, b := v.mustGet(t, byKey("a")), v.mustGet(t, byKey("b"))
	v.release(a)
	v.release(b)
	v.release(v.mustGet(t, byVersion("a")))
	c := v.mustGet(t, byKey("c"))
	require.True(t, isClosed(b))
	require.False(t, isClosed(a))

	// One in use is closed by its last user.
	d, e := v.mustGet(t, byKey("d")), v.mustGet(t, byKey("e"))
	require.True(t, isClosed(a))
	require.False(t, isClosed(c))
	require.NotSame(t, c, v.mustGet(t, byKey("c")))
	v.release(c)
	require.True(t, isClosed(c))
	v.release(d)
	v.release(e)
	require.Equal(t, 2, v.recent.Len())
	require.Len(t, v.keys, 4)
}

func TestCacheOpensOnce(t *testing.T) {
	const callers = 20
	v := newVault(10)
	started, goOn := make(chan struct{}), make(chan struct{})
	v.during = func(context.Context, keyRef) error {
		close(started)
		<-goOn
		return nil
	}
	answers := make(chan error, callers)
	for range callers {
		go func() {
			_, err := v.get(context.Background(), byKey("a"))
			answers <- err
		}()
	}
	<-started
	close(goOn)
	for range callers {
		require.NoError(t, <-answers)
	}
	require.EqualValues(t, 1, v.opened.Load())
}

func TestCacheKeepsNoErrors(t *testing.T) {
	v := newVault(10)
	broken := errors.New("broken")
	v.during = func(context.Context, keyRef) error { return broken }
	_, err := v.get(t.Context(), byKey("a"))
	require.Equal(t, broken, err)
	v.during = func(context.Context, keyRef) error { return nil }
	v.mustGet(t, byKey("a"))
	require.Empty(t, v.loading)
}

// One who gives up while he opens a key for others does not make them fail.
func TestCacheWhenTheOneWhoOpensGivesUp(t *testing.T) {
	v := newVault(10)
	ctx, giveUp := context.WithCancel(t.Context())
	opening := make(chan struct{})
	v.during = func(ctx context.Context, _ keyRef) error {
		if opening == nil {
			return nil
		}
		close(opening)
		opening = nil
		<-ctx.Done()
		return &Error{Kind: Unavailable, cause: ctx.Err()}
	}
	first := make(chan error)
	began := opening
	go func() {
		_, err := v.get(ctx, byKey("a"))
		first <- err
	}()
	<-began
	second := make(chan error)
	go func() {
		k, err := v.get(context.Background(), byKey("a"))
		if err == nil {
			v.release(k)
		}
		second <- err
	}()
	giveUp()
	require.ErrorIs(t, <-first, context.Canceled)
	require.NoError(t, <-second)
}

// One who waits for another's opening waits no longer than he wants.
func TestCacheWaiterGivesUp(t *testing.T) {
	v := newVault(10)
	opening, goOn := make(chan struct{}), make(chan struct{})
	v.during = func(context.Context, keyRef) error {
		close(opening)
		<-goOn
		return nil
	}
	done := make(chan error)
	go func() {
		_, err := v.get(context.Background(), byKey("a"))
		done <- err
	}()
	<-opening
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := v.get(ctx, byKey("a"))
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, err, Unavailable)
	close(goOn)
	require.NoError(t, <-done)
}

func TestCacheDrop(t *testing.T) {
	v := newVault(10)
	k := v.mustGet(t, byKey("a"))
	v.drop("key-a", "version-a", 0)
	require.True(t, isClosed(k), "at once, though it is lent")
	require.Zero(t, v.discarded.Load())
	fresh := v.mustGet(t, byVersion("a"))
	require.NotSame(t, k, fresh)
	v.release(k)
	require.EqualValues(t, 1, v.discarded.Load())
	require.Same(t, fresh, v.mustGet(t, byKey("a")), "the fresh one stays")

	v.dropOpen(k, 0) // by someone who has not noticed
	require.Same(t, fresh, v.mustGet(t, byKey("a")))
	v.drop("key-b", "version-b", 0)
}

// What was read before a change is not kept after it, under neither name, and
// whoever asks after the change does not get it.
func TestCacheDropWhileOpening(t *testing.T) {
	for _, ref := range []keyRef{byKey("a"), byVersion("a")} {
		t.Run(ref.id, func(t *testing.T) {
			v := newVault(10)
			opens := 0
			v.during = func(context.Context, keyRef) error {
				if opens++; opens == 1 {
					v.drop("key-a", "version-a", 0)
				}
				return nil
			}
			k := v.mustGet(t, ref)
			require.Equal(t, 2, opens)
			require.False(t, isClosed(k))
			require.EqualValues(t, 1, v.discarded.Load())
			require.Same(t, k, v.mustGet(t, byKey("a")))
		})
	}
}

// Two open one key by its two names at once: one of them is kept.
func TestCacheOpenedByBothNames(t *testing.T) {
	v := newVault(10)
	v.during = func(_ context.Context, ref keyRef) error {
		if !ref.version {
			v.during = func(context.Context, keyRef) error { return nil }
			v.release(v.mustGet(t, byVersion("a")))
		}
		return nil
	}
	k := v.mustGet(t, byKey("a"))
	require.Same(t, k, v.mustGet(t, byVersion("a")))
	require.EqualValues(t, 2, v.opened.Load())
	require.EqualValues(t, 1, v.discarded.Load())
}

func TestCacheClose(t *testing.T) {
	v := newVault(10)
	used, unused := v.mustGet(t, byKey("a")), v.mustGet(t, byKey("b"))
	v.release(unused)
	v.close()
	require.True(t, isClosed(used))
	require.True(t, isClosed(unused))
	_, err := v.get(t.Context(), byKey("c"))
	require.ErrorIs(t, err, Unavailable)
	v.release(used)
	require.Equal(t, v.opened.Load(), v.discarded.Load())
}

// Whatever happens at once, every key that was opened is closed once nobody
// has it, and no key is closed by eviction while it is lent.
func TestCacheUnderConcurrency(t *testing.T) {
	v := newVault(3)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 2000 {
				name := fmt.Sprint((i*7 + g) % 6)
				ref := byKey(name)
				if i%2 == 0 {
					ref = byVersion(name)
				}
				if g == 0 && i%5 == 0 {
					v.drop("key-"+name, "version-"+name, 0)
				}
				k, err := v.get(context.Background(), ref)
				if err != nil || k.keyID != "key-"+name {
					t.Errorf("asked for %s and got %+v, %v", name, k, err)
					return
				}
				v.release(k)
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, v.recent.Len(), 3)
	require.Len(t, v.keys, 2*v.recent.Len())
	require.Empty(t, v.loading)
	v.close()
	require.Equal(t, v.opened.Load(), v.discarded.Load())
}
