package hsm_test

import (
	"context"
	"crypto/aes"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash"
	"io/fs"
	"math/big"
	"slices"
	"testing"

	"github.com/c2sp/wycheproof"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// hexBytes are bytes in hexadecimal.
type hexBytes []byte

func (b *hexBytes) UnmarshalText(text []byte) (err error) {
	*b, err = hex.DecodeString(string(text))
	return err
}

func (b hexBytes) number() *big.Int { return new(big.Int).SetBytes(b) }

// rsaVectors are Wycheproof's of decryption under one private key.
type rsaVectors struct {
	KeySize    int
	SHA        string
	MGFSHA     string
	PrivateKey struct {
		Modulus, PublicExponent, PrivateExponent, Prime1, Prime2 hexBytes
	}
	Tests []rsaVector
}

type rsaVector struct {
	ID             int `json:"tcId"`
	Comment        string
	Msg, CT, Label hexBytes
	Result         string
	Flags          []string
}

// gcmVectors are Wycheproof's of GCM with parameters of one size, in bits.
type gcmVectors struct {
	KeySize, IVSize, TagSize int
	Tests                    []struct {
		ID                         int `json:"tcId"`
		Key, IV, AAD, Msg, CT, Tag hexBytes
		Result                     string
	}
}

func vectors[V any](t testing.TB, file string) []V {
	t.Helper()
	data, err := fs.ReadFile(wycheproof.TestVectors, file)
	require.NoError(t, err)
	var out struct{ TestGroups []V }
	require.NoError(t, json.Unmarshal(data, &out))
	return out.TestGroups
}

// Wycheproof's ciphertexts under its own private keys, which the test puts on
// the token with the attributes of our pairs, through Import.
func TestWycheproofRSA(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	cfg := soft.Config()
	cfg.AllowPKCS1v15 = true
	token := open(t, cfg)
	for _, c := range []struct {
		alg   hsm.Algorithm
		sha   string // of the groups that are taken, for the label and for MGF1
		files []string
	}{
		{hsm.OAEPSHA1, "SHA-1", []string{"rsa_oaep_2048_sha1_mgf1sha1_test.json", "rsa_oaep_misc_test.json"}},
		{hsm.OAEPSHA256, "SHA-256", []string{
			"rsa_oaep_2048_sha256_mgf1sha256_test.json", "rsa_oaep_3072_sha256_mgf1sha256_test.json",
			"rsa_oaep_4096_sha256_mgf1sha256_test.json", "rsa_oaep_misc_test.json",
		}},
		{hsm.PKCS1v15, "", []string{"rsa_pkcs1_2048_test.json", "rsa_pkcs1_3072_test.json", "rsa_pkcs1_4096_test.json"}},
	} {
		t.Run(string(c.alg), func(t *testing.T) {
			if err := token.Offers(hsm.RSA2048, c.alg); err != nil {
				t.Skipf("%s: %v", soft.Module, err)
			}
			right, refused, sizes := 0, 0, map[int]bool{}
			for _, file := range c.files {
				for _, g := range vectors[rsaVectors](t, file) {
					if !slices.Contains([]int{2048, 3072, 4096}, g.KeySize) || g.SHA != c.sha || g.MGFSHA != c.sha {
						continue
					}
					sizes[g.KeySize] = true
					w := newWycheproofPair(t, soft, token, g, c.alg)
					for _, v := range g.Tests {
						name := fmt.Sprintf("%s: %d bits, vector %d, %s", file, g.KeySize, v.ID, v.Comment)
						good := v.good(t)
						right += w.check(t, name, v.CT, v.Msg, good)
						refused++
						if material, ct, ok := w.prolong(v); ok {
							right += w.check(t, name+", prolonged", ct, material, good)
							refused++
						}
					}
				}
			}
			refused -= right
			require.Equal(t, map[int]bool{2048: true, 3072: true, 4096: true}, sizes)
			require.Greater(t, right, 10)
			require.Greater(t, refused, 40)
			t.Logf("%d ciphertexts were measured right, %d refused", right, refused)
		})
	}
}

// good reports whether a customer's ciphertext may be like that: ours have no
// label.
func (v rsaVector) good(t testing.TB) bool {
	t.Helper()
	require.Contains(t, []string{"valid", "invalid"}, v.Result)
	return v.Result == "valid" && len(v.Label) == 0
}

// wycheproofPair is a private key of Wycheproof's on the token.
type wycheproofPair struct {
	*bench
	key *rsa.PrivateKey
}

func newWycheproofPair(t testing.TB, soft *softhsm.Token, token *hsm.Token, g rsaVectors, alg hsm.Algorithm) *wycheproofPair {
	t.Helper()
	k := g.PrivateKey
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: k.Modulus.number(), E: int(k.PublicExponent.number().Int64())},
		D:         k.PrivateExponent.number(),
		Primes:    []*big.Int{k.Prime1.number(), k.Prime2.number()},
	}
	key.Precompute()
	info, err := hsm.AdoptPairForTest(context.Background(), token, key, alg)
	require.NoError(t, err)
	return &wycheproofPair{&bench{soft: soft, token: token, pair: info, pub: &key.PublicKey}, key}
}

