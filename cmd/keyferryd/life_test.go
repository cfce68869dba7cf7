package main

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

// algorithms are those of the published API that wrap symmetric material.
var algorithms = []string{byok.OAEPSHA1, byok.OAEPSHA256, byok.PKCS1v15, byok.SM2PKE}

// pairSpecOf is the WrappingKeySpec that goes with an algorithm.
func pairSpecOf(algorithm string) string {
	if algorithm == byok.SM2PKE {
		return "EC_SM2"
	}
	return "RSA_2048"
}

// voyage is what varies from one life of a key to another.
type voyage struct{ keySpec, pairSpec, algorithm string }

// readCredentials reads what "dev" wrote.
func readCredentials(t testing.TB, dir string) credentials {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, devCredentials))
	require.NoError(t, err)
	var c credentials
	require.NoError(t, json.Unmarshal(text, &c))
	return c
}

// offered are the voyages that this token can make, as the server says.
func offered(t *testing.T, c *client) []voyage {
	t.Helper()
	var voyages []voyage
	for _, keySpec := range []string{byok.AES256, byok.SM4} {
		var key struct{ KeyMetadata keyState }
		require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": keySpec}, &key))
		owner := &customer{client: c, keyID: key.KeyMetadata.KeyID, material: randomMaterial(byok.MaterialLen(keySpec))}
		var has []string
		for _, algorithm := range algorithms {
			if owner.ask(t, algorithm) {
				has = append(has, algorithm)
			}
		}
		require.Contains(t, has, byok.OAEPSHA1, "every SoftHSM2 has it")

		require.True(t, owner.ask(t, byok.OAEPSHA1))
		params := owner.params(wrapped(t, byok.OAEPSHA1, owner.publicKey, owner.material))
		require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
		if err := c.call(t.Context(), "Encrypt", map[string]string{"KeyId": owner.keyID, "Plaintext": "YQ=="}, nil); err != nil {
			var refused *apiError
			require.ErrorAs(t, err, &refused)
			require.Equal(t, "Rejected.UnsupportedOperation", refused.Code)
			require.Equal(t, byok.SM4, keySpec, "every token has AES")
			t.Logf("no %s on this token: %s", keySpec, refused.Recommend)
			continue
		}
		for _, algorithm := range has {
			voyages = append(voyages, voyage{keySpec, pairSpecOf(algorithm), algorithm})
		}
	}
	return voyages
}

// ask asks for the parameters of an import. The answer is false where the
// token does not do the algorithm, which must be said by name.
func (c *customer) ask(t *testing.T, algorithm string) bool {
	t.Helper()
	var p struct{ PublicKey, ImportToken string }
	err := c.call(t.Context(), "GetParametersForImport", map[string]string{
		"KeyId": c.keyID, "WrappingAlgorithm": algorithm, "WrappingKeySpec": pairSpecOf(algorithm),
	}, &p)
	var refused *apiError
	if errors.As(err, &refused) {
		require.Equal(t, "InvalidParameter", refused.Code)
		require.Regexp(t, `^this server does not offer `+algorithm+` with `+pairSpecOf(algorithm)+`; it offers RSAES_OAEP_SHA_1 with RSA_2048\b`, refused.Recommend)
		t.Logf("not on this token: %s", refused.Recommend)
		return false
	}
	require.NoError(t, err)
	c.publicKey, c.token = p.PublicKey, p.ImportToken
	return true
}

// Every client goes through the whole life of a key, of every spec and by
// every algorithm that the token has.
func TestLifeByEveryClient(t *testing.T) {
	t.Parallel()
	s := startDevServer(t, t.TempDir())
	voyages := offered(t, s.client(t))
	// One after the other: Alibaba's SDKs race with themselves.
	for name, client := range sdks(t, s.endpoint, readCredentials(t, s.dir)) {
		for _, v := range voyages {
			t.Run(name+"/"+v.keySpec+"/"+v.algorithm, func(t *testing.T) { live(t, client, v) })
		}
	}
	require.NoError(t, s.stop())
}

