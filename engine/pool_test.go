package engine_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// Fresh pairs up to the bound; then the newest is shared for half an hour;
// then one more is fresh, and shared in its turn.
func TestPairsAreSharedBeyondTheBound(t *testing.T) {
	h := newHouse(t, withPairs(2))
	keyID := h.newKey(t, engine.AliyunAES256)
	next := func() hsm.Fingerprint { return sha256.Sum256(h.parameters(t, keyID).PublicKey) }

	first := next()
	h.clock.advance(time.Second)
	second := next()
	require.NotEqual(t, first, second)
	require.Equal(t, second, next())
	h.clock.advance(30 * time.Minute)
	require.Equal(t, second, next(), "bound half an hour ago")
	h.clock.advance(time.Second)
	third := next()
	require.NotContains(t, []hsm.Fingerprint{first, second}, third)
	require.Equal(t, third, next())
	h.clock.advance(30*time.Minute + time.Second)
	answers := make([]hsm.Fingerprint, 4)
	for _, err := range inParallel(len(answers), func(i int) error {
		answers[i] = next()
		return nil
	}) {
		require.NoError(t, err)
	}
	for _, answer := range answers {
		require.NotContains(t, []hsm.Fingerprint{first, second, third}, answer)
		require.Equal(t, answers[0], answer, "one goes beyond the bound and is shared by all who came at once")
	}
}

// A shared pair does not mix up those who share it.
func TestSharedPair(t *testing.T) {
	h := newHouse(t)
	one, two := h.newKey(t, engine.AliyunAES256), h.newKey(t, engine.AliyunAES256)
	a, b := h.parameters(t, one), h.parameters(t, two)
	require.Equal(t, a.PublicKey, b.PublicKey)
	require.NotEqual(t, a.ImportToken, b.ImportToken)
	material := randomBytes(32)
	in := input(t, a, material)
	in.KeyID = two
	_, err := h.ImportKeyMaterial(t.Context(), in)
	requireKind(t, engine.InvalidImportToken, err)

	bad := input(t, a, material)
	bad.EncryptedKeyMaterial[7] ^= 1
	for range 100 {
		_, err := h.ImportKeyMaterial(t.Context(), bad)
		require.Equal(t, refused, err)
	}
	_, err = h.ImportKeyMaterial(t.Context(), input(t, a, material))
	requireKind(t, engine.InvalidImportToken, err)
	_, err = h.ImportKeyMaterial(t.Context(), input(t, b, material))
	require.NoError(t, err, "one customer does not lock out another")
}

// PKCS#1 v1.5 pairs are never shared, and never exceed the bound.
func TestPKCS1v15PairsAreNotShared(t *testing.T) {
	h := newHouse(t, withToken(pkcs1Token()), withPairs(2))
	keyID := h.newKey(t, engine.AliyunAES256)
	first := h.parametersV15(t, keyID)
	second := h.parametersV15(t, keyID)
	require.NotEqual(t, first.PublicKey, second.PublicKey)
	for range 2 {
		_, err := h.GetParametersForImport(t.Context(), keyID, hsm.RSA2048, hsm.PKCS1v15)
		require.NotEmpty(t, requireKind(t, engine.LimitExceeded, err).Hint)
		h.clock.advance(time.Hour)
	}
	h.clock.advance(22 * time.Hour)
	h.parametersV15(t, keyID)
}

func TestPairsAreDestroyedWhenTheirTokensExpire(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	first := h.parameters(t, keyID)
	h.waitForPairs(t, 1)
	h.clock.advance(10 * time.Minute)
	second := h.parameters(t, keyID)
	require.Equal(t, first.PublicKey, second.PublicKey)

	h.clock.advance(24*time.Hour - time.Second)
	require.NoError(t, h.Sweep(t.Context()))
	h.waitForPairs(t, 1)
	_, err := h.ImportKeyMaterial(t.Context(), input(t, second, randomBytes(32)))
	require.NoError(t, err, "a pair lives as long as the last token bound to it")
	h.clock.advance(time.Second)
	require.NoError(t, h.Sweep(t.Context()))
	h.waitForPairs(t, 0)
}

// waitForPairs waits until so many pairs are outstanding, and one is ready of
// each kind that the token offers.
func (h *house) waitForPairs(tb testing.TB, outstanding int) {
	tb.Helper()
	h.waitForAllPairs(tb, outstanding+len(h.Algorithms()))
}

// waitForAllPairs waits until token and store hold the same n pairs.
func (h *house) waitForAllPairs(tb testing.TB, n int) {
	tb.Helper()
	require.EventuallyWithT(tb, func(c *assert.CollectT) {
		inToken, err := h.cfg.Token.Pairs(tb.Context(), h.instance)
		require.NoError(c, err)
		inStore, err := h.store.Pairs(tb.Context(), time.Time{}, 0)
		require.NoError(c, err)
		var a, b [][16]byte
		for _, pair := range inToken {
			a = append(a, pair.ID)
		}
		for _, pair := range inStore {
			b = append(b, pair.ID)
		}
		require.ElementsMatch(c, a, b)
		require.Len(c, a, n)
	}, time.Minute, 10*time.Millisecond)
}

