package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/softhsm"
)

// customer is a key on a server, and what its owner has in hand.
type customer struct {
	*client
	keyID, publicKey, token string
	material                []byte
}

// newCustomer makes a key and asks for parameters by OAEP with SHA-1.
func newCustomer(t testing.TB, c *client) *customer {
	t.Helper()
	return newCustomerBy(t, c, voyage{byok.AES256, "RSA_2048", byok.OAEPSHA1})
}

func newCustomerBy(t testing.TB, c *client, v voyage) *customer {
	t.Helper()
	var key struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": v.keySpec}, &key))
	var p struct{ PublicKey, ImportToken string }
	require.NoError(t, c.call(t.Context(), "GetParametersForImport", map[string]string{
		"KeyId": key.KeyMetadata.KeyID, "WrappingAlgorithm": v.algorithm, "WrappingKeySpec": v.pairSpec,
	}, &p))
	return &customer{
		client: c, keyID: key.KeyMetadata.KeyID, publicKey: p.PublicKey, token: p.ImportToken, material: randomMaterial(byok.MaterialLen(v.keySpec)),
	}
}

// params are those of an import of material that was wrapped already.
func (c *customer) params(wrapped string) map[string]string {
	return map[string]string{"KeyId": c.keyID, "EncryptedKeyMaterial": wrapped, "ImportToken": c.token}
}

func (c *customer) state(t testing.TB) keyState {
	t.Helper()
	var answer struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "DescribeKey", map[string]string{"KeyId": c.keyID}, &answer))
	return answer.KeyMetadata
}

// rpcQuery is a signed request by the RPC scheme, which can be sent again and
// to any port: it covers no host.
func (c *client) rpcQuery(t testing.TB, action string, params map[string]string) string {
	t.Helper()
	query := url.Values{"Action": {action}, "Version": {kmsapi.Version}}
	for name, value := range params {
		query.Set(name, value)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.url+"?"+query.Encode(), http.NoBody)
	require.NoError(t, err)
	require.NoError(t, acs.SignRPC(req, nil, c.cred, time.Now(), rand.Text()))
	return req.URL.RawQuery
}

// post sends a query and returns the whole answer as bytes, and its code.
func post(t testing.TB, endpoint, query string) (raw, code string) {
	t.Helper()
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, "http://"+endpoint+"/?"+query, http.NoBody)
	require.NoError(t, err)
	res, err := http.DefaultTransport.RoundTrip(req)
	require.NoError(t, err)
	defer func() { require.NoError(t, res.Body.Close()) }()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	var answer struct{ Code string }
	require.NoError(t, json.Unmarshal(body, &answer), "%s", body)
	var all bytes.Buffer
	res.Body = io.NopCloser(bytes.NewReader(body))
	require.NoError(t, res.Write(&all))
	return all.String(), answer.Code
}

// On a real token, over a real connection: nothing of the answer tells why a
// blob was refused.
func TestEveryBadBlobGetsTheSameBytes(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	c := s.client(t)
	fresh, bound := newCustomer(t, c), newCustomer(t, c)
	good := wrapped(t, byok.OAEPSHA1, bound.publicKey, bound.material)
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", bound.params(good), nil))

	raw, err := base64.StdEncoding.DecodeString(wrapped(t, byok.OAEPSHA1, fresh.publicKey, fresh.material))
	require.NoError(t, err)
	tampered := bytes.Clone(raw)
	tampered[len(tampered)-1] ^= 1
	other, err := base64.StdEncoding.DecodeString(good)
	require.NoError(t, err)
	blobs := map[string]string{
		"tampered":           base64.StdEncoding.EncodeToString(tampered),
		"truncated":          base64.StdEncoding.EncodeToString(raw[:255]),
		"one byte more":      base64.StdEncoding.EncodeToString(append(bytes.Clone(raw), 0)),
		"one byte":           "AA==",
		"random":             base64.StdEncoding.EncodeToString(randomMaterial(256)),
		"zero":               base64.StdEncoding.EncodeToString(make([]byte, 256)),
		"beyond the modulus": base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xff}, 256)),
		"huge":               base64.StdEncoding.EncodeToString(make([]byte, 4096)),
		"for another pair":   base64.StdEncoding.EncodeToString(other),
		"by PKCS #1 v1.5":    wrapped(t, byok.PKCS1v15, fresh.publicKey, fresh.material),
		"by OAEP SHA-256":    wrapped(t, byok.OAEPSHA256, fresh.publicKey, fresh.material),
	}
	for _, n := range []int{0, 1, 16, 24, 31, 33, 64} {
		blobs[fmt.Sprintf("%d bytes of material", n)] = wrappedAnyhow(t, fresh.publicKey, randomMaterial(n))
	}
	answers := map[string][]string{}
	send := func(name string, params map[string]string) {
		raw, code := post(t, s.endpoint, c.rpcQuery(t, "ImportKeyMaterial", params))
		require.Equal(t, "InvalidKeyMaterial", code, name)
		raw = variable.ReplaceAllString(raw, "")
		answers[raw] = append(answers[raw], name)
	}
	for name, blob := range blobs {
		send(name, fresh.params(blob))
	}
	send("other material", bound.params(wrapped(t, byok.OAEPSHA1, bound.publicKey, fresh.material)))
	unexpected := fresh.params(base64.StdEncoding.EncodeToString(raw))
	unexpected["ExpectKeyCheckValue"] = "000000"
	send("unexpected check value", unexpected)
	delete(unexpected, "ExpectKeyCheckValue")
	unexpected["ExpectKeyMaterialId"] = strings.Repeat("00", 32)
	send("unexpected material id", unexpected)

	require.Len(t, answers, 1, "more than one answer")
	require.Equal(t, "PendingImport", fresh.state(t).KeyState)
	require.Equal(t, "Enabled", bound.state(t).KeyState)
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", fresh.params(base64.StdEncoding.EncodeToString(raw)), nil), "the token of import is still good")
}