// From one CMK to another, of every spec that the token has.
func TestReEncryptByEveryClient(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	all := sdks(t, s.endpoint, readCredentials(t, s.dir))
	keyIDs := make(map[string]string)
	for _, v := range offered(t, s.client(t)) {
		if v.algorithm != byok.OAEPSHA1 {
			continue
		}
		keyID, _, err := all["v1"].createKey(v.keySpec)
		require.NoError(t, err)
		spki, token, err := all["v1"].parameters(keyID, v.pairSpec, v.algorithm)
		require.NoError(t, err)
		material := randomMaterial(byok.MaterialLen(v.keySpec))
		require.NoError(t, all["v1"].importMaterial(keyID, wrapped(t, v.algorithm, spki, material), token, 0))
		keyIDs[v.keySpec] = keyID
	}
	require.NotEmpty(t, keyIDs)
	text := base64.StdEncoding.EncodeToString([]byte("moved"))
	for _, name := range []string{"v1", "v1, XML", "tea", "tea, RPC", "tea-rpc (form)"} {
		for sourceSpec, source := range keyIDs {
			for spec, keyID := range keyIDs {
				t.Run(name+"/"+sourceSpec+"/"+spec, func(t *testing.T) {
					client := all[name]
					blob, err := client.encrypt(source, text, nil)
					require.NoError(t, err)
					again, err := client.reEncrypt(blob, nil, keyID, map[string]string{"a": "1"})
					require.NoError(t, err)
					plaintext, by, err := client.decrypt(again, map[string]string{"a": "1"})
					require.NoError(t, err)
					require.Equal(t, []string{text, keyID}, []string{plaintext, by})
				})
			}
		}
	}
}

// Pairs of 3072 and 4096 bits are an extension: refused unless they are
// configured, and then as good as the others.
func TestLifeUnderLargerPairs(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	client := sdks(t, s.endpoint, readCredentials(t, s.dir))["tea"]
	keyID, _, err := client.createKey(byok.AES256)
	require.NoError(t, err)
	for _, larger := range []string{"RSA_3072", "RSA_4096"} {
		_, _, err = client.parameters(keyID, larger, byok.OAEPSHA1)
		refused(t, client, "InvalidParameter", err)
	}
	voyages := offered(t, s.client(t))

	dir := t.TempDir()
	require.NoError(t, startDevServer(t, dir).stop())
	usePairs(t, dir, pairsConfig{Specs: []hsm.PairSpec{hsm.RSA3072, hsm.RSA4096}, Ready: 1, Outstanding: 1})
	s = startDevServer(t, dir)
	all := sdks(t, s.endpoint, readCredentials(t, dir))
	for _, v := range voyages {
		if v.algorithm == byok.SM2PKE || v.algorithm == byok.PKCS1v15 {
			continue // no RSA, and switched off by usePairs
		}
		for _, larger := range []string{"RSA_3072", "RSA_4096"} {
			v.pairSpec = larger
			for _, name := range []string{"v1", "tea"} {
				t.Run(name+"/"+v.keySpec+"/"+v.pairSpec+"/"+v.algorithm, func(t *testing.T) { live(t, all[name], v) })
			}
		}
	}
	_, _, err = all["tea"].parameters(keyID, "RSA_2048", byok.OAEPSHA1)
	refused(t, all["tea"], "InvalidParameter", err)
	require.NoError(t, s.stop())
}

// refused requires an error of the service with that code.
func refused(t *testing.T, client sdk, code string, err error) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, code, client.code(t, err), err)
}

