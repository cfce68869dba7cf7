package engine_test

import (
	"bytes"
	"maps"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

func TestEncryptAndDecrypt(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	key := h.describe(t, keyID)
	context := map[string]string{"purpose": "test", "": "empty name", "empty value": ""}
	for _, n := range []int{1, 15, 16, 17, 64, engine.MaxPlaintext} {
		plaintext := randomBytes(n)
		sealed, err := h.Encrypt(t.Context(), keyID, plaintext, context)
		require.NoError(t, err)
		require.Equal(t, []string{keyID, key.KeyVersionID}, []string{sealed.KeyID, sealed.KeyVersionID})
		require.Len(t, sealed.Blob, 36+12+n+16)
		require.Equal(t, key.KeyVersionID, string(sealed.Blob[:36]))

		opened, err := h.Decrypt(t.Context(), sealed.Blob, maps.Clone(context))
		require.NoError(t, err)
		require.Equal(t, engine.Plaintext{KeyID: keyID, KeyVersionID: key.KeyVersionID, Plaintext: plaintext}, opened)
	}
	require.NotEqual(t, h.encrypt(t, keyID, "x"), h.encrypt(t, keyID, "x"), "every IV is fresh")
}

func TestEncryptRefuses(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	_, err := h.Encrypt(t.Context(), keyID, nil, nil)
	require.Equal(t, "Plaintext", requireKind(t, engine.MissingParameter, err).Parameter)
	_, err = h.Encrypt(t.Context(), keyID, make([]byte, engine.MaxPlaintext+1), nil)
	require.Equal(t, "Plaintext", requireKind(t, engine.InvalidParameter, err).Parameter)

	most := map[string]string{"name": strings.Repeat("v", engine.MaxEncryptionContext-4)}
	sealed, err := h.Encrypt(t.Context(), keyID, []byte("x"), most)
	require.NoError(t, err)
	_, err = h.Decrypt(t.Context(), sealed.Blob, most)
	require.NoError(t, err)
	most["n"] = ""
	_, err = h.Encrypt(t.Context(), keyID, []byte("x"), most)
	require.Equal(t, "EncryptionContext", requireKind(t, engine.InvalidParameter, err).Parameter)
	_, err = h.Decrypt(t.Context(), sealed.Blob, most)
	require.Equal(t, "EncryptionContext", requireKind(t, engine.InvalidParameter, err).Parameter)
}

func TestDataKeys(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	h.useAll(t, keyID)
	for parameter, in := range map[string]engine.DataKeyInput{
		"KeySpec":       {Spec: "AES_192"},
		"NumberOfBytes": {NumberOfBytes: engine.MaxDataKey + 1},
	} {
		in.KeyID = keyID
		_, _, err := h.GenerateDataKey(t.Context(), in)
		require.Equal(t, parameter, requireKind(t, engine.InvalidParameter, err).Parameter)
	}
	_, _, err := h.GenerateDataKey(t.Context(), engine.DataKeyInput{KeyID: keyID, NumberOfBytes: -1})
	requireKind(t, engine.InvalidParameter, err)
}

// useAll encrypts, makes data keys of every length, and decrypts them.
func (h *house) useAll(t *testing.T, keyID string) {
	t.Helper()
	h.requireDecrypts(t, h.encrypt(t, keyID, "some text"), "some text")
	context := map[string]string{"a": "b"}
	for _, test := range []struct {
		in  engine.DataKeyInput
		len int
	}{
		{engine.DataKeyInput{}, 32},
		{engine.DataKeyInput{Spec: "AES_256"}, 32},
		{engine.DataKeyInput{Spec: "AES_128"}, 16},
		{engine.DataKeyInput{NumberOfBytes: 1}, 1},
		{engine.DataKeyInput{NumberOfBytes: engine.MaxDataKey, Spec: "AES_128"}, engine.MaxDataKey},
	} {
		test.in.KeyID, test.in.Context = keyID, context
		sealed, key, err := h.GenerateDataKey(t.Context(), test.in)
		require.NoError(t, err)
		require.Len(t, key.Plaintext, test.len)
		opened, err := h.Decrypt(t.Context(), sealed.Blob, context)
		require.NoError(t, err)
		require.Equal(t, key, opened)

		sealed, err = h.GenerateDataKeyWithoutPlaintext(t.Context(), test.in)
		require.NoError(t, err)
		opened, err = h.Decrypt(t.Context(), sealed.Blob, context)
		require.NoError(t, err)
		require.Len(t, opened.Plaintext, test.len)
		if test.len >= 16 { // a shorter one may be zeros
			require.NotEqual(t, make([]byte, test.len), opened.Plaintext, "not the bytes that were wiped")
		}
	}
}

var invalidCiphertext error = &engine.Error{Kind: engine.InvalidCiphertext}

func TestDecryptHasOneAnswer(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	blob := h.encrypt(t, keyID, "secret")
	for i := range blob {
		damaged := bytes.Clone(blob)
		damaged[i] ^= 1
		_, err := h.Decrypt(t.Context(), damaged, nil)
		require.Equal(t, invalidCiphertext, err, "byte %d", i)
		_, err = h.Decrypt(t.Context(), blob[:i], nil)
		require.Equal(t, invalidCiphertext, err, "%d bytes", i)
	}
	for name, bad := range map[string][]byte{
		"none":            nil,
		"one byte more":   append(bytes.Clone(blob), 0),
		"unknown version": append([]byte("00000000-0000-4000-8000-000000000000"), blob[36:]...),
		"upper case":      append(bytes.ToUpper(blob[:36]), blob[36:]...),
		"key id":          append([]byte(keyID), blob[36:]...),
		"huge":            append(bytes.Clone(blob), make([]byte, 1<<20)...),
		"random":          randomBytes(len(blob)),
	} {
		_, err := h.Decrypt(t.Context(), bad, nil)
		require.Equal(t, invalidCiphertext, err, name)
	}
	_, err := h.Decrypt(t.Context(), blob, map[string]string{"a": ""})
	require.Equal(t, invalidCiphertext, err)
	_, err = h.Encrypt(t.Context(), string(blob[:36]), []byte("x"), nil)
	requireKind(t, engine.KeyNotFound, err) // a key version is no key
	h.requireDecrypts(t, blob, "secret")
}

// Between CMKs of every spec that the token can use, and within each.
func TestReEncrypt(t *testing.T) {
	h := newHouse(t)
	var keyIDs []string
	for _, spec := range []engine.KeySpec{engine.AliyunAES256, engine.AliyunSM4} {
		h.route.spec = spec
		keyID, _ := h.enabledKey(t)
		if spec == engine.AliyunSM4 && h.cfg.Token.Usable(hsm.SM4) != nil {
			_, err := h.ReEncrypt(t.Context(), engine.ReEncryptInput{Blob: h.encrypt(t, keyIDs[0], "x"), KeyID: keyID})
			require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "SM4")
			continue
		}
		other, _ := h.enabledKey(t)
		keyIDs = append(keyIDs, keyID, other)
	}
	sourceContext, context := map[string]string{"a": "b"}, map[string]string{"c": "d"}
	for _, source := range keyIDs {
		for _, keyID := range keyIDs {
			for _, n := range []int{1, 32, engine.MaxPlaintext} {
				plaintext := randomBytes(n)
				old, err := h.Encrypt(t.Context(), source, plaintext, sourceContext)
				require.NoError(t, err)
				blob := bytes.Clone(old.Blob)
				sealed, err := h.ReEncrypt(t.Context(), engine.ReEncryptInput{Blob: blob, SourceContext: sourceContext, KeyID: keyID, Context: context})
				require.NoError(t, err)
				require.Equal(t, old.Blob, blob)
				require.Equal(t, h.describe(t, keyID).KeyVersionID, sealed.KeyVersionID)
				require.Len(t, sealed.Blob, len(blob))

				opened, err := h.Decrypt(t.Context(), sealed.Blob, context)
				require.NoError(t, err)
				require.Equal(t, engine.Plaintext{KeyID: keyID, KeyVersionID: sealed.KeyVersionID, Plaintext: plaintext}, opened)
				_, err = h.Decrypt(t.Context(), sealed.Blob, sourceContext)
				require.Equal(t, invalidCiphertext, err)
			}
		}
	}
}