// wrappedAnyhow wraps by OAEP with SHA-1 what byok refuses to.
func wrappedAnyhow(t testing.TB, publicKey string, material []byte) string {
	t.Helper()
	der, err := base64.StdEncoding.DecodeString(publicKey)
	require.NoError(t, err)
	public, err := x509.ParsePKIXPublicKey(der)
	require.NoError(t, err)
	blob, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, public.(*rsa.PublicKey), material, nil)
	require.NoError(t, err)
	return base64.StdEncoding.EncodeToString(blob)
}

// What the customer expects is checked in the token.
func TestExpectations(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	c := newCustomer(t, s.client(t))
	kcv, err := byok.KCV(byok.AES256, c.material)
	require.NoError(t, err)
	id, err := byok.MaterialID(c.keyID, c.material)
	require.NoError(t, err)
	params := c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material))
	params["ExpectKeyCheckValue"] = hex.EncodeToString(kcv[:])
	params["ExpectKeyMaterialId"] = hex.EncodeToString(id[:])
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
	state := c.state(t)
	require.Equal(t, hex.EncodeToString(kcv[:]), state.KeyCheckValue)
	require.Equal(t, hex.EncodeToString(id[:]), state.KeyMaterialID)
}

// A recorded import must not bring back material that was deleted since, not
// even after the server was killed or stopped.
func TestReplayIsRefusedAcrossRestarts(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	dir := t.TempDir()
	s := startDevServer(t, dir)
	c := newCustomer(t, s.client(t))
	params := c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material))
	recorded := c.rpcQuery(t, "ImportKeyMaterial", params)
	_, code := post(t, s.endpoint, recorded)
	require.Empty(t, code)
	require.NoError(t, c.call(t.Context(), "DeleteKeyMaterial", map[string]string{"KeyId": c.keyID}, nil))

	replay := func(s *server) {
		t.Helper()
		_, code := post(t, s.endpoint, recorded)
		require.Equal(t, "SignatureNonceUsed", code)
		_, code = post(t, s.endpoint, strings.Replace(recorded, "&KeyId=", "&X=1&KeyId=", 1))
		require.Equal(t, "SignatureDoesNotMatch", code)
		c.client = s.client(t)
		require.Equal(t, "PendingImport", c.state(t).KeyState)
	}
	replay(s)
	s.kill(t)
	s = startDevServer(t, dir)
	replay(s)
	require.NoError(t, s.stop())
	s = startDevServer(t, dir)
	replay(s)

	// The same import, signed anew, is as good as ever.
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
	require.Equal(t, "Enabled", c.state(t).KeyState)
}

