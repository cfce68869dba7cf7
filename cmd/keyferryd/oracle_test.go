package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/softhsm"
)

// probe makes blobs of one class, which an attacker wants to tell from those of
// another. Each is a new one.
type probe struct {
	name string
	make func() []byte
}

// probesOf are the classes of blobs that decide an attack on an algorithm. No
// blob of them is good for an import of material. A public key is enough to
// make them: what is attacked is a plaintext that the attacker does not know,
// but what the server tells of it is learnt by plaintexts that they do.
//
// The right blob is made of the material by the same means, and is good.
func probesOf(t testing.TB, c *customer, algorithm string) (right []byte, probes []probe) {
	t.Helper()
	if algorithm == byok.SM2PKE {
		return sm2Probes(t, c)
	}
	der, err := base64.StdEncoding.DecodeString(c.publicKey)
	require.NoError(t, err)
	parsed, err := x509.ParsePKIXPublicKey(der)
	require.NoError(t, err)
	pub := parsed.(*rsa.PublicKey)
	switch algorithm {
	case byok.PKCS1v15:
		return v15Probes(pub, c.material)
	case byok.OAEPSHA256:
		return oaepProbes(pub, sha256.New, c.material)
	default:
		return oaepProbes(pub, sha1.New, c.material)
	}
}

// raise is RSA without a padding: m^e.
func raise(pub *rsa.PublicKey, m *big.Int) *big.Int {
	return new(big.Int).Exp(m, big.NewInt(int64(pub.E)), pub.N)
}

func encrypted(pub *rsa.PublicKey, encoded []byte) []byte {
	return raise(pub, new(big.Int).SetBytes(encoded)).FillBytes(make([]byte, pub.Size()))
}

// times multiplies an unknown plaintext by a random number: c·s^e.
func times(pub *rsa.PublicKey, captured []byte) []byte {
	s, _ := rand.Int(rand.Reader, pub.N)
	c := new(big.Int).Mul(new(big.Int).SetBytes(captured), raise(pub, s))
	return c.Mod(c, pub.N).FillBytes(make([]byte, pub.Size()))
}

// nonZero is padding of PKCS #1 v1.5.
func nonZero(n int) []byte {
	b := randomMaterial(n)
	for i := range b {
		b[i] = max(b[i], 1)
	}
	return b
}

// v15Probes are the classes of Bleichenbacher: Chosen Ciphertext Attacks Against
// Protocols Based on the RSA Encryption Standard PKCS #1, CRYPTO 1998, and of
// the finer oracles of Bardou et al., CRYPTO 2012.
func v15Probes(pub *rsa.PublicKey, material []byte) (right []byte, probes []probe) {
	k, n := pub.Size(), len(material)
	pad := func(message []byte) []byte {
		return slices.Concat([]byte{0, 2}, nonZero(k-3-len(message)), []byte{0}, message)
	}
	conforming := func(n int) []byte { return pad(randomMaterial(n)) }
	right = encrypted(pub, pad(material))
	with := func(i int, b byte) func() []byte {
		return func() []byte {
			encoded := conforming(n)
			encoded[i] = b
			return encrypted(pub, encoded)
		}
	}
	return right, []probe{
		{"a captured blob times a number", func() []byte { return times(pub, right) }},
		{"conforming, one byte too few", func() []byte { return encrypted(pub, conforming(n-1)) }},
		{"conforming, one byte too many", func() []byte { return encrypted(pub, conforming(n+1)) }},
		{"conforming, of the other key's length", func() []byte { return encrypted(pub, conforming(48-n)) }},
		{"conforming, of length zero", func() []byte { return encrypted(pub, conforming(0)) }},
		{"conforming, as long as it can be", func() []byte { return encrypted(pub, conforming(k-11)) }},
		{"no separator", func() []byte { return encrypted(pub, append([]byte{0, 2}, nonZero(k-2)...)) }},
		{"padding of less than eight bytes", with(9, 0)},
		{"first byte not zero", with(0, 1)},
		{"second byte not two", with(1, 1)},
		{"all zero", func() []byte { return make([]byte, k) }},
	}
}

