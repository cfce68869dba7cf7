package hsm_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// logOut logs the whole process out, which no session is told.
func (b *bench) logOut(t *testing.T) {
	t.Helper()
	p, slot := b.raw(t)
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	require.NoError(t, p.Logout(s))
	require.NoError(t, p.CloseSession(s))
}

// A session that is not logged in finds no private object, and no error. What
// is not found is not taken for gone.
func TestNothingIsFoundWithoutALogin(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	other := open(t, b.soft.Config()) // that has not seen the pair
	b.logOut(t)
	info, err := other.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
	require.Equal(t, b.pair, info)
	b.logOut(t)
	list, err := b.token.Pairs(ctx, instance)
	require.NoError(t, err)
	require.Len(t, list, 1)
	b.logOut(t)
	require.NoError(t, b.token.DestroyPair(ctx, b.pair.ID))
	list, err = b.token.Pairs(ctx, instance)
	require.NoError(t, err)
	require.Empty(t, list)
}

// A token of the right serial whose keys are others is not used. That is no
// answer about a record or a pair, for which callers take an ErrUntrusted.
func TestTokenComesBackWithOtherKeys(t *testing.T) {
	softhsm.Once(t)
	soft := softhsm.New(t)
	blank, theirs := filepath.Join(t.TempDir(), "blank"), filepath.Join(t.TempDir(), "theirs")
	require.NoError(t, os.CopyFS(blank, os.DirFS(soft.Files)))
	ceremony := func() hsm.Pins {
		pins, err := hsm.Init(context.Background(), hsm.InitConfig{Module: soft.Module, Label: soft.Label, SOPIN: soft.SOPIN, UserPIN: soft.UserPIN})
		require.NoError(t, err)
		return pins
	}
	ceremony()
	require.NoError(t, os.Rename(soft.Files, theirs))
	require.NoError(t, os.CopyFS(soft.Files, os.DirFS(blank)))
	soft.Pins = ceremony()

	b := &bench{soft: soft, token: open(t, soft.Config())}
	tap := hsmtest.On(t, soft.Module)
	p, _ := b.raw(t)
	ours := filepath.Join(t.TempDir(), "ours")
	require.NoError(t, os.Rename(soft.Files, ours))
	require.NoError(t, os.Rename(theirs, soft.Files))
	require.NoError(t, p.Finalize())
	for range 3 {
		_, err := b.token.MAC(context.Background(), "test")
		require.ErrorIs(t, err, hsm.ErrUnavailable)
		require.NotErrorIs(t, err, hsm.ErrUntrusted)
		require.ErrorContains(t, err, "not the pinned one")
	}
	require.Equal(t, 1, tap.Calls()["C_Login"])
}

// A token with another serial in its place, or none, or one that was never
// initialised, is never shown the PIN, and waited past.
func TestAnotherTokenInItsPlace(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	b := &bench{soft: soft}
	b.token = open(t, func() hsm.Config {
		cfg := soft.Config()
		cfg.Patience = 100 * time.Millisecond
		return cfg
	}())
	tap := hsmtest.On(t, soft.Module)
	p, _ := b.raw(t)
	ours := filepath.Join(t.TempDir(), "ours")
	require.NoError(t, os.Rename(soft.Files, ours))
	require.NoError(t, p.Finalize())
	require.Eventually(t, func() bool {
		_, err := b.token.MAC(context.Background(), "test")
		require.ErrorIs(t, err, hsm.ErrUnavailable)
		return strings.Contains(err.Error(), "no initialised token labelled")
	}, waitFor, tick)
	// Whoever makes a token of our label, with a serial of its own.
	so, user := soft.SOPIN, soft.UserPIN
	serial, err := hsm.InitToken(context.Background(), soft.Module, soft.Label, so, user)
	require.NoError(t, err)
	require.NotEqual(t, soft.Serial, serial)
	tap.Reset()
	require.Eventually(t, func() bool {
		_, err = b.token.MAC(context.Background(), "test")
		require.ErrorIs(t, err, hsm.ErrUnavailable)
		require.NotErrorIs(t, err, hsm.ErrUntrusted)
		return strings.Contains(err.Error(), "not the pinned")
	}, waitFor, tick)
	require.Zero(t, tap.Calls()["C_Login"])

	// A person removes it and brings ours back.
	impostors, err := filepath.Glob(filepath.Join(filepath.Dir(soft.Files), "*-"+serial[:4]+"-"+serial[4:]))
	require.NoError(t, err)
	require.Len(t, impostors, 1)
	require.NoError(t, os.RemoveAll(impostors[0]))
	require.NoError(t, os.Rename(ours, soft.Files))
	require.NoError(t, p.Finalize()) // as we do where the module is ours alone
	require.Eventually(t, func() bool {
		_, err := b.token.MAC(context.Background(), "test")
		return err == nil
	}, waitFor, tick)
	require.Equal(t, 1, tap.Calls()["C_Login"])
}