// rest waits until the engine has its pairs and does nothing of its own accord.
func (h *house) rest(tb testing.TB) {
	tb.Helper()
	require.Eventually(tb, func() bool {
		counts, err := h.store.PairCounts(tb.Context(), h.clock.in(0))
		require.NoError(tb, err)
		ready := 0
		for _, c := range counts {
			ready += min(c.Ready, 1)
		}
		return ready == len(h.Algorithms())
	}, time.Minute, time.Millisecond)
}

// Requests that find the pool dry wait for the generator.
func TestDryPool(t *testing.T) {
	h := newHouse(t, withPairs(4))
	keyID := h.newKey(t, engine.AliyunAES256)
	seen := make(map[string]bool)
	answers := make([]string, 4)
	inParallel(4, func(i int) error {
		answers[i] = string(h.parameters(t, keyID).PublicKey)
		return nil
	})
	for _, answer := range answers {
		seen[answer] = true
	}
	require.Len(t, seen, 4)
}

// A generator that fails leaves nothing in the token, and those who wait do so
// no longer than their context.
func TestGeneratorFails(t *testing.T) {
	log, logger := newLog()
	h := newHouse(t, with(func(c *engine.Config) { c.Logger = logger }), withStore(func(s store.Store) store.Store {
		return &faultyStore{Store: s, addPair: func() error { return errors.New("no row for the pair") }}
	}))
	keyID := h.newKey(t, engine.AliyunAES256)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := h.GetParametersForImport(ctx, keyID, hsm.RSA2048, hsm.OAEPSHA1)
		done <- err
	}()
	require.Eventually(t, func() bool { return len(log.String()) > 0 }, time.Minute, time.Millisecond)
	h.waitForAllPairs(t, 0)
	require.Contains(t, log.String(), "no row for the pair")
	cancel()
	err := <-done
	requireKind(t, engine.Unavailable, err)
	require.ErrorIs(t, err, context.Canceled)
}

// Close does not leave anybody waiting.
func TestCloseWhileWaitingForAPair(t *testing.T) {
	h := newHouse(t, withStore(func(s store.Store) store.Store {
		return &faultyStore{Store: s, addPair: func() error { return errors.New("no row for the pair") }}
	}))
	keyID := h.newKey(t, engine.AliyunAES256)
	done := make(chan error)
	go func() {
		_, err := h.GetParametersForImport(context.Background(), keyID, hsm.RSA2048, hsm.OAEPSHA1)
		done <- err
	}()
	require.NoError(t, h.Engine.Close())
	requireKind(t, engine.Unavailable, <-done)
}

