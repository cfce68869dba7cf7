package engine_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
)

// importUntil imports material that expires.
func (h *house) importUntil(tb testing.TB, keyID string, material []byte, at time.Time) {
	tb.Helper()
	in := h.input(tb, h.parameters(tb, keyID), material)
	in.ExpireAt = at
	key, err := h.ImportKeyMaterial(tb.Context(), in)
	require.NoError(tb, err)
	require.Equal(tb, at, key.ExpireAt)
}

// Material stops working in the second it expires, whether it is open in the
// cache or not and before any sweep; the same material brings old ciphertexts
// back, and no other is taken.
func TestExpiry(t *testing.T) { onEveryRoute(t, testExpiry) }

func testExpiry(t *testing.T, h *house) {
	h.needUse(t)
	cached, cold := h.newKey(t, h.route.spec), h.newKey(t, h.route.spec)
	material := h.route.material()
	at := h.clock.in(time.Minute)
	h.importUntil(t, cached, material, at)
	h.importUntil(t, cold, material, at)
	h.clock.advance(time.Minute - time.Second)
	blob := h.encrypt(t, cached, "kept")
	require.Equal(t, 1, h.OpenKeys())
	h.clock.advance(time.Second)

	expired := func() {
		for _, keyID := range []string{cached, cold} {
			_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
			requireKind(t, engine.KeyPendingImport, err)
			_, err = h.GenerateDataKeyWithoutPlaintext(t.Context(), engine.DataKeyInput{KeyID: keyID})
			requireKind(t, engine.KeyPendingImport, err)
			requireKind(t, engine.StateModified, h.DisableKey(t.Context(), keyID))
			key := h.describe(t, keyID)
			require.Equal(t, engine.PendingImport, key.State)
			require.Zero(t, key.ExpireAt)
			require.NotZero(t, key.MaterialID, "the identity stays")
		}
		_, err := h.Decrypt(t.Context(), blob, nil)
		requireKind(t, engine.KeyPendingImport, err)
		keys, _, err := h.ListKeys(t.Context(), engine.ListKeysInput{KeyIDs: []string{cached, cold}})
		require.NoError(t, err)
		for _, key := range keys {
			require.Equal(t, engine.PendingImport, key.State)
		}
	}
	expired()
	require.Zero(t, h.OpenKeys())

	stored := func(keyID string) []byte {
		row, err := h.store.Key(t.Context(), keyID)
		require.NoError(t, err)
		return row.Material
	}
	require.NotEmpty(t, stored(cold))
	require.NoError(t, h.Sweep(t.Context()))
	require.Empty(t, stored(cold), "the sweep destroys")
	require.Empty(t, stored(cached))
	expired()

	other := h.input(t, h.parameters(t, cached), h.route.material())
	_, err := h.ImportKeyMaterial(t.Context(), other)
	require.Equal(t, refused, err)
	expired()
	h.importInto(t, cached, material)
	h.requireDecrypts(t, blob, "kept")
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), cached))
}

// An import that comes between expiry and sweep wins, and the sweep leaves its
// material alone.
func TestImportBeforeTheSweep(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
	h.importUntil(t, keyID, material, h.clock.in(time.Second))
	blob := h.encrypt(t, keyID, "kept")
	h.clock.advance(time.Second)
	h.importInto(t, keyID, material)
	require.NoError(t, h.Sweep(t.Context()))
	h.requireDecrypts(t, blob, "kept")
	require.Zero(t, h.describe(t, keyID).ExpireAt)
}

// The same material again gives an unexpired CMK another expiry, earlier or
// later, also where the old one is cached.
func TestExpiryIsReset(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
	h.importUntil(t, keyID, material, h.clock.in(time.Minute))
	blob := h.encrypt(t, keyID, "kept")
	h.importUntil(t, keyID, material, h.clock.in(time.Hour))
	h.clock.advance(time.Minute)
	h.requireDecrypts(t, blob, "kept")
	h.importUntil(t, keyID, material, h.clock.in(time.Second))
	h.clock.advance(time.Second)
	_, err := h.Decrypt(t.Context(), blob, nil)
	requireKind(t, engine.KeyPendingImport, err)
}

// What expiry makes of the other states; after the re-import the CMK is
// enabled, as the API has it even for one that was disabled before.
func TestExpiryInOtherStates(t *testing.T) {
	h := newHouse(t)
	for _, sweep := range []bool{false, true} {
		disabled, deleting := h.newKey(t, engine.AliyunAES256), h.newKey(t, engine.AliyunAES256)
		material := randomBytes(32)
		h.importUntil(t, disabled, material, h.clock.in(time.Minute))
		h.importUntil(t, deleting, material, h.clock.in(time.Minute))
		require.NoError(t, h.DisableKey(t.Context(), disabled))
		require.NoError(t, h.ScheduleKeyDeletion(t.Context(), deleting, 7))
		h.clock.advance(time.Minute)
		if sweep {
			require.NoError(t, h.Sweep(t.Context()))
		}
		require.Equal(t, engine.PendingImport, h.describe(t, disabled).State)
		require.Equal(t, engine.PendingDeletion, h.describe(t, deleting).State)
		require.Zero(t, h.describe(t, deleting).ExpireAt)
		require.NoError(t, h.CancelKeyDeletion(t.Context(), deleting))
		require.Equal(t, engine.PendingImport, h.describe(t, deleting).State)

		for _, keyID := range []string{disabled, deleting} {
			require.Equal(t, engine.Enabled, h.importInto(t, keyID, material).State)
		}
	}
}

// A sweep of many, and before them more than one read returns that it must
// leave alone.
func TestSweepOfMany(t *testing.T) {
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }))
	spoilt := make(map[string]bool)
	for i := range 250 {
		keyID := h.newKey(t, engine.AliyunAES256)
		row, err := h.store.Key(t.Context(), keyID)
		require.NoError(t, err)
		row.Revision++
		row.State, row.Material, row.ExpireAt = string(engine.Enabled), []byte("blob"), h.clock.in(time.Minute)
		if spoilt[keyID] = i%2 == 0; spoilt[keyID] {
			row.ExpireAt = h.clock.in(time.Second)
		}
		require.NoError(t, h.SealRow(t.Context(), &row))
		if spoilt[keyID] {
			row.Description = "changed"
		}
		require.NoError(t, h.store.UpdateKey(t.Context(), store.Update{Key: row}))
	}
	h.clock.advance(time.Minute)
	for range 3 {
		require.NoError(t, h.Sweep(t.Context()))
	}
	require.Equal(t, 125, strings.Count(log.String(), "changed by someone else"), "once each")
	left, err := h.store.DueKeys(t.Context(), h.clock.Now(), 1000)
	require.NoError(t, err)
	require.Len(t, left, 125)
	for i := range left {
		require.True(t, spoilt[left[i].KeyID])
	}
}

// The ticker sweeps too.
func TestSweepByItself(t *testing.T) {
	h := newHouse(t, with(func(c *engine.Config) { c.ManualSweep, c.SweepInterval = false, time.Millisecond }))
	keyID := h.newKey(t, engine.AliyunAES256)
	h.importUntil(t, keyID, randomBytes(32), h.clock.in(time.Second))
	h.clock.advance(time.Second)
	require.Eventually(t, func() bool {
		row, err := h.store.Key(t.Context(), keyID)
		return err == nil && row.Material == nil
	}, time.Minute, time.Millisecond)
}