func TestReEncryptRefuses(t *testing.T) {
	h := newHouse(t)
	source, _ := h.enabledKey(t)
	keyID, _ := h.enabledKey(t)
	in := engine.ReEncryptInput{Blob: h.encrypt(t, source, "secret"), KeyID: keyID}
	long := map[string]string{"a": strings.Repeat("v", engine.MaxEncryptionContext)}
	for parameter, change := range map[string]func(*engine.ReEncryptInput){
		"DestinationKeyId":             func(in *engine.ReEncryptInput) { in.KeyID = "no key" },
		"SourceEncryptionContext":      func(in *engine.ReEncryptInput) { in.SourceContext = long },
		"DestinationEncryptionContext": func(in *engine.ReEncryptInput) { in.Context = long },
	} {
		bad := in
		change(&bad)
		_, err := h.ReEncrypt(t.Context(), bad)
		require.Equal(t, parameter, requireKind(t, engine.InvalidParameter, err).Parameter)
	}
	_, err := h.ReEncrypt(t.Context(), engine.ReEncryptInput{Blob: in.Blob})
	require.Equal(t, "DestinationKeyId", requireKind(t, engine.MissingParameter, err).Parameter)
	_, err = h.ReEncrypt(t.Context(), engine.ReEncryptInput{Blob: in.Blob, KeyID: "00000000-0000-4000-8000-000000000000"})
	requireKind(t, engine.KeyNotFound, err)

	// One answer to what does not decrypt, as Decrypt has it.
	for i := range in.Blob {
		damaged := in
		damaged.Blob = bytes.Clone(in.Blob)
		damaged.Blob[i] ^= 1
		_, err := h.ReEncrypt(t.Context(), damaged)
		require.Equal(t, invalidCiphertext, err, "byte %d", i)
	}
	wrong := in
	wrong.SourceContext = map[string]string{"a": ""}
	_, err = h.ReEncrypt(t.Context(), wrong)
	require.Equal(t, invalidCiphertext, err)

	// Either side must be of use, on its own.
	require.NoError(t, h.DisableKey(t.Context(), keyID))
	_, err = h.ReEncrypt(t.Context(), in)
	requireKind(t, engine.KeyDisabled, err)
	require.NoError(t, h.EnableKey(t.Context(), keyID))
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), source))
	_, err = h.ReEncrypt(t.Context(), in)
	requireKind(t, engine.KeyPendingImport, err)
}

