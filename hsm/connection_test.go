package hsm_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// raw is the same module through another client: what somebody else in the
// process, or the token's own trouble, can do to us.
func (b *bench) raw(t testing.TB) (p *pkcs11.Ctx, slot uint) {
	t.Helper()
	hsmtest.Keep(t, b.soft.Module)
	p = pkcs11.New(b.soft.Module)
	require.NotNil(t, p)
	slots, err := p.GetSlotList(true)
	require.NoError(t, err)
	for _, s := range slots {
		info, err := p.GetTokenInfo(s)
		require.NoError(t, err)
		if info.Label == b.soft.Label {
			return p, s
		}
	}
	require.Fail(t, "the token is not there")
	return nil, 0
}

// works proves that the token does everything again.
func (b *bench) works(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	key := b.opened(t, random(32))
	out, err := key.Encrypt(ctx, nil, []byte("text"), nil)
	require.NoError(t, err)
	plain, err := key.Decrypt(ctx, nil, out, nil)
	require.NoError(t, err)
	require.Equal(t, "text", string(plain))
	require.NoError(t, key.Close())
}

func TestTokenComesBack(t *testing.T) {
	for name, away := range map[string]func(*pkcs11.Ctx, uint) error{
		"sessions closed beneath us":  func(p *pkcs11.Ctx, slot uint) error { return p.CloseAllSessions(slot) },
		"module finalised beneath us": func(p *pkcs11.Ctx, _ uint) error { return p.Finalize() },
		"logged out beneath us": func(p *pkcs11.Ctx, slot uint) error {
			s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
			return errors.Join(err, p.Logout(s), p.CloseSession(s))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, hsm.OAEPSHA1)
			ctx := context.Background()
			key := b.opened(t, random(32))
			mac, err := b.token.MAC(ctx, "test")
			require.NoError(t, err)
			p, slot := b.raw(t)
			for range 3 {
				require.NoError(t, away(p, slot))
				// The first who notices waits for it to come back.
				again, err := b.token.MAC(ctx, "test")
				require.NoError(t, err)
				require.Equal(t, mac, again)
				b.works(t)
			}
			// What was open is known to be gone, and not something else.
			_, err = key.Encrypt(ctx, nil, []byte("x"), nil)
			require.ErrorIs(t, err, hsm.ErrKeyLost)
			require.NoError(t, key.Close())
		})
	}
}

// While the token is away, callers wait as long as they said, and no longer.
func TestTokenStaysAway(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Patience = 50 * time.Millisecond })
	p, slot := b.raw(t)
	tap := hsmtest.On(t, b.soft.Module)
	tap.Inject(hsmtest.Fault{Call: "C_OpenSession", RV: pkcs11.CKR_DEVICE_REMOVED, Times: -1})
	require.NoError(t, p.CloseAllSessions(slot))
	for range 3 {
		_, err := b.token.MAC(context.Background(), "test")
		require.ErrorIs(t, err, hsm.ErrUnavailable)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := b.token.Import(ctx, b.request(b.wrap(t, random(32))))
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.ErrorIs(t, err, context.Canceled)
	require.NotZero(t, tap.Heal())
	require.Eventually(t, func() bool {
		_, err := b.token.MAC(context.Background(), "test")
		return err == nil
	}, waitFor, tick)
	b.works(t)
}

// A refused PIN is tried once: three tries lock most tokens.
func TestPINIsTriedOnce(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1)
	p, slot := b.raw(t)
	tap := hsmtest.On(t, b.soft.Module)

	t.Run("at open", func(t *testing.T) {
		require.NoError(t, b.token.Close())
		cfg := b.soft.Config()
		cfg.PIN = func() ([]byte, error) { return []byte("wrong-but-long-enough-pin"), nil }
		tap.Reset()
		_, err := hsm.Open(context.Background(), cfg)
		require.ErrorIs(t, err, hsm.ErrPIN)
		require.NotContains(t, err.Error(), "wrong-but-long")
		require.Equal(t, 1, tap.Calls()["C_Login"])
	})
	t.Run("when the token comes back", func(t *testing.T) {
		right := true
		var mu sync.Mutex
		cfg := b.soft.Config()
		cfg.PIN = func() ([]byte, error) {
			mu.Lock()
			defer mu.Unlock()
			if right {
				return b.soft.UserPIN()
			}
			return []byte("wrong-but-long-enough-pin"), nil
		}
		token := open(t, cfg)
		mu.Lock()
		right = false
		mu.Unlock()
		tap.Reset()
		require.NoError(t, p.CloseAllSessions(slot))
		for range 10 {
			_, err := token.MAC(context.Background(), "test")
			require.ErrorIs(t, err, hsm.ErrPIN)
		}
		require.Equal(t, 1, tap.Calls()["C_Login"])
	})
}

