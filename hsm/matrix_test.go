package hsm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// returnCodes are what a token that dies, or is sick for a moment, answers.
var returnCodes = []uint32{
	pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR,
	pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_FUNCTION_FAILED,
	pkcs11.CKR_USER_NOT_LOGGED_IN, pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_VENDOR_DEFINED | 7,
}

// matrix runs an operation once for each of its calls, for both kinds of fault
// and for each return code, and has the token counted from outside.
type matrix struct {
	*bench
	tap   *hsmtest.Tap
	p     *pkcs11.Ctx
	slot  uint
	watch pkcs11.SessionHandle // the observer's
	lost  int                  // sessions that C_OpenSession made and did not tell of
	cases int
}

func newMatrix(t *testing.T, change ...func(*hsm.Config)) *matrix {
	t.Helper()
	soft := softhsm.New(t, softhsm.WithKeys())
	m := &matrix{tap: hsmtest.On(t, soft.Module)}
	cfg := soft.Config()
	for _, f := range change {
		f(&cfg)
	}
	m.bench = &bench{soft: soft, token: open(t, cfg)}
	m.pair, m.pub = newPair(t, m.token, hsm.OAEPSHA1)
	m.p, m.slot = m.raw(t)
	m.observe(t)
	return m
}

// observe opens the session of the observer anew.
func (m *matrix) observe(t *testing.T) {
	t.Helper()
	var err error
	m.watch, err = m.p.OpenSession(m.slot, pkcs11.CKF_SERIAL_SESSION)
	require.NoError(t, err)
}

// objects counts objects by whether they are on the token, class and label, as
// a client sees them that is not ours.
func (m *matrix) objects(t *testing.T) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, o := range find(t, m.p, m.watch) {
		attrs, err := m.p.GetAttributeValue(m.watch, o, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, nil), pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil), pkcs11.NewAttribute(pkcs11.CKA_LABEL, nil),
		})
		require.NoError(t, err)
		out[fmt.Sprintf("on token %x, class %x, %q", attrs[0].Value, attrs[1].Value[:1], attrs[2].Value)]++
	}
	return out
}

// operation is one exported operation, from and to the same state.
type operation struct {
	run   func(ctx context.Context) error
	after func(t *testing.T, err error) // puts back what the operation did, whether or not it says so
	codes []uint32                      // nil: all
	step  int                           // every so many calls; 0: each
}

func (m *matrix) try(t *testing.T, op operation) {
	t.Helper()
	ctx := context.Background()
	settle := func(err error) {
		if op.after != nil {
			op.after(t, err)
		}
	}
	settle(op.run(ctx)) // opens sessions, and fills caches
	before := m.objects(t)
	m.tap.Reset()
	err := op.run(ctx)
	calls := m.tap.Sequence()
	settle(err)
	require.NoError(t, err)
	require.NotEmpty(t, calls)
	codes := returnCodes
	if op.codes != nil {
		codes = op.codes
	}
	most := 2 + 3 // keepers and pool
	for _, took := range []bool{false, true} {
		for _, rv := range codes {
			for n := 0; n < len(calls); n += max(op.step, 1) {
				fault := hsmtest.Fault{After: n, RV: rv, TookEffect: took}
				if calls[n] == "C_DestroyObject" && rv == pkcs11.CKR_OBJECT_HANDLE_INVALID && !took {
					continue // that it is gone nobody can tell from that it never was
				}
				what := fmt.Sprintf("call %d (%s), %v, took effect: %t", n, calls[n], pkcs11.Error(rv), took)
				hsm.ForgetFlapsForTest(m.token)
				m.tap.Reset()
				m.tap.Inject(fault)
				err := op.run(ctx)
				struck := m.tap.Heal()
				require.LessOrEqual(t, struck, 1, what)
				if took && struck == 1 && len(m.tap.Sequence()) > n && m.tap.Sequence()[n] == "C_OpenSession" {
					m.lost++
				}
				if err != nil && !errors.Is(err, hsm.ErrUnavailable) && !errors.Is(err, hsm.ErrKeyLost) {
					require.NoError(t, err, what) // a token that failed once is nobody's fault
				}
				m.cases++
				settle(err)
				require.Eventually(t, func() bool { return m.tap.Sessions() <= most+m.lost }, waitFor, tick, "sessions leak: %s", what)
				require.Eventually(t, func() bool { return assert.ObjectsAreEqual(before, m.objects(t)) }, waitFor, tick, "objects leak: %s", what)
			}
		}
	}
}

