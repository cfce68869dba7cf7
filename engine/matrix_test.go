package engine_test

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// ruin is a house in which one call after the other fails, of the token and of
// the store.
type ruin struct {
	*house
	on     *softhsm.Token
	tap    *hsmtest.Tap
	broken *brokenStore
	lost   int // sessions that C_OpenSession made and did not tell of
	cases  int
}

const ruinSessions = 3

func newRuin(t *testing.T) *ruin {
	t.Helper()
	r := &ruin{on: softhsm.New(t, softhsm.WithKeys())}
	r.tap = hsmtest.On(t, r.on.Module)
	cfg := r.on.Config()
	cfg.Sessions = ruinSessions
	token, err := hsm.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	r.house = newHouse(t, withToken(token), withStore(func(s store.Store) store.Store {
		r.broken = &brokenStore{Store: s, at: -1}
		return r.broken
	}), with(func(c *engine.Config) { c.FailureBudget, c.PairSpecs = 1, []hsm.PairSpec{hsm.RSA2048} }))
	r.rest(t)
	return r
}

// act is one operation of the engine on a customer's CMK.
type act struct {
	// before makes what the operation is done to.
	before func(t *testing.T) *customer
	run    func(t *testing.T, c *customer) error
	// done reports whether it has taken effect as a whole; anything between
	// that and nothing fails the test.
	done func(t *testing.T, c *customer) bool
	// reads is set where it makes no difference.
	reads bool
	codes int // how many return codes fit the time; 0: all
	step  int // every so many calls; 0: each
}

// whole fails the test unless a CMK is one of what a CMK can be: without
// material, or with its material and what belongs to it.
func (r *ruin) whole(t *testing.T, c *customer) (enabled bool) {
	t.Helper()
	row, err := r.store.Key(t.Context(), c.keyID)
	require.NoError(t, err)
	key := r.describe(t, c.keyID)
	enabled = key.State == engine.Enabled
	require.Equal(t, enabled, len(row.Material) > 0)
	_, err = r.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
	if !enabled {
		require.Equal(t, engine.PendingImport, key.State)
		requireKind(t, engine.KeyPendingImport, err)
		return false
	}
	require.NoError(t, err)
	require.Len(t, row.MaterialID, hsm.MaterialIDLen)
	require.Len(t, row.KCV, hsm.KCVLen)
	require.NotEmpty(t, row.PairID)
	if c.blob != nil {
		r.requireDecrypts(t, c.blob, "secret")
	}
	return true
}

// try fails every call of an act, once having done nothing and once having
// taken effect.
func (r *ruin) try(t *testing.T, a act) {
	t.Helper()
	c := a.before(t)
	r.rest(t)
	r.tap.Reset()
	r.broken.arm(-1, false)
	require.NoError(t, a.run(t, c))
	calls := r.tap.Sequence()
	stored := r.broken.heal()
	codes := []uint32{
		deviceError, sessionHandleInvalid, pkcs11.CKR_GENERAL_ERROR, deviceRemoved,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_TOKEN_NOT_PRESENT,
	}
	if a.codes > 0 {
		codes = codes[:a.codes]
	}
	for _, took := range []bool{false, true} {
		for n := 0; n < len(calls); n += max(a.step, 1) {
			for _, rv := range codes {
				fault := hsmtest.Fault{After: n, RV: rv, TookEffect: took}
				r.case1(t, a, fmt.Sprintf("%d (%s), %v, took effect: %t", n, calls[n], pkcs11.Error(rv), took), func() {
					r.tap.Reset()
					r.tap.Inject(fault)
				}, func() {
					require.LessOrEqual(t, r.tap.Heal(), 1)
					if done := r.tap.Sequence(); took && len(done) > n && done[n] == "C_OpenSession" {
						r.lost++
					}
				})
			}
		}
		for n := range stored {
			r.case1(t, a, fmt.Sprintf("%d (%s), took effect: %t", n, stored[n], took),
				func() { r.broken.arm(n, took) }, func() { r.broken.heal() })
		}
	}
}