// oaepProbes are the classes of Manger: A Chosen Ciphertext Attack on RSA
// Optimal Asymmetric Encryption Padding (OAEP) as Standardized in PKCS #1 v2.0,
// CRYPTO 2001, and what else RFC 8017 section 7.1.2 step 3 checks.
func oaepProbes(pub *rsa.PublicKey, newHash func() hash.Hash, material []byte) (right []byte, probes []probe) {
	k, h, n := pub.Size(), newHash().Size(), len(material)
	label := newHash().Sum(nil)
	// pad makes the data block before it is masked.
	pad := func(label, message []byte) []byte {
		return slices.Concat(label, make([]byte, k-2*h-2-len(message)), []byte{1}, message)
	}
	block := func(label []byte, n int) []byte { return pad(label, randomMaterial(n)) }
	encode := func(first byte, db []byte) []byte {
		seed := randomMaterial(h)
		mask(db, seed, newHash)
		mask(seed, db, newHash)
		return encrypted(pub, slices.Concat([]byte{first}, seed, db))
	}
	with := func(i int, b byte) func() []byte {
		return func() []byte {
			db := block(label, n)
			db[i] = b
			return encode(0, db)
		}
	}
	right = encode(0, pad(label, material))
	return right, []probe{
		{"a captured blob times a number", func() []byte { return times(pub, right) }},
		{"first byte not zero, the rest as it should be", func() []byte { return encode(1, block(label, n)) }},
		{"first byte not zero, the rest random", func() []byte { return encrypted(pub, append([]byte{1}, randomMaterial(k-1)...)) }},
		{"first byte zero, the rest random", func() []byte { return encrypted(pub, append([]byte{0}, randomMaterial(k-1)...)) }},
		{"another label", func() []byte { return encode(0, block(randomMaterial(h), n)) }},
		{"the label wrong in its last byte", with(h-1, ^label[h-1])},
		{"neither zero nor one in the padding", with(h, 2)},
		{"no separator", func() []byte { return encode(0, append(bytes.Clone(label), make([]byte, k-h-1-h)...)) }},
		{"well encoded, one byte too few", func() []byte { return encode(0, block(label, n-1)) }},
		{"well encoded, one byte too many", func() []byte { return encode(0, block(label, n+1)) }},
		{"well encoded, of the other key's length", func() []byte { return encode(0, block(label, 48-n)) }},
		{"well encoded, of length zero", func() []byte { return encode(0, block(label, 0)) }},
	}
}

// mask is MGF1 (RFC 8017 appendix B.2.1), added to what it masks.
func mask(b, seed []byte, newHash func() hash.Hash) {
	h := newHash()
	for i, counter := 0, uint32(0); i < len(b); counter++ {
		h.Reset()
		h.Write(seed)
		h.Write(binary.BigEndian.AppendUint32(nil, counter))
		for _, m := range h.Sum(nil) {
			if i < len(b) {
				b[i] ^= m
				i++
			}
		}
	}
}

// sm2Probes: a blob is 04 ‖ x ‖ y ‖ C3 (32) ‖ C2.
func sm2Probes(t testing.TB, c *customer) (right []byte, probes []probe) {
	t.Helper()
	wrap := func(material []byte) []byte {
		blob, err := base64.StdEncoding.DecodeString(wrapped(t, byok.SM2PKE, c.publicKey, material))
		require.NoError(t, err)
		return blob
	}
	good := func() []byte { return wrap(c.material) }
	with := func(i int, change func(byte) byte) func() []byte {
		return func() []byte {
			blob := good()
			blob[i] = change(blob[i])
			return blob
		}
	}
	flip := func(b byte) byte { return b ^ 1 }
	of := func(n int) func() []byte { return func() []byte { return wrap(randomMaterial(n)) } }
	return good(), []probe{
		{"a point that is not on the curve", with(64, flip)},
		{"a coordinate beyond the field", func() []byte { return slices.Concat([]byte{4}, bytes.Repeat([]byte{0xff}, 32), good()[33:]) }},
		{"the point at infinity", func() []byte { return slices.Concat([]byte{4}, make([]byte, 64), good()[65:]) }},
		{"another point", func() []byte { return slices.Concat(good()[:65], good()[65:]) }},
		{"another hash", with(65, flip)},
		{"another ciphertext", with(97, flip)},
		{"cut off", func() []byte { return good()[:100] }},
		{"no ciphertext", func() []byte { return good()[:97] }},
		{"called DER and no DER", with(0, func(byte) byte { return 0x30 })},
		{"well made, one byte too few", of(len(c.material) - 1)},
		{"well made, one byte too many", of(len(c.material) + 1)},
		{"well made, of the other key's length", of(48 - len(c.material))},
	}
}

// onEveryModule runs a test on a server of "dev" on each SoftHSM2 that is here.
func onEveryModule(t *testing.T, test func(t *testing.T, s *server)) {
	modules, err := softhsm.Modules()
	require.NoError(t, err)
	for _, module := range modules {
		t.Run(filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(module)))), func(t *testing.T) {
			t.Parallel()
			t.Logf("the module is %s", module)
			s := startDevServer(t, t.TempDir(), "--module", module)
			test(t, s)
			require.NoError(t, s.stop())
		})
	}
}