// live is the life of a key with one client.
func live(t *testing.T, client sdk, v voyage) {
	keyID, state, err := client.createKey(v.keySpec)
	require.NoError(t, err)
	require.Equal(t, "PendingImport", state)
	expectState := func(want string) {
		t.Helper()
		state, _, err := client.describeKey(keyID)
		require.NoError(t, err)
		require.Equal(t, want, state)
	}
	material := randomMaterial(byok.MaterialLen(v.keySpec))
	spki, token, err := client.parameters(keyID, v.pairSpec, v.algorithm)
	require.NoError(t, err)
	wrap := func(material []byte) string { return wrapped(t, v.algorithm, spki, material) }

	// Not usable before the import.
	text := base64.StdEncoding.EncodeToString([]byte("some text ~*!'()"))
	_, err = client.encrypt(keyID, text, nil)
	refused(t, client, "Rejected.PendingImport", err)

	// A bad import changes nothing, a good one enables.
	err = client.importMaterial(keyID, wrap(material[1:]), token, 0)
	if v.algorithm == byok.PKCS1v15 && client.code(t, err) == "InvalidParameter" {
		// OpenSSL 3.2 and later: the import must say what it expects, which
		// these clients have no parameter for.
		require.ErrorContains(t, err, "ExpectKeyMaterialId")
		return
	}
	refused(t, client, "InvalidKeyMaterial", err)
	refused(t, client, "InvalidImportToken", client.importMaterial(keyID, wrap(material), base64.StdEncoding.EncodeToString(material), 0))
	expectState("PendingImport")
	require.NoError(t, client.importMaterial(keyID, wrap(material), token, 0))
	expectState("Enabled")

	// The data plane. The context is a map, whatever its order.
	encctx := map[string]string{"a": "1", "b c": "ü&="}
	blob, err := client.encrypt(keyID, text, encctx)
	require.NoError(t, err)
	expectPlaintext := func(blob, want string, encctx map[string]string) {
		t.Helper()
		plaintext, by, err := client.decrypt(blob, encctx)
		require.NoError(t, err)
		require.Equal(t, want, plaintext)
		require.Equal(t, keyID, by)
	}
	expectPlaintext(blob, text, map[string]string{"b c": "ü&=", "a": "1"})
	_, _, err = client.decrypt(blob, map[string]string{"a": "1"})
	refused(t, client, "InvalidParameter", err)
	_, _, err = client.decrypt(blob, nil)
	refused(t, client, "InvalidParameter", err)
	again, err := client.reEncrypt(blob, encctx, keyID, map[string]string{"c": "3"})
	require.NoError(t, err)
	expectPlaintext(again, text, map[string]string{"c": "3"})
	_, err = client.reEncrypt(blob, nil, keyID, encctx)
	refused(t, client, "InvalidParameter", err)
	data, dataKey, err := client.dataKey(keyID, 48)
	require.NoError(t, err)
	require.Len(t, dataKey, 64)
	expectPlaintext(data, dataKey, nil)
	only, err := client.dataKeyOnly(keyID)
	require.NoError(t, err)
	opened, _, err := client.decrypt(only, nil)
	require.NoError(t, err)
	require.Len(t, opened, 24, "16 bytes in Base64")

	// Disabled and back.
	require.NoError(t, client.setEnabled(keyID, false))
	_, _, err = client.decrypt(blob, encctx)
	refused(t, client, "Rejected.Disabled", err)
	require.NoError(t, client.setEnabled(keyID, true))

	// Without material, and with it again; other material never.
	require.NoError(t, client.deleteMaterial(keyID))
	expectState("PendingImport")
	_, _, err = client.decrypt(blob, encctx)
	refused(t, client, "Rejected.PendingImport", err)
	refused(t, client, "Rejected.StateModifiedFailed", client.setEnabled(keyID, true))
	refused(t, client, "InvalidKeyMaterial", client.importMaterial(keyID, wrap(randomMaterial(len(material))), token, 0))
	expectState("PendingImport")
	refused(t, client, "InvalidParameter", client.importMaterial(keyID, wrap(material), token, time.Now().Add(-time.Hour).Unix()))
	expire := time.Now().Add(24 * time.Hour).Truncate(time.Second)
	require.NoError(t, client.importMaterial(keyID, wrap(material), token, expire.Unix()))
	_, expires, err := client.describeKey(keyID)
	require.NoError(t, err)
	require.Equal(t, expire.UTC().Format(time.RFC3339), expires)
	expectPlaintext(blob, text, encctx)

	// Deletion, cancelled.
	require.NoError(t, client.scheduleDeletion(keyID, 7))
	expectState("PendingDeletion")
	_, _, err = client.decrypt(blob, encctx)
	refused(t, client, "Rejected.PendingDeletion", err)
	refused(t, client, "Rejected.StateModifiedFailed", client.importMaterial(keyID, wrap(material), token, 0))
	require.NoError(t, client.cancelDeletion(keyID))
	expectPlaintext(blob, text, encctx)

	listed, total, err := client.listKeys(1, 100)
	require.NoError(t, err)
	require.Len(t, listed, total)
	require.True(t, slices.Contains(listed, keyID))
	_, _, err = client.describeKey("00000000-0000-4000-8000-000000000000")
	refused(t, client, "Forbidden.KeyNotFound", err)
}

func randomMaterial(n int) []byte {
	material := make([]byte, n)
	_, _ = rand.Read(material)
	return material
}

// wrapped is material as ImportKeyMaterial takes it.
func wrapped(t testing.TB, algorithm, publicKey string, material []byte) string {
	t.Helper()
	spki, err := base64.StdEncoding.DecodeString(publicKey)
	require.NoError(t, err)
	blob, err := byok.Wrap(algorithm, spki, material)
	require.NoError(t, err)
	return base64.StdEncoding.EncodeToString(blob)
}
