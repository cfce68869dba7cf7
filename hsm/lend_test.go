package hsm_test

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

func inParallel(t *testing.T, n int, f func(i int)) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// hang makes every call of a function hang until release.
func hang(tap *hsmtest.Tap, call string) (hanging <-chan struct{}, release func()) {
	in, out := make(chan struct{}, 100), make(chan struct{})
	tap.Hold(call, func() { in <- struct{}{}; <-out })
	return in, sync.OnceFunc(func() { tap.Hold(call, func() {}); close(out) })
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// A call that the token does not answer keeps its session, and its caller no
// longer than that said.
func TestCallThatHangs(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 2 })
	ctx := context.Background()
	material := b.imported(t, random(32)).Material
	key, err := b.token.OpenMaterial(ctx, material)
	require.NoError(t, err)
	sealed, err := key.Encrypt(ctx, nil, []byte("text"), nil)
	require.NoError(t, err)
	req := b.request(b.wrap(t, random(32)))
	tap := hsmtest.On(t, b.soft.Module)
	for name, c := range map[string]struct {
		hangs string
		call  func(ctx context.Context) error
	}{
		"mac":    {"C_Sign", func(ctx context.Context) error { _, err := b.token.MAC(ctx, "test"); return err }},
		"sign":   {"C_Sign", func(ctx context.Context) error { _, err := b.token.SignReceipt(ctx, [32]byte{}); return err }},
		"random": {"C_GenerateRandom", func(ctx context.Context) error { _, err := b.token.Random(ctx, 16); return err }},
		"import": {"C_UnwrapKey", func(ctx context.Context) error { _, err := b.token.Import(ctx, req); return err }},
		"open":   {"C_UnwrapKey", func(ctx context.Context) error { _, err := b.token.OpenMaterial(ctx, material); return err }},
		"list":   {"C_FindObjects", func(ctx context.Context) error { _, err := b.token.Pairs(ctx, instance); return err }},
		"encrypt": {"C_Encrypt", func(ctx context.Context) error {
			_, err := key.Encrypt(ctx, nil, []byte("text"), nil)
			return err
		}},
		"decrypt": {"C_Decrypt", func(ctx context.Context) error {
			_, err := key.Decrypt(ctx, nil, sealed, nil)
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			hanging, release := hang(tap, c.hangs)
			defer release()
			for range 2 {
				err := c.call(soon(t))
				require.ErrorIs(t, err, hsm.ErrUnavailable)
				require.ErrorIs(t, err, context.DeadlineExceeded)
				require.ErrorContains(t, err, "the token has not answered")
				<-hanging
			}
			err := c.call(soon(t))
			require.ErrorIs(t, err, hsm.ErrUnavailable)
			require.ErrorContains(t, err, "all 2 sessions")
			require.ErrorContains(t, err, "2 of them with calls that the token has not answered in time")
			release()
			b.works(t)
			plain, err := key.Decrypt(ctx, nil, sealed, nil)
			require.NoError(t, err)
			require.Equal(t, "text", string(plain))
		})
	}
	// Nothing of what nobody waited for is left.
	require.NoError(t, key.Close())
	p, s := user(t, b.soft)
	require.Eventually(t, func() bool {
		return len(find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false))) == 0
	}, waitFor, tick)
}

// A lost token is opened beside calls that do not return, and closed beside
// them too.
func TestTokenComesBackBesideAHangingCall(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Patience = 200 * time.Millisecond })
	ctx := context.Background()
	key := b.opened(t, random(32))
	p, slot := b.raw(t)
	tap := hsmtest.On(t, b.soft.Module)
	hanging, release := hang(tap, "C_EncryptInit")
	defer release()
	_, err := key.Encrypt(soon(t), nil, []byte("x"), nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	<-hanging
	tap.Hold("C_EncryptInit", func() {})
	require.NoError(t, p.CloseAllSessions(slot))
	require.Eventually(t, func() bool {
		_, err := b.token.MAC(ctx, "test")
		return err == nil
	}, waitFor, tick)
	b.works(t)
	_, err = key.Encrypt(ctx, nil, []byte("x"), nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)
	require.Zero(t, tap.Calls()["C_Finalize"])

	tap.Reset()
	require.ErrorIs(t, b.token.Close(), hsm.ErrUnavailable)
	require.NoError(t, b.token.Close())
	require.Zero(t, tap.Calls()["C_Finalize"], "a call is still under way")
	release()
	require.NoError(t, key.Close())
	require.Eventually(t, func() bool { return goroutines("(*Token).Close", "") == 0 }, waitFor, tick)
}

// Open, too, comes back when its caller said, and is undone when the token
// answers at last.
func TestOpenHangs(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1)
	require.NoError(t, b.token.Close())
	tap := hsmtest.On(t, b.soft.Module)
	hanging, release := hang(tap, "C_Login")
	defer release()
	_, err := hsm.Open(soon(t), b.soft.Config())
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	<-hanging
	release()
	require.Eventually(t, func() bool {
		return tap.Calls()["C_CloseSession"] > 0 && tap.Calls()["C_CloseSession"] == tap.Calls()["C_OpenSession"]
	}, waitFor, tick)
	open(t, b.soft.Config())
}