// check imports a ciphertext, one that decrypts to an AES key of some length as
// both kinds of material, and reports whether it was measured right as one.
func (w *wycheproofPair) check(t testing.TB, name string, ct, msg []byte, good bool) (measured int) {
	t.Helper()
	specs := []hsm.MaterialSpec{hsm.AES256}
	if good && slices.Contains([]int{16, 24, 32}, len(msg)) {
		specs = append(specs, hsm.SM4)
	}
	for _, spec := range specs {
		req := w.request(ct)
		req.Spec = spec
		out, err := w.token.Import(context.Background(), req)
		switch {
		case good && len(msg) == spec.Len():
			require.NoError(t, err, name)
			require.Equal(t, zeroBlock(t, msg)[:3], out.Identity.KCV[:], name)
			measured++
		case err == nil && w.pair.Algorithm == hsm.PKCS1v15 && w.token.ImplicitRejection():
			// What came out is random, and refused by who expects something.
			require.NotEqual(t, zeroBlock(t, msg)[:3], out.Identity.KCV[:], name)
		default:
			require.Equal(t, hsm.ErrInvalidMaterial, err, name)
			require.Zero(t, out, name)
		}
	}
	return measured
}

func zeroBlock(t testing.TB, key []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	require.NoError(t, err)
	out := make([]byte, aes.BlockSize)
	block.Encrypt(out, out)
	return out
}

// prolong makes of a vector one with 32 bytes in the place of the message,
// which the padding gives way to, and with the same fault, if it has one.
// Wycheproof's faulty ciphertexts carry a few bytes, which are refused for
// their length whatever becomes of the fault.
func (w *wycheproofPair) prolong(v rsaVector) (material, ct []byte, ok bool) {
	n := w.key.Size()
	if len(v.CT) != n || len(v.Msg) >= 32 || v.CT.number().Cmp(w.key.N) >= 0 {
		return nil, nil, false
	}
	material = make([]byte, 32)
	for i := range material {
		material[i] = byte(0xa0 + i) // nothing that ends a padding
	}
	// Of the padding neither the beginning nor the end is touched.
	splice := func(b []byte, keep int) []byte {
		return slices.Concat(b[:keep], b[keep+len(material)-len(v.Msg):len(b)-len(v.Msg)], material)
	}
	em := new(big.Int).Exp(v.CT.number(), w.key.D, w.key.N).FillBytes(make([]byte, n))
	switch w.pair.Algorithm {
	case hsm.PKCS1v15:
		em = splice(em, 20)
	case hsm.OAEPSHA256:
		em = spliceOAEP(em, sha256.New(), splice)
	default:
		em = spliceOAEP(em, sha1.New(), splice)
	}
	m := new(big.Int).SetBytes(em)
	return material, m.Exp(m, big.NewInt(int64(w.key.E)), w.key.N).FillBytes(make([]byte, n)), true
}

// spliceOAEP takes the masks of RFC 8017 section 7.1.1 off the data block, and
// puts them on again.
func spliceOAEP(em []byte, h hash.Hash, splice func(b []byte, keep int) []byte) []byte {
	seed, db := em[1:1+h.Size()], em[1+h.Size():]
	mask(seed, h, db)
	mask(db, h, seed)
	db = splice(db, h.Size()+5)
	mask(db, h, seed)
	mask(seed, h, db)
	return slices.Concat(em[:1], seed, db)
}

// mask is the exclusive or of b with MGF1; RFC 8017 appendix B.2.1.
func mask(b []byte, h hash.Hash, seed []byte) {
	var stream []byte
	for i := uint32(0); len(stream) < len(b); i++ {
		h.Reset()
		h.Write(seed)
		h.Write(binary.BigEndian.AppendUint32(nil, i))
		stream = h.Sum(stream)
	}
	for i := range b {
		b[i] ^= stream[i]
	}
}

// Wycheproof's GCM with keys that were imported as every customer's are.
func TestWycheproofGCM(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	for spec, file := range map[hsm.MaterialSpec]string{hsm.AES256: "aes_gcm_test.json", hsm.SM4: "sm4_gcm_test.json"} {
		t.Run(string(spec), func(t *testing.T) {
			if spec == hsm.SM4 {
				needSM(t, b.soft)
			}
			counts := map[string]int{}
			for _, g := range vectors[gcmVectors](t, file) {
				if g.KeySize != 8*spec.Len() || g.IVSize != 96 || g.TagSize != 128 {
					continue
				}
				for _, v := range g.Tests {
					req := b.request(b.wrap(t, v.Key))
					req.Spec = spec
					out, err := b.token.Import(ctx, req)
					require.NoError(t, err)
					key, err := b.token.OpenMaterial(ctx, out.Material)
					require.NoError(t, err)
					plain, err := key.Decrypt(ctx, []byte{}, slices.Concat(v.IV, v.CT, v.Tag), v.AAD)
					switch v.Result {
					case "valid":
						require.NoError(t, err, "vector %d", v.ID)
						require.Equal(t, []byte(v.Msg), plain, "vector %d", v.ID)
					default:
						require.Equal(t, "invalid", v.Result)
						require.ErrorIs(t, err, hsm.ErrAuthentication, "vector %d", v.ID)
						require.Empty(t, plain, "vector %d", v.ID)
					}
					counts[v.Result]++
					require.NoError(t, key.Close())
				}
			}
			require.Greater(t, counts["valid"], 30)
			require.Greater(t, counts["invalid"], 20)
			t.Logf("%v", counts)
		})
	}
}