// OpenSSL as customers use it, and Base64 as they paste it.
func TestOpenSSLWrapsMaterial(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	require.NoError(t, err, "install openssl")
	s := sharedServer(t)
	c := s.client(t)
	for name, args := range map[string][]string{
		"pkeyutl": {"pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-pkeyopt", "rsa_padding_mode:oaep"},
		"rsautl":  {"rsautl", "-encrypt", "-pubin", "-keyform", "DER", "-oaep"}, // deprecated, and in the guide
	} {
		t.Run(name, func(t *testing.T) {
			customer := newCustomer(t, c)
			dir := t.TempDir()
			spki, err := base64.StdEncoding.DecodeString(customer.publicKey)
			require.NoError(t, err)
			write := func(name string, data []byte) string {
				path := filepath.Join(dir, name)
				require.NoError(t, os.WriteFile(path, data, 0o600))
				return path
			}
			key, in, out := write("PublicKey.bin", spki), write("KeyMaterial.bin", customer.material), filepath.Join(dir, "Encrypted.bin")
			text, err := exec.Command(openssl, append(args, "-inkey", key, "-in", in, "-out", out)...).CombinedOutput()
			require.NoError(t, err, "%s", text)
			wrappedText, err := exec.Command(openssl, "enc", "-e", "-base64", "-in", out).Output() // in lines
			require.NoError(t, err)
			require.Contains(t, strings.TrimSpace(string(wrappedText)), "\n")

			params := customer.params(" \r\n" + string(wrappedText) + "\n")
			params["ImportToken"] = "\n" + customer.token + "\r\n"
			require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", params, nil))
			id, err := byok.MaterialID(customer.keyID, customer.material)
			require.NoError(t, err)
			require.Equal(t, hex.EncodeToString(id[:]), customer.state(t).KeyMaterialID)
		})
	}
}

// The largest honest request fits, with every character of it escaped; one
// without bounds does not.
func TestSizesOfRequests(t *testing.T) {
	t.Parallel()
	s := sharedServer(t)
	c := newCustomer(t, s.client(t))
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.params(wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)), nil))
	plaintext := bytes.Repeat([]byte{0xfb, 0xff}, 3<<10) // all plus signs and slashes in Base64
	params := map[string]string{
		"KeyId": c.keyID, "Plaintext": base64.StdEncoding.EncodeToString(plaintext),
		"EncryptionContext": jsonOf(map[string]string{"k": strings.Repeat("界", (8192-1)/3)}),
	}
	require.NoError(t, c.call(t.Context(), "Encrypt", params, nil))
	params["Plaintext"] = base64.StdEncoding.EncodeToString(append(plaintext, 0))
	var refused *apiError
	require.ErrorAs(t, c.call(t.Context(), "Encrypt", params, nil), &refused)
	require.Equal(t, "InvalidParameter", refused.Code)
	require.Contains(t, refused.Message, "Plaintext")

	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.endpoint+"/?X="+strings.Repeat("x", 2*maxHeaderBytes), http.NoBody)
	require.NoError(t, err)
	res, err := http.DefaultTransport.RoundTrip(req)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, res.StatusCode)
}

// SM4 material is imported and identified; a token without SM4 says so when it
// is to be used.
func TestSM4Material(t *testing.T) {
	t.Parallel()
	c := sharedServer(t).client(t)
	var key struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": byok.SM4}, &key))
	var p struct{ PublicKey, ImportToken string }
	keyID, material := key.KeyMetadata.KeyID, randomMaterial(16)
	require.NoError(t, c.call(t.Context(), "GetParametersForImport", map[string]string{
		"KeyId": keyID, "WrappingAlgorithm": byok.OAEPSHA1, "WrappingKeySpec": "RSA_2048",
	}, &p))
	customer := &customer{client: c, keyID: keyID, token: p.ImportToken}
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", customer.params(wrapped(t, byok.OAEPSHA1, p.PublicKey, material)), nil))
	id, err := byok.MaterialID(keyID, material)
	require.NoError(t, err)
	require.Equal(t, hex.EncodeToString(id[:]), customer.state(t).KeyMaterialID)

	err = c.call(t.Context(), "Encrypt", map[string]string{"KeyId": keyID, "Plaintext": "YQ=="}, nil)
	if err == nil { // a token with SM4
		kcv, err := byok.KCV(byok.SM4, material)
		require.NoError(t, err)
		require.Equal(t, hex.EncodeToString(kcv[:]), customer.state(t).KeyCheckValue)
		return
	}
	var refused *apiError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, "Rejected.UnsupportedOperation", refused.Code)
	require.Contains(t, refused.Recommend, "SM4")
}
