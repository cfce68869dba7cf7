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
)

// algorithms are those of the published API that wrap symmetric material under
// an RSA key.
var algorithms = []string{byok.OAEPSHA1, byok.OAEPSHA256, byok.PKCS1v15}

// readCredentials reads what "dev" wrote.
func readCredentials(t testing.TB, dir string) credentials {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, "credentials.json"))
	require.NoError(t, err)
	var c credentials
	require.NoError(t, json.Unmarshal(text, &c))
	return c
}

// offered are the algorithms that this token has, as the server says.
func offered(t *testing.T, c *client) []string {
	t.Helper()
	var key struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL"}, &key))
	var has []string
	for _, algorithm := range algorithms {
		err := c.call(t.Context(), "GetParametersForImport", map[string]string{
			"KeyId": key.KeyMetadata.KeyID, "WrappingAlgorithm": algorithm, "WrappingKeySpec": "RSA_2048",
		}, nil)
		var refused *apiError
		if errors.As(err, &refused) {
			require.Equal(t, "InvalidParameter", refused.Code)
			require.Contains(t, refused.Recommend, algorithm, "what is missing must be named")
			t.Logf("not on this token: %s", refused.Recommend)
			continue
		}
		require.NoError(t, err)
		has = append(has, algorithm)
	}
	require.Contains(t, has, byok.OAEPSHA1, "every SoftHSM2 has it")
	return has
}

// Every client goes through the whole life of a key, by every algorithm.
func TestLifeByEveryClient(t *testing.T) {
	s := startDevServer(t, t.TempDir())
	has := offered(t, s.client(t))
	for name, client := range sdks(t, s.endpoint, readCredentials(t, s.dir)) {
		for _, algorithm := range has {
			t.Run(name+"/"+algorithm, func(t *testing.T) { live(t, client, algorithm) })
		}
	}
	require.NoError(t, s.stop())
}

// refused requires an error of the service with that code.
func refused(t *testing.T, client sdk, code string, err error) {
	t.Helper()
	require.Error(t, err)
	require.Equal(t, code, client.code(t, err), err)
}

// live is the life of a key with one client.
func live(t *testing.T, client sdk, algorithm string) {
	keyID, state, err := client.createKey("Aliyun_AES_256")
	require.NoError(t, err)
	require.Equal(t, "PendingImport", state)
	expectState := func(want string) {
		t.Helper()
		state, _, err := client.describeKey(keyID)
		require.NoError(t, err)
		require.Equal(t, want, state)
	}
	material := randomMaterial(32)
	spki, token, err := client.parameters(keyID, algorithm)
	require.NoError(t, err)
	wrap := func(material []byte) string { return wrapped(t, algorithm, spki, material) }

	// Not usable before the import.
	text := base64.StdEncoding.EncodeToString([]byte("some text ~*!'()"))
	_, err = client.encrypt(keyID, text, nil)
	refused(t, client, "Rejected.PendingImport", err)

	// A bad import changes nothing, a good one enables.
	err = client.importMaterial(keyID, wrap(material[:31]), token, 0)
	if algorithm == byok.PKCS1v15 && client.code(t, err) == "InvalidParameter" {
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
	refused(t, client, "InvalidKeyMaterial", client.importMaterial(keyID, wrap(randomMaterial(32)), token, 0))
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