func TestPINIsWiped(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1)
	require.NoError(t, b.token.Close())
	var given []byte
	cfg := b.soft.Config()
	cfg.PIN = func() ([]byte, error) {
		pin, err := b.soft.UserPIN()
		given = pin
		return pin, err
	}
	open(t, cfg)
	require.NotEmpty(t, given)
	require.Equal(t, make([]byte, len(given)), given)
}

// More callers than sessions queue, and give up when they said they would.
func TestCallersQueueForSessions(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 2 })
	req := b.request(b.wrap(t, random(32)))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := b.token.Import(context.Background(), req)
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()

	// Two calls that hold both sessions until the third has given up.
	hold, held := make(chan struct{}), make(chan struct{}, 2)
	tap := hsmtest.On(t, b.soft.Module)
	tap.Hold("C_Sign", func() { held <- struct{}{}; <-hold })
	for range 2 {
		wg.Go(func() {
			_, err := b.token.MAC(context.Background(), "test")
			if err != nil {
				t.Error(err)
			}
		})
	}
	<-held
	<-held
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	_, err := b.token.MAC(ctx, "test")
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "2 sessions are busy")
	close(hold)
	wg.Wait()
}

// A token that grants fewer sessions than asked for is used with those.
func TestFewerSessionsThanConfigured(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	tap := hsmtest.On(t, b.soft.Module)
	// Those that are open, one more, and none besides.
	tap.Inject(hsmtest.Fault{Call: "C_OpenSession", After: 1, RV: pkcs11.CKR_SESSION_COUNT, Times: -1})
	var wg sync.WaitGroup
	var failed atomic.Int32
	for range 16 {
		wg.Go(func() {
			for range 20 {
				if _, err := b.token.MAC(context.Background(), "test"); err != nil {
					failed.Add(1)
				}
			}
		})
	}
	wg.Wait()
	require.Zero(t, failed.Load())
	require.NotZero(t, tap.Heal())
	require.Equal(t, 320, tap.Calls()["C_Sign"])
}

// Nothing leaks, whatever fails: sessions and objects are counted by the token.
func TestFaultsLeaveNothingBehind(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, soft.Module)
	b := &bench{soft: soft, token: open(t, soft.Config())}
	b.pair, b.pub = newPair(t, b.token, hsm.OAEPSHA1)
	ctx := context.Background()
	req := b.request(b.wrap(t, random(32)))
	want, err := b.token.Import(ctx, req)
	require.NoError(t, err)
	key, err := b.token.OpenMaterial(ctx, want.Material)
	require.NoError(t, err)
	p, slot := b.raw(t)
	objects := func() int {
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		require.NoError(t, err)
		defer func() { require.NoError(t, p.CloseSession(s)) }()
		require.NoError(t, p.FindObjectsInit(s, nil))
		found, _, err := p.FindObjects(s, 1000)
		require.NoError(t, err)
		require.NoError(t, p.FindObjectsFinal(s))
		return len(found)
	}
	before := objects()
	opened := tap.Calls()["C_OpenSession"] - tap.Calls()["C_CloseSession"]
	calls := 10 // of one import; see TestCallsOfEachOperation
	lost := 0   // calls of C_OpenSession that gave no session, whether or not they made one
	for _, took := range []bool{false, true} {
		for _, rv := range []uint32{pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_HOST_MEMORY} {
			for n := range calls {
				tap.Inject(hsmtest.Fault{After: n, RV: rv, TookEffect: took})
				tap.Reset()
				out, err := b.token.Import(ctx, req)
				if tap.Sequence()[n] == "C_OpenSession" {
					lost++
				}
				opened += tap.Calls()["C_OpenSession"] - tap.Calls()["C_CloseSession"]
				require.Equal(t, 1, tap.Heal())
				switch {
				case err == nil:
					require.Equal(t, want, out)
				case errors.Is(err, hsm.ErrInvalidMaterial):
					// The token failed once, without a reason, and works: it
					// cannot be told from a bad blob.
					require.EqualValues(t, pkcs11.CKR_GENERAL_ERROR, rv)
				default:
					require.ErrorIs(t, err, hsm.ErrUnavailable)
				}
			}
		}
	}
	tap.Reset()
	b.works(t)
	require.NoError(t, key.Close())
	require.Equal(t, before-1, objects(), "the key that was open is gone, and nothing came")
	require.NoError(t, b.token.Close())
	require.Equal(t, lost, opened+tap.Calls()["C_OpenSession"]-tap.Calls()["C_CloseSession"], "every session is closed that we knew of")
}