// Contexts that look alike when they are written one after the other are not
// alike.
func TestContextsAreNotSpliced(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	contexts := []map[string]string{
		nil,
		{"": ""},
		{"a": ""},
		{"": "a"},
		{"a": "b"},
		{"ab": ""},
		{"a": "bc"},
		{"ab": "c"},
		{"a": "b", "c": "d"},
		{"a": "bcd"},
		{"a": "b=c&d"},
		{"a": "b", "d": "c"},
		{"a": "d", "c": "b"},
		{"a": "b\x00\x00\x00\x01c\x00\x00\x00\x01d"},
	}
	for i, sealing := range contexts {
		sealed, err := h.Encrypt(t.Context(), keyID, []byte("x"), sealing)
		require.NoError(t, err)
		for j, opening := range contexts {
			_, err := h.Decrypt(t.Context(), sealed.Blob, opening)
			if i == j {
				require.NoError(t, err)
			} else {
				require.Equal(t, invalidCiphertext, err, "%q opened with %q", sealing, opening)
			}
		}
	}
	empty, err := h.Encrypt(t.Context(), keyID, []byte("x"), map[string]string{})
	require.NoError(t, err)
	_, err = h.Decrypt(t.Context(), empty.Blob, nil)
	require.NoError(t, err, "an empty context is none")
}

// The same material in two CMKs: neither a ciphertext of one nor any splice of
// both decrypts under the other.
func TestSameMaterialInTwoKeys(t *testing.T) { onEveryRoute(t, testSameMaterialInTwoKeys) }

func testSameMaterialInTwoKeys(t *testing.T, h *house) {
	h.needUse(t)
	one, two := h.newKey(t, h.route.spec), h.newKey(t, h.route.spec)
	material := h.route.material()
	h.importInto(t, one, material)
	h.importInto(t, two, material)
	require.Equal(t, h.describe(t, one).CheckValue, h.describe(t, two).CheckValue)
	require.NotEqual(t, h.describe(t, one).MaterialID, h.describe(t, two).MaterialID)

	a, b := h.encrypt(t, one, "the same length"), h.encrypt(t, two, "of two sealings")
	require.Len(t, b, len(a))
	splices := make(map[string]bool)
	for cut := range a {
		for end := cut; end <= len(a); end++ {
			// One's bytes but for those from cut to end, and the other way round.
			for _, pair := range [][2][]byte{{a, b}, {b, a}} {
				splice := bytes.Clone(pair[0])
				copy(splice[cut:end], pair[1][cut:end])
				splices[string(splice)] = true
			}
		}
	}
	delete(splices, string(a))
	delete(splices, string(b))
	require.Greater(t, len(splices), 1000)
	for splice := range splices {
		_, err := h.Decrypt(t.Context(), []byte(splice), nil)
		require.Equal(t, invalidCiphertext, err)
	}
	h.requireDecrypts(t, a, "the same length")
	h.requireDecrypts(t, b, "of two sealings")
}