func (r *ruin) case1(t *testing.T, a act, what string, arm, heal func()) {
	t.Helper()
	c := a.before(t)
	r.rest(t)
	arm()
	err := a.run(t, c)
	heal()
	r.cases++
	if err != nil {
		require.ErrorIs(t, err, engine.Unavailable, what)
	}
	if !a.reads {
		done := a.done(t, c)
		require.True(t, err != nil || done, "acknowledged, and lost: %s", what)
	}
	require.NoError(t, a.run(t, c), "again: %s", what)
	require.True(t, a.reads || a.done(t, c), what)
	require.Eventually(t, func() bool { return r.tap.Sessions() <= ruinSessions+2+r.lost }, 10*time.Second, time.Millisecond, "sessions leak: %s", what)
	// Keys that were lost with a connection are in the cache until they are used.
	require.Eventually(t, func() bool { return r.material(t) <= r.OpenKeys() }, 10*time.Second, time.Millisecond, "material leaks: %s", what)
}

// material counts the session objects of secret keys, as another client of
// PKCS#11 sees them.
func (r *ruin) material(t *testing.T) int {
	t.Helper()
	return count(t, r.on, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
}

// Whichever call of the token or of the store fails, and whether or not it
// took effect: what was answered is durable, a CMK is whole, to do it again
// does it, and nothing is left in the token.
func TestEveryCallOfTheEngineFails(t *testing.T) {
	softhsm.Once(t)
	r := newRuin(t)
	ctx := t.Context()
	slow := os.Getenv("KEYFERRY_SLOW") != ""
	fresh := func(t *testing.T) *customer {
		t.Helper()
		c := &customer{keyID: r.newKey(t, engine.AliyunAES256), material: randomBytes(32)}
		c.params = r.parameters(t, c.keyID)
		return c
	}
	imports := func(t *testing.T, c *customer) error {
		_, err := r.ImportKeyMaterial(ctx, input(t, c.params, c.material))
		return err
	}
	enabled := func(t *testing.T, c *customer) bool { return r.whole(t, c) }
	customers := func(t *testing.T) *customer { return newCustomer(t, r.house) }
	one := newCustomer(t, r.house)
	same := func(*testing.T) *customer { return one }
	cold := func(t *testing.T) *customer { // its material is not open
		t.Helper()
		c := newCustomer(t, r.house)
		require.NoError(t, r.DisableKey(ctx, c.keyID))
		require.NoError(t, r.EnableKey(ctx, c.keyID))
		return c
	}
	encrypts := func(t *testing.T, c *customer) error {
		out, err := r.Encrypt(ctx, c.keyID, []byte("x"), nil)
		if err == nil {
			r.requireDecrypts(t, out.Blob, "x")
		}
		return err
	}
	decrypts := func(t *testing.T, c *customer) error {
		out, err := r.Decrypt(ctx, c.blob, nil)
		if err == nil {
			require.Equal(t, "secret", string(out.Plaintext))
		}
		return err
	}
	for name, a := range map[string]act{
		"create a key": {before: same, reads: true, run: func(t *testing.T, _ *customer) error {
			key, err := r.CreateKey(ctx, engine.CreateKeyInput{})
			if err == nil {
				key, err = r.DescribeKey(ctx, key.KeyID)
				require.True(t, err != nil || key.State == engine.PendingImport)
			}
			return err
		}},
		"get parameters": {before: same, reads: true, run: func(t *testing.T, c *customer) error {
			params, err := r.GetParametersForImport(ctx, c.keyID, hsm.RSA2048, hsm.OAEPSHA1)
			if err == nil {
				_, err = r.ImportKeyMaterial(ctx, input(t, params, c.material))
			}
			return err
		}},
		"import":          {before: fresh, run: imports, done: enabled},
		"import it again": {before: customers, run: imports, done: enabled},
		"encrypt, a hit":  {before: same, run: encrypts, done: enabled},
		"encrypt, a miss": {before: cold, run: encrypts, done: enabled},
		"decrypt, a hit":  {before: same, run: decrypts, done: enabled},
		"decrypt, a miss": {before: cold, run: decrypts, done: enabled},
		"make a data key": {before: same, reads: true, run: func(_ *testing.T, c *customer) error {
			_, plain, err := r.GenerateDataKey(ctx, engine.DataKeyInput{KeyID: c.keyID})
			clear(plain.Plaintext)
			return err
		}},
		"delete material": {
			before: customers, done: func(t *testing.T, c *customer) bool { return !r.whole(t, c) },
			run: func(_ *testing.T, c *customer) error { return r.DeleteKeyMaterial(ctx, c.keyID) },
		},
		"sweep expired material": {
			before: func(t *testing.T) *customer {
				t.Helper()
				c := &customer{keyID: r.newKey(t, engine.AliyunAES256), material: randomBytes(32)}
				r.importUntil(t, c.keyID, c.material, r.clock.in(time.Second))
				c.blob = r.encrypt(t, c.keyID, "secret")
				r.clock.advance(time.Second)
				return c
			},
			run: func(t *testing.T, _ *customer) error { return unavailable(r.Sweep(ctx)) },
			done: func(t *testing.T, c *customer) bool {
				_, err := r.Encrypt(ctx, c.keyID, []byte("x"), nil)
				requireKind(t, engine.KeyPendingImport, err)
				row, err := r.store.Key(ctx, c.keyID)
				require.NoError(t, err)
				return len(row.Material) == 0
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if !slow {
				a.codes = 2
			}
			start := r.cases
			r.try(t, a)
			r.restart(t)
			require.Zero(t, r.material(t), "material leaks")
			t.Logf("%d cases", r.cases-start)
		})
	}
	r.noOrphans(t)
	t.Logf("%d cases", r.cases)
}

// unavailable is what a sweep's error means: it is no answer to a customer.
func unavailable(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", engine.Unavailable, err)
}

// noOrphans fails the test if, after a sweep, token and store do not have the
// same pairs, or the token anything else that was not there at first.
func (r *ruin) noOrphans(t *testing.T) {
	t.Helper()
	r.clock.advance(2 * time.Hour)
	require.NoError(t, r.Sweep(t.Context()))
	r.rest(t)
	pairs, err := r.cfg.Token.Pairs(t.Context(), r.instance)
	require.NoError(t, err)
	r.waitForAllPairs(t, len(pairs))
	own := 3 // vault, MAC key and the receipt key
	if r.cfg.Token.Usable(hsm.SM4) == nil {
		own++ // the SM4 vault
	}
	if r.cfg.Custody == hsm.Resident {
		own += r.enabledKeys(t)
	}
	keys := count(t, r.on, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY)) +
		count(t, r.on, pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	require.Equal(t, own+len(pairs), keys)
}

// The same of the pairs themselves: making them, destroying them, and starting.
func TestEveryCallOfPairsFails(t *testing.T) {
	softhsm.Once(t)
	r := newRuin(t)
	ctx := t.Context()
	one := newCustomer(t, r.house)
	same := func(*testing.T) *customer { return one }
	codes, step := 1, 4
	if os.Getenv("KEYFERRY_SLOW") != "" {
		codes, step = 2, 1
	}
	t.Run("start", func(t *testing.T) {
		r.try(t, act{before: same, reads: true, codes: codes, run: func(t *testing.T, _ *customer) error {
			require.NoError(t, r.Engine.Close())
			started, err := engine.New(ctx, r.cfg)
			if err == nil {
				r.Engine = started
			}
			return err
		}})
	})
	t.Run("destroy the pairs that are due", func(t *testing.T) {
		due := func() []store.Pair {
			rows, err := r.store.Pairs(ctx, r.clock.in(0), 100)
			require.NoError(t, err)
			return rows
		}
		r.try(t, act{
			codes: codes, step: step,
			before: func(t *testing.T) *customer {
				t.Helper()
				r.parameters(t, one.keyID)
				r.clock.advance(25 * time.Hour)
				require.NotEmpty(t, due())
				return one
			},
			run:  func(*testing.T, *customer) error { return unavailable(r.Sweep(ctx)) },
			done: func(*testing.T, *customer) bool { return len(due()) == 0 },
		})
	})
	r.noOrphans(t)
	t.Logf("%d cases", r.cases)
}