// A login that is refused without a reason is no wrong PIN yet: a token that is
// going away answers so. The second in a row is one, and so is the first where
// the token has counted it.
func TestLoginRefusedWithoutAReason(t *testing.T) {
	softhsm.Once(t)
	for name, c := range map[string]struct {
		fault  hsmtest.Fault
		wrong  bool
		logins int
		want   error
	}{
		"once":                  {hsmtest.Fault{}, false, 2, nil},
		"twice":                 {hsmtest.Fault{Times: 2}, false, 2, hsm.ErrPIN},
		"by a count":            {hsmtest.Fault{TookEffect: true}, true, 1, hsm.ErrPIN},
		"of the token, nothing": {hsmtest.Fault{RV: pkcs11.CKR_DEVICE_ERROR, Times: 3}, false, 4, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, hsm.OAEPSHA1)
			require.NoError(t, b.token.Close())
			var wrong atomic.Bool
			cfg := b.soft.Config()
			cfg.PIN = func() ([]byte, error) {
				if wrong.Load() {
					return []byte("wrong-but-long-enough-pin"), nil
				}
				return b.soft.UserPIN()
			}
			token := open(t, cfg)
			p, slot := b.raw(t)
			tap := hsmtest.On(t, b.soft.Module)
			wrong.Store(c.wrong)
			c.fault.Call = "C_Login"
			if c.fault.RV == 0 {
				c.fault.RV = pkcs11.CKR_GENERAL_ERROR
			}
			tap.Inject(c.fault)
			require.NoError(t, p.CloseAllSessions(slot))
			for range 3 {
				_, err := token.MAC(context.Background(), "test")
				require.ErrorIs(t, err, c.want)
			}
			require.Equal(t, c.logins, tap.Calls()["C_Login"])
		})
	}
}

// A token that dies again and again is given longer and longer pauses.
func TestFlappingTokenIsNotHurried(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1)
	p, slot := b.raw(t)
	start := time.Now()
	for range 5 {
		require.NoError(t, p.CloseAllSessions(slot))
		_, err := b.token.MAC(context.Background(), "test")
		require.NoError(t, err)
	}
	require.GreaterOrEqual(t, time.Since(start), (50+100+200+400)*time.Millisecond)
}

// Whatever a customer sends never costs the token a login or anybody a key.
func TestBadBlobsReopenNothing(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	key := b.opened(t, random(32))
	tap := hsmtest.On(t, b.soft.Module)
	n := 400
	if os.Getenv("KEYFERRY_SLOW") != "" {
		n = 10_000
	}
	good := b.wrap(t, random(32))
	wants := make(chan struct{}, n)
	for range n {
		wants <- struct{}{}
	}
	close(wants)
	inParallel(t, 8, func(i int) {
		for range wants {
			blob := append([]byte(nil), good...)
			switch len(wants) % 4 {
			case 0:
				blob[7] ^= 1
			case 1:
				blob = random(len(good))
			case 2:
				blob = b.wrap(t, random(31))
			case 3:
				blob = blob[:i]
			}
			if _, err := b.token.Import(ctx, b.request(blob)); err != hsm.ErrInvalidMaterial { //nolint:errorlint // exactly that
				t.Errorf("%v", err)
			}
			if _, err := key.Decrypt(ctx, nil, random(40), nil); err != hsm.ErrAuthentication { //nolint:errorlint // exactly that
				t.Errorf("%v", err)
			}
		}
	})
	calls := tap.Calls()
	for _, call := range []string{"C_Login", "C_Initialize", "C_Finalize"} {
		require.Zero(t, calls[call], call)
	}
	_, err := key.Encrypt(ctx, nil, []byte("x"), nil)
	require.NoError(t, err, "the key has been open all the time")
	require.NoError(t, key.Close())
}