// What a crash left behind is cleared away at the next start.
func TestStartClearsAway(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	h.waitForPairs(t, 1)
	inStore, err := h.store.Pairs(t.Context(), time.Time{}, 0)
	require.NoError(t, err)

	// A pair without a row, of ours and of someone else.
	orphan, err := h.cfg.Token.GeneratePair(t.Context(), h.instance, h.clock.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	stranger, err := h.cfg.Token.GeneratePair(t.Context(), "0123456789abcdef", time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	// A row without a pair: the ready one's.
	for i := range inStore {
		if inStore[i].BoundAt.IsZero() {
			require.NoError(t, h.cfg.Token.DestroyPair(t.Context(), inStore[i].ID))
		}
	}
	// As young as it is it may be another node's, which is adding its row.
	h.reopen(t)
	_, err = h.cfg.Token.Pair(t.Context(), orphan.ID)
	require.NoError(t, err)
	h.clock.advance(10 * time.Minute)
	h.reopen(t)
	h.waitForPairs(t, 1)
	inToken, err := h.cfg.Token.Pairs(t.Context(), h.instance)
	require.NoError(t, err)
	for _, pair := range inToken {
		require.NotEqual(t, orphan.ID, pair.ID)
	}
	_, err = h.cfg.Token.Pair(t.Context(), stranger.ID)
	require.NoError(t, err)
	require.NoError(t, h.cfg.Token.DestroyPair(t.Context(), stranger.ID))
	_, err = h.ImportKeyMaterial(t.Context(), input(t, params, randomBytes(32)))
	require.NoError(t, err, "what was outstanding is good still")
}

// Ready pairs of an algorithm that was switched off are destroyed; what is
// outstanding is refused by name.
func TestAlgorithmSwitchedOff(t *testing.T) {
	made := softhsm.New(t, softhsm.WithKeys())
	open := func(pkcs1 bool) *hsm.Token {
		cfg := made.Config()
		cfg.AllowPKCS1v15 = pkcs1
		token, err := hsm.Open(t.Context(), cfg)
		require.NoError(t, err)
		return token
	}
	before := open(true)
	var h *house
	t.Cleanup(func() { require.NoError(t, h.cfg.Token.Close()) })
	h = newHouse(t, withToken(before))
	require.Contains(t, h.Algorithms(), engine.WrappingOffer{Spec: hsm.RSA2048, Algorithm: hsm.PKCS1v15})
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parametersV15(t, keyID)
	h.waitForPairs(t, 1)

	h.shut(t)
	require.NoError(t, before.Close())
	h.cfg.Token = open(false)
	h.open(t)
	require.NoError(t, h.Sweep(t.Context()))
	h.waitForPairs(t, 1)
	_, err := h.GetParametersForImport(t.Context(), keyID, hsm.RSA2048, hsm.PKCS1v15)
	e := requireKind(t, engine.InvalidParameter, err)
	require.Equal(t, "WrappingAlgorithm", e.Parameter)
	require.Contains(t, e.Hint, "RSAES_PKCS1_V1_5")
	_, err = h.ImportKeyMaterial(t.Context(), inputFor(t, params, hsm.PKCS1v15, randomBytes(32)))
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "RSAES_PKCS1_V1_5")
}

// Pairs that go missing from the token while the engine runs cost the customer
// a new set of parameters, not an error that he cannot understand.
func TestPairsGoMissing(t *testing.T) {
	softhsm.Once(t)
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	h.waitForPairs(t, 1)
	inStore, err := h.store.Pairs(t.Context(), time.Time{}, 0)
	require.NoError(t, err)
	for i := range inStore {
		if !inStore[i].BoundAt.IsZero() {
			require.NoError(t, h.cfg.Token.DestroyPair(t.Context(), inStore[i].ID))
		}
	}
	_, err = h.ImportKeyMaterial(t.Context(), input(t, params, randomBytes(32)))
	requireKind(t, engine.InvalidImportToken, err)
	h.importInto(t, keyID, randomBytes(32))
}

// A pair whose row names another key is not answered.
func TestPairWithAnotherFingerprint(t *testing.T) {
	h := newHouse(t)
	h.waitForPairs(t, 0)
	h.exec(t, "UPDATE pair SET fingerprint = ?", randomBytes(32))
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	_, err := h.ImportKeyMaterial(t.Context(), input(t, params, randomBytes(32)))
	require.NoError(t, err)
}

func TestParametersRefused(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	require.Equal(t, []engine.WrappingOffer{{Spec: hsm.RSA2048, Algorithm: hsm.OAEPSHA1}}, h.Algorithms()[:1])
	for _, test := range []struct {
		spec      hsm.PairSpec
		alg       hsm.Algorithm
		kind      engine.Kind
		parameter string
	}{
		{"", hsm.OAEPSHA1, engine.MissingParameter, "WrappingKeySpec"},
		{hsm.RSA2048, "", engine.MissingParameter, "WrappingAlgorithm"},
		{"RSA_1024", hsm.OAEPSHA1, engine.InvalidParameter, "WrappingKeySpec"},
		{hsm.RSA4096, hsm.OAEPSHA1, engine.InvalidParameter, "WrappingKeySpec"}, // not configured
		{hsm.RSA2048, "RSAES_OAEP_MD5", engine.InvalidParameter, "WrappingAlgorithm"},
		{hsm.RSA2048, hsm.PKCS1v15, engine.InvalidParameter, "WrappingAlgorithm"}, // switched off
		{hsm.RSA2048, hsm.SM2PKE, engine.InvalidParameter, "WrappingAlgorithm"},
	} {
		_, err := h.GetParametersForImport(t.Context(), keyID, test.spec, test.alg)
		e := requireKind(t, test.kind, err)
		require.Equal(t, test.parameter, e.Parameter)
		if e.Kind == engine.InvalidParameter {
			require.Contains(t, e.Hint, "offers RSAES_OAEP_SHA_1 with RSA_2048", "a pair that is there")
		}
	}
}

// Larger pairs, where they are configured.
func TestLargerPairs(t *testing.T) {
	h := newHouse(t, with(func(c *engine.Config) { c.PairSpecs = []hsm.PairSpec{hsm.RSA3072} }))
	keyID := h.newKey(t, engine.AliyunAES256)
	params, err := h.GetParametersForImport(t.Context(), keyID, hsm.RSA3072, hsm.OAEPSHA1)
	require.NoError(t, err)
	require.Equal(t, 3072, publicKey(t, params.PublicKey).N.BitLen())
	_, err = h.ImportKeyMaterial(t.Context(), input(t, params, randomBytes(32)))
	require.NoError(t, err)
}