// Whichever call of whatever operation fails, and whether or not it took
// effect: the operation succeeds or is unavailable, and the token holds the
// same objects and sessions as before.
func TestEveryCallOfEveryOperationFails(t *testing.T) {
	softhsm.Once(t)
	slow := os.Getenv("KEYFERRY_SLOW") != ""
	few := returnCodes[:3]
	m := newMatrix(t, func(c *hsm.Config) { c.Sessions = 3 })
	ctx := context.Background()
	req := m.request(m.wrap(t, random(32)))
	imported, err := m.token.Import(ctx, req)
	require.NoError(t, err)
	bad := req
	bad.Wrapped = slices.Clone(req.Wrapped)
	bad.Wrapped[9] ^= 1

	// A key that every run opens anew if the last one cost it its life.
	var key *hsm.Key
	opened := func() *hsm.Key {
		if key == nil {
			key, err = m.token.OpenMaterial(ctx, imported.Material)
			require.NoError(t, err)
		}
		return key
	}
	sealed, err := opened().Encrypt(ctx, nil, []byte("text"), nil)
	require.NoError(t, err)
	discard := func(t *testing.T, _ error) {
		t.Helper()
		if _, err := key.Encrypt(ctx, nil, []byte("text"), nil); errors.Is(err, hsm.ErrKeyLost) {
			require.NoError(t, key.Close())
			key = nil
		}
		opened()
	}
	known := m.pair.ID
	sweep := func(t *testing.T, _ error) { // as the engine's
		t.Helper()
		pairs, err := m.token.Pairs(ctx, instance)
		require.NoError(t, err)
		for _, p := range pairs {
			if p.ID != known {
				require.NoError(t, m.token.DestroyPair(ctx, p.ID))
			}
		}
	}
	doomed, _ := newPair(t, m.token, hsm.OAEPSHA1)
	operations := map[string]operation{
		"import": {run: func(ctx context.Context) error {
			out, err := m.token.Import(ctx, req)
			if err == nil {
				require.Equal(t, imported, out)
			}
			return err
		}},
		"import of a bad blob": {run: func(ctx context.Context) error {
			_, err := m.token.Import(ctx, bad)
			if errors.Is(err, hsm.ErrInvalidMaterial) {
				return nil
			}
			require.Error(t, err)
			return err
		}},
		"open and close": {run: func(ctx context.Context) error {
			key, err := m.token.OpenMaterial(ctx, imported.Material)
			if err != nil {
				return err
			}
			return key.Close()
		}, after: discard},
		"encrypt": {run: func(ctx context.Context) error {
			_, err := opened().Encrypt(ctx, nil, []byte("text"), nil)
			return err
		}, after: discard},
		"decrypt": {run: func(ctx context.Context) error {
			plain, err := opened().Decrypt(ctx, nil, sealed, nil)
			if err == nil {
				require.Equal(t, "text", string(plain))
			}
			return err
		}, after: discard},
		"decrypt a forgery": {run: func(ctx context.Context) error {
			_, err := opened().Decrypt(ctx, nil, sealed, []byte("other"))
			if errors.Is(err, hsm.ErrAuthentication) {
				return nil
			}
			require.Error(t, err)
			return err
		}, after: discard},
		"mac":    {run: func(ctx context.Context) error { _, err := m.token.MAC(ctx, "test"); return err }},
		"random": {run: func(ctx context.Context) error { _, err := m.token.Random(ctx, 16); return err }},
		"list pairs": {run: func(ctx context.Context) error {
			list, err := m.token.Pairs(ctx, instance)
			if err == nil {
				require.Len(t, list, 2)
			}
			return err
		}},
		"find a pair": {run: func(ctx context.Context) error {
			hsm.ForgetPairsForTest(m.token)
			info, err := m.token.Pair(ctx, m.pair.ID)
			if err == nil {
				require.Equal(t, m.pair, info)
			}
			return err
		}},
	}
	for name, op := range operations {
		t.Run(name, func(t *testing.T) {
			if !slow && len(returnCodes) > 6 {
				op.codes = returnCodes[:6]
			}
			m.try(t, op)
		})
	}
	require.NoError(t, m.token.DestroyPair(ctx, doomed.ID))
	t.Run("generate and destroy a pair", func(t *testing.T) {
		op := operation{codes: few[:1], after: sweep, run: func(ctx context.Context) error {
			info, err := m.token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
			if err != nil {
				return err
			}
			return m.token.DestroyPair(ctx, info.ID)
		}}
		if !slow {
			op.step = 7
		}
		m.try(t, op)
	})
	t.Run("come back", func(t *testing.T) {
		op := operation{codes: few, run: func(ctx context.Context) error {
			hsm.LoseForTest(m.token)
			_, err := m.token.MAC(ctx, "test")
			return err
		}}
		if !slow {
			op.codes, op.step = few[:1], 5
		}
		m.try(t, op)
	})
	m.works(t)
	t.Logf("%d cases", m.cases)
}

// Whichever call of Open fails, it leaves no session and no object, and the
// next one succeeds.
func TestEveryCallOfOpenFails(t *testing.T) {
	softhsm.Once(t)
	m := newMatrix(t)
	require.NoError(t, m.token.Close())
	step := 12
	if os.Getenv("KEYFERRY_SLOW") != "" {
		step = 1
	}
	m.tap.Reset()
	token := open(t, m.soft.Config())
	calls := m.tap.Sequence()
	require.NoError(t, token.Close())
	before := m.objects(t)
	for n := 0; n < len(calls); n += step {
		fault := hsmtest.Fault{After: n, RV: returnCodes[n%len(returnCodes)], TookEffect: n%2 == 1}
		m.tap.Inject(fault)
		token, err := hsm.Open(context.Background(), m.soft.Config())
		m.tap.Heal()
		if err == nil {
			require.NoError(t, token.Close())
		}
		if fault.TookEffect && calls[n] == "C_OpenSession" {
			m.lost++
		}
		require.Equal(t, m.lost, m.tap.Sessions(), "call %d (%s)", n, calls[n])
		require.Equal(t, before, m.objects(t), "call %d (%s)", n, calls[n])
		m.cases++
	}
	m.token = open(t, m.soft.Config())
	m.works(t)
	t.Logf("%d cases of %d calls", m.cases, len(calls))
}