// A key whose use hangs is not destroyed beneath it, and keeps no session busy
// that does not hang.
func TestKeyIsClosedWhileItsUseHangs(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 2 })
	key := b.opened(t, random(32))
	tap := hsmtest.On(t, b.soft.Module)
	hanging, release := hang(tap, "C_EncryptInit")
	defer release()
	_, err := key.Encrypt(soon(t), nil, []byte("x"), nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	<-hanging
	tap.Reset()
	closed := make(chan error, 1)
	go func() { closed <- key.Close() }()
	require.Eventually(t, func() bool { return goroutines("(*Key).destroy", "[chan receive") == 1 }, waitFor, tick)
	_, err = key.Encrypt(context.Background(), nil, []byte("x"), nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)
	for range 10 {
		_, err := b.token.MAC(context.Background(), "test")
		require.NoError(t, err, "the other session is free")
	}
	require.Zero(t, tap.Calls()["C_DestroyObject"])
	require.Empty(t, closed)
	release()
	require.NoError(t, <-closed)
	require.Equal(t, 1, tap.Calls()["C_DestroyObject"])
}

// goroutines counts those that are in a function, and in that state.
func goroutines(function, state string) (n int) {
	buf := make([]byte, 1<<20)
	for _, goroutine := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		head, frames, _ := strings.Cut(goroutine, "\n")
		if strings.Contains(head, state) && strings.Contains(frames, function) {
			n++
		}
	}
	return n
}

// queued counts the callers that wait for a session.
func queued() int { return goroutines("(*connection).take(", "[select") }

// Those who wait for a session get it in the order in which they came, also
// where some of them give up, and nobody who comes later passes them.
func TestCallersAreServedInOrder(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 1 })
	tap := hsmtest.On(t, b.soft.Module)
	hanging, release := hang(tap, "C_Sign")
	defer release()
	ctx := context.Background()
	var staying, leaving sync.WaitGroup
	staying.Go(func() { _, _ = b.token.MAC(ctx, "holds the session") })
	<-hanging
	const callers = 50
	var mu sync.Mutex
	var served []int
	leave, cancel := context.WithCancel(ctx)
	defer cancel()
	for i := range callers {
		own, group := ctx, &staying
		if i%5 == 4 {
			own, group = leave, &leaving
		}
		group.Go(func() {
			_, err := b.token.Random(own, 8)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				served = append(served, i)
			}
		})
		require.Eventually(t, func() bool { return queued() == i+1 }, waitFor, tick)
	}
	cancel()
	leaving.Wait()
	next := make(chan struct{})
	tap.Hold("C_GenerateRandom", func() { <-next })
	release()
	for n := range callers * 4 / 5 { // one after the other, or who was served first need not say so first
		next <- struct{}{}
		require.Eventually(t, func() bool { mu.Lock(); defer mu.Unlock(); return len(served) == n+1 }, waitFor, tick)
	}
	staying.Wait()
	require.True(t, slices.IsSorted(served), "%v", served)
}

// What is done once, with no deadline, comes back when it is interrupted, and
// in the way of nobody.
func TestCeremonyIsInterrupted(t *testing.T) {
	softhsm.Once(t)
	soft := softhsm.New(t)
	tap := hsmtest.On(t, soft.Module)
	interrupted := func(call string, work func(ctx context.Context) error) {
		t.Helper()
		hanging, release := hang(tap, call)
		defer release()
		ctx, interrupt := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- work(ctx) }()
		<-hanging
		interrupt()
		err := <-ended
		require.ErrorIs(t, err, hsm.ErrUnavailable)
		require.ErrorIs(t, err, context.Canceled)
	}
	ceremony := func(ctx context.Context) (err error) {
		soft.Pins, err = hsm.Init(ctx, hsm.InitConfig{Module: soft.Module, Label: soft.Label, SOPIN: soft.SOPIN, UserPIN: soft.UserPIN})
		return err
	}
	interrupted("C_Login", ceremony)
	require.Eventually(t, func() bool { return tap.Sessions() == 0 }, waitFor, tick)
	require.NoError(t, ceremony(context.Background()))
	interrupted("C_Login", func(ctx context.Context) error {
		_, err := hsm.Open(ctx, soft.Config())
		return err
	})
	require.Eventually(t, func() bool { return tap.Sessions() == 0 }, waitFor, tick)
	require.NoError(t, open(t, soft.Config()).Close())

	interrupted("C_Login", func(ctx context.Context) error {
		_, err := hsm.Examine(ctx, soft.Config(), false)
		return err
	})
	require.Eventually(t, func() bool { return tap.Sessions() == 0 }, waitFor, tick)

	// Another slot, behind one that waits for the same.
	initToken := func(ctx context.Context) error {
		_, err := hsm.InitToken(ctx, soft.Module, soft.Label+"2", soft.SOPIN, soft.UserPIN)
		return err
	}
	hanging, release := hang(tap, "C_InitToken")
	ctx, interrupt := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- initToken(ctx) }()
	<-hanging
	require.ErrorIs(t, initToken(soon(t)), hsm.ErrUnavailable)
	interrupt()
	require.ErrorIs(t, <-ended, context.Canceled)
	release()
	require.Eventually(t, func() bool { return errors.Is(initToken(context.Background()), hsm.ErrUntrusted) }, waitFor, tick, "it is made at last")
}