// The faults are reported, not real: SoftHSM2 crashes when the sessions of
// running calls are closed.
func TestManyCallersWhileSessionsDie(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	req := b.request(b.wrap(t, random(32)))
	want, err := b.token.Import(ctx, req)
	require.NoError(t, err)
	tap := hsmtest.On(t, b.soft.Module)
	var wg sync.WaitGroup
	var done atomic.Int64
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				key, err := b.token.OpenMaterial(ctx, want.Material)
				if err != nil {
					if !errors.Is(err, hsm.ErrUnavailable) {
						t.Error(err)
					}
					continue
				}
				ct, err := key.Encrypt(ctx, nil, []byte("text"), nil)
				if err == nil {
					var plain []byte
					if plain, err = key.Decrypt(ctx, nil, ct, nil); err == nil && string(plain) != "text" {
						t.Errorf("another key decrypted it: %q", plain)
					}
				}
				if err != nil && !errors.Is(err, hsm.ErrKeyLost) && !errors.Is(err, hsm.ErrUnavailable) {
					t.Error(err)
				}
				if err := key.Close(); err != nil {
					t.Error(err)
				}
				done.Add(1)
			}
		})
	}
	faults := []hsmtest.Fault{
		{Call: "C_EncryptInit", RV: pkcs11.CKR_SESSION_CLOSED},
		{Call: "C_Encrypt", RV: pkcs11.CKR_SESSION_HANDLE_INVALID},
		{Call: "C_UnwrapKey", RV: pkcs11.CKR_SESSION_HANDLE_INVALID, TookEffect: true},
		{Call: "C_DecryptInit", RV: pkcs11.CKR_DEVICE_REMOVED},
		{Call: "C_Decrypt", RV: pkcs11.CKR_DEVICE_ERROR, TookEffect: true},
		{Call: "C_DestroyObject", RV: pkcs11.CKR_USER_NOT_LOGGED_IN},
	}
	for i := range 30 {
		tap.Inject(faults[i%len(faults)])
		enough := done.Load() + 20
		require.Eventually(t, func() bool { return done.Load() >= enough }, waitFor, tick)
	}
	require.Equal(t, 30, tap.Heal())
	close(stop)
	wg.Wait()
	b.works(t)
}

func TestCloseIsFinal(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	key := b.opened(t, random(32))
	require.NoError(t, b.token.Close())
	require.NoError(t, b.token.Close())
	_, err := b.token.MAC(ctx, "test")
	require.ErrorIs(t, err, hsm.ErrClosed)
	_, err = b.token.OpenMaterial(ctx, hsm.Material{Custody: hsm.Sealed, Spec: hsm.AES256, Vault: b.soft.Pins.VaultAES, Ref: make([]byte, 40)})
	require.ErrorIs(t, err, hsm.ErrClosed)
	_, err = key.Encrypt(ctx, nil, nil, nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)
	require.NoError(t, key.Close())
}
