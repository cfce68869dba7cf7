package engine_test

import (
	"context"
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

// A use that waited past the expiry answers nothing, whatever it decrypted.
func TestExpiryWhileInUse(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	h.importUntil(t, keyID, randomBytes(32), h.clock.in(time.Minute))
	blob := h.encrypt(t, keyID, "secret")
	tap := hsmtest.On(t, module(t))
	tap.Hold("C_Decrypt", func() { h.clock.advance(time.Minute) })
	out, err := h.Decrypt(t.Context(), blob, nil)
	require.ErrorIs(t, err, engine.KeyPendingImport)
	require.Empty(t, out)
}

// The failure budget is this process's too: setting the store's count back
// gives nobody more tries.
func TestFailuresSetBack(t *testing.T) {
	h := newHouse(t, with(func(c *engine.Config) { c.FailureBudget = 3 }))
	in := input(t, h.parameters(t, h.newKey(t, engine.AliyunAES256)), randomBytes(16))
	for range 3 {
		h.exec(t, "UPDATE import_token SET failures = 0")
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.ErrorIs(t, err, engine.InvalidKeyMaterial)
	}
	h.exec(t, "UPDATE import_token SET failures = 0")
	_, err := h.ImportKeyMaterial(t.Context(), in)
	require.ErrorIs(t, err, engine.InvalidImportToken)
	h.exec(t, "UPDATE import_token SET failures = -1000000")
	h.reopen(t)
	_, err = h.ImportKeyMaterial(t.Context(), in)
	require.ErrorIs(t, err, engine.InvalidImportToken, "there is no less than none")
}

// uncounting is a store that cannot count failures while broken.
type uncounting struct {
	store.Store
	broken *bool
}

func (s *uncounting) CountFailure(ctx context.Context, id [16]byte) (int, error) {
	if *s.broken {
		return 0, store.ErrUnavailable
	}
	return s.Store.CountFailure(ctx, id)
}

// A refusal that cannot be counted durably is counted all the same, and comes
// no sooner.
func TestRefusalThatCannotBeCounted(t *testing.T) {
	const floor = 50 * time.Millisecond
	broken := false
	h := newHouse(t, withStore(func(s store.Store) store.Store { return &uncounting{s, &broken} }),
		with(func(c *engine.Config) { c.FailureBudget, c.FailureFloor = 2, floor }))
	in := input(t, h.parameters(t, h.newKey(t, engine.AliyunAES256)), randomBytes(16))
	broken = true
	for range 2 {
		start := time.Now()
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.ErrorIs(t, err, engine.Unavailable)
		require.GreaterOrEqual(t, time.Since(start), floor)
	}
	broken = false
	_, err := h.ImportKeyMaterial(t.Context(), in)
	require.ErrorIs(t, err, engine.InvalidImportToken)
}

func TestHealthAsksTheDatabase(t *testing.T) {
	h := newHouse(t)
	require.NoError(t, h.Health(t.Context()))
	require.NoError(t, h.store.Close())
	require.ErrorIs(t, h.Health(t.Context()), engine.Unavailable)
	require.NoError(t, h.Engine.Close())
	h.open(t)
}

// Rows of pairs carry no MAC. Whoever makes them last for ever keeps no pair
// alive: the token's own label says how old it is.
func TestPairsDoNotOutliveTheirAge(t *testing.T) {
	softhsm.Once(t)
	h := newHouse(t)
	h.parameters(t, h.newKey(t, engine.AliyunAES256))
	h.waitForPairs(t, 1)
	before, err := h.cfg.Token.Pairs(t.Context(), h.instance)
	require.NoError(t, err)
	h.exec(t, "UPDATE pair SET expires_at = 99999999999, created_at = 99999999999, bound_at = 99999999999")
	h.clock.advance(9 * 24 * time.Hour)
	require.NoError(t, h.Sweep(t.Context()))
	for _, pair := range before {
		_, err := h.cfg.Token.Pair(t.Context(), pair.ID)
		require.ErrorIs(t, err, hsm.ErrPairNotFound)
	}
}

// A pair that cannot be destroyed saves no other from it, and no engine from
// starting.
func TestPairThatCannotBeDestroyed(t *testing.T) {
	softhsm.Once(t)
	h := newHouse(t, withPairs(3))
	keyID := h.newKey(t, engine.AliyunAES256)
	for range 3 {
		h.parameters(t, keyID)
		h.clock.advance(time.Minute)
	}
	h.waitForPairs(t, 3)
	tap := hsmtest.On(t, module(t))
	h.clock.advance(24 * time.Hour)
	tap.Inject(hsmtest.Fault{Call: "C_DestroyObject", RV: pkcs11.CKR_ACTION_PROHIBITED})
	require.ErrorIs(t, h.Sweep(t.Context()), hsm.ErrUnavailable)
	require.Equal(t, 1, tap.Heal())
	h.waitForPairs(t, 1)

	orphan, err := h.cfg.Token.GeneratePair(t.Context(), h.instance, h.clock.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	h.clock.advance(time.Hour)
	tap.Inject(hsmtest.Fault{Call: "C_DestroyObject", RV: pkcs11.CKR_ACTION_PROHIBITED, Times: -1})
	h.reopen(t)
	tap.Heal()
	_, err = h.cfg.Token.Pair(t.Context(), orphan.ID)
	require.NoError(t, err)
	h.clock.advance(time.Hour)
	require.NoError(t, h.Sweep(t.Context()))
	_, err = h.cfg.Token.Pair(t.Context(), orphan.ID)
	require.ErrorIs(t, err, hsm.ErrPairNotFound)
}