// variable is what differs from one answer to the next, whatever was asked.
var variable = regexp.MustCompile(`(?m)^(Date|X-Acs-Request-Id): .*$|[0-9A-F]{8}-[0-9A-F-]{27}`)

// expecting are the parameters of an import that says which material it is of,
// without which some tokens take no PKCS #1 v1.5.
func (c *customer) expecting(t testing.TB, blob []byte) map[string]string {
	t.Helper()
	id, err := byok.MaterialID(c.keyID, c.material)
	require.NoError(t, err)
	params := c.params(base64.StdEncoding.EncodeToString(blob))
	params["ExpectKeyMaterialId"] = hex.EncodeToString(id[:])
	return params
}

// A probe of Bleichenbacher's or Manger's gets the same bytes as every other:
// line, headers and body.
func TestNoOracle(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	onEveryModule(t, func(t *testing.T, s *server) {
		for _, keySpec := range []string{byok.AES256, byok.SM4} {
			for _, algorithm := range algorithms {
				t.Run(keySpec+"/"+algorithm, func(t *testing.T) {
					c := newCustomerOf(t, s.client(t), keySpec)
					if !c.ask(t, algorithm) {
						return // it was said why
					}
					right, probes := probesOf(t, c, algorithm)
					answers := map[string][]string{}
					var mu sync.Mutex
					var wg sync.WaitGroup
					for _, p := range probes {
						query := c.rpcQuery(t, "ImportKeyMaterial", c.expecting(t, p.make()))
						wg.Go(func() {
							raw, _ := post(t, s.endpoint, query)
							mu.Lock()
							defer mu.Unlock()
							raw = variable.ReplaceAllString(raw, "")
							answers[raw] = append(answers[raw], p.name)
						})
					}
					wg.Wait()
					require.Len(t, answers, 1, "the answers tell the probes apart")
					for raw := range answers {
						require.Contains(t, raw, `"Code":"InvalidKeyMaterial"`)
					}
					// How they are made is sound: the right material is taken.
					require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.expecting(t, right), nil))
				})
			}
		}
	})
}

// newCustomerOf makes a key that waits for material.
func newCustomerOf(t testing.TB, c *client, keySpec string) *customer {
	t.Helper()
	var key struct{ KeyMetadata keyState }
	require.NoError(t, c.call(t.Context(), "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": keySpec}, &key))
	return &customer{client: c, keyID: key.KeyMetadata.KeyID, material: randomMaterial(byok.MaterialLen(keySpec))}
}

// An attack is over after a hundred answers, however many ask at once; for the
// import token it stays so after the server was killed, and its owner goes on
// with a new one.
func TestFailureBudgetEndsTheAttack(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	const budget, asked = 100, 130
	dir := t.TempDir()
	s := startDevServer(t, dir)
	c := newCustomer(t, s.client(t))
	right, probes := probesOf(t, c, byok.OAEPSHA1)
	attack := func(s *server, n int) map[string]int {
		codes := map[string]int{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range n {
			query := c.rpcQuery(t, "ImportKeyMaterial", c.expecting(t, probes[i%len(probes)].make()))
			wg.Go(func() {
				_, code := post(t, s.endpoint, query)
				mu.Lock()
				defer mu.Unlock()
				codes[code]++
			})
		}
		wg.Wait()
		return codes
	}
	good := c.expecting(t, right)
	over := func(s *server) {
		t.Helper()
		require.Equal(t, map[string]int{"InvalidImportToken": 5}, attack(s, 5))
		expectCode(t, "InvalidImportToken", c.call(t.Context(), "ImportKeyMaterial", good, nil))
	}
	require.Equal(t, map[string]int{"InvalidKeyMaterial": budget, "InvalidImportToken": asked - budget}, attack(s, asked))
	over(s)
	s.kill(t)
	s = startDevServer(t, dir)
	c.client = s.client(t)
	over(s)
	require.True(t, c.ask(t, byok.OAEPSHA1))
	right, _ = probesOf(t, c, byok.OAEPSHA1)
	require.NoError(t, c.call(t.Context(), "ImportKeyMaterial", c.expecting(t, right), nil))
	require.Equal(t, "Enabled", c.state(t).KeyState)
	require.NoError(t, s.stop())
}

// expectCode requires an error of the API with that code.
func expectCode(t testing.TB, code string, err error) {
	t.Helper()
	var refused *apiError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, code, refused.Code, fmt.Sprint(err))
}

// codeOf is the code of a refusal, or "".
func codeOf(err error) string {
	if refused, ok := errors.AsType[*apiError](err); ok {
		return refused.Code
	}
	return ""
}
