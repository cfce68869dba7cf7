package engine_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// An import token works until its last second, any number of times, and then
// never again.
func TestImportTokenExpires(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	require.Equal(t, h.clock.in(24*time.Hour), params.ExpiresAt)
	material := randomBytes(32)
	use := func() error {
		_, err := h.ImportKeyMaterial(t.Context(), input(t, params, material))
		return err
	}
	require.NoError(t, use())
	require.NoError(t, use())
	h.clock.advance(24*time.Hour - time.Second)
	require.NoError(t, use())
	h.clock.advance(time.Second)
	requireKind(t, engine.ExpiredImportToken, use())
	require.NoError(t, h.Sweep(t.Context()))
	requireKind(t, engine.ExpiredImportToken, use())
}

func TestImportTokenOfAnotherKey(t *testing.T) {
	h := newHouse(t)
	one, two := h.newKey(t, engine.AliyunAES256), h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, one)
	in := input(t, params, randomBytes(32))
	in.KeyID = two
	_, err := h.ImportKeyMaterial(t.Context(), in)
	requireKind(t, engine.InvalidImportToken, err)
	require.Equal(t, engine.PendingImport, h.describe(t, two).State)
}

func TestImportTokenDamaged(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	in := input(t, params, randomBytes(32))
	try := func(token []byte) error {
		in.ImportToken = token
		_, err := h.ImportKeyMaterial(t.Context(), in)
		return err
	}
	for i := range params.ImportToken {
		damaged := bytes.Clone(params.ImportToken)
		damaged[i] ^= 1
		requireKind(t, engine.InvalidImportToken, try(damaged))
		if i > 0 {
			requireKind(t, engine.InvalidImportToken, try(params.ImportToken[:i]))
		}
	}
	requireKind(t, engine.InvalidImportToken, try(append(bytes.Clone(params.ImportToken), 0)))
	requireKind(t, engine.InvalidImportToken, try(randomBytes(len(params.ImportToken))))
	requireKind(t, engine.InvalidImportToken, try(randomBytes(1<<16)))
	require.Equal(t, "ImportToken", requireKind(t, engine.MissingParameter, try(nil)).Parameter)
	require.Equal(t, engine.PendingImport, h.describe(t, keyID).State)
	require.NoError(t, try(params.ImportToken), "none of that was counted as a failure")
}

// Whoever has the PIN can make the MAC of an import token. The store has not
// heard of what it says.
func TestImportTokenForgedWithThePIN(t *testing.T) {
	h := newHouse(t, withToken(pkcs1Token()))
	victim, thiefs := h.newKey(t, engine.AliyunAES256), h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, victim)
	captured := input(t, params, randomBytes(32))
	other := h.parametersV15(t, thiefs)
	var pair engine.Forgery
	_, err := h.Forge(t.Context(), other.ImportToken, func(f *engine.Forgery) { pair = *f })
	require.NoError(t, err)

	for name, change := range map[string]func(*engine.Forgery){
		"for another CMK":       func(f *engine.Forgery) { f.KeyID = thiefs },
		"with another token id": func(f *engine.Forgery) { f.ID = [16]byte(randomBytes(16)) },
		"with no token id":      func(f *engine.Forgery) { f.ID = [16]byte{} },
		"with another's id":     func(f *engine.Forgery) { f.ID = pair.ID },
		"for another pair":      func(f *engine.Forgery) { f.Pair, f.Print = pair.Pair, pair.Print },
		"with another pair id":  func(f *engine.Forgery) { f.Pair = pair.Pair },
		"with another print":    func(f *engine.Forgery) { f.Print = pair.Print },
		"for another algorithm": func(f *engine.Forgery) { f.Algorithm = hsm.PKCS1v15 },
		"for another spec":      func(f *engine.Forgery) { f.Spec = hsm.RSA4096 },
		"with a longer life":    func(f *engine.Forgery) { f.Expires = f.Expires.Add(time.Second) },
		"with another issue":    func(f *engine.Forgery) { f.Issued = f.Issued.Add(time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			in := captured
			var err error
			in.ImportToken, err = h.Forge(t.Context(), params.ImportToken, func(f *engine.Forgery) {
				change(f)
				in.KeyID = f.KeyID
			})
			require.NoError(t, err)
			_, err = h.ImportKeyMaterial(t.Context(), in)
			requireKind(t, engine.InvalidImportToken, err)
		})
	}
	require.Equal(t, engine.PendingImport, h.describe(t, thiefs).State)

	same, err := h.Forge(t.Context(), params.ImportToken, func(*engine.Forgery) {})
	require.NoError(t, err)
	require.Equal(t, params.ImportToken, same, "the forger forges well")
	_, err = h.ImportKeyMaterial(t.Context(), captured)
	require.NoError(t, err)
}
