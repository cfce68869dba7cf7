package hsm_test

import (
	"context"
	"crypto/aes"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// No length but the right one is taken, though stock SoftHSM2 unwraps any
// length as an AES key, reports none, and seals odd ones zero-padded.
func TestImportTakesOneLength(t *testing.T) {
	for _, alg := range offered(t) {
		b := newBench(t, alg)
		for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
			t.Run(fmt.Sprintf("%s/%s", alg, spec), func(t *testing.T) {
				for n := range 65 {
					for _, tail := range []string{"random", "zero"} {
						material := random(n)
						if tail == "zero" {
							clear(material[n/2:])
						}
						req := b.request(b.wrap(t, material))
						req.Spec = spec
						out, err := b.token.Import(context.Background(), req)
						if n == spec.Len() {
							require.NoError(t, err, "%d bytes, %s tail", n, tail)
							require.Len(t, out.Material.Ref, n+8)
							continue
						}
						require.Equal(t, hsm.ErrInvalidMaterial, err, "%d bytes, %s tail", n, tail)
						require.Zero(t, out)
					}
				}
			})
		}
	}
}

func TestImportRefusesBadBlobsAlike(t *testing.T) {
	for _, alg := range offered(t) {
		t.Run(string(alg), func(t *testing.T) {
			b := newBench(t, alg)
			good := b.wrap(t, random(32))
			other := &bench{pair: b.pair}
			if alg == hsm.SM2PKE {
				_, other.sm2 = newSM2Pair(t, b.token)
			} else {
				_, other.pub = newPair(t, b.token, alg)
			}
			flipped := func(i int) []byte {
				out := append([]byte(nil), good...)
				out[i] ^= 0x10
				return out
			}
			ones := make([]byte, len(good))
			for i := range ones {
				ones[i] = 0xff // greater than every modulus
			}
			raw := ones
			if b.pub != nil {
				raw = b.pub.N.FillBytes(make([]byte, b.pub.Size()))
			}
			for name, blob := range map[string][]byte{
				"nil": nil, "empty": {}, "one byte": {1}, "truncated": good[:len(good)-1], "lengthened": append(append([]byte(nil), good...), 0),
				"first byte flipped": flipped(1), "last byte flipped": flipped(len(good) - 1), "another pair's": other.wrap(t, random(32)),
				"zeros": make([]byte, len(good)), "greater than the modulus": ones, "the modulus": raw, "random": random(len(good)),
			} {
				out, err := b.token.Import(context.Background(), b.request(blob))
				require.Equal(t, hsm.ErrInvalidMaterial, err, name)
				require.Zero(t, out, name)
			}
			_, err := b.token.Import(context.Background(), b.request(good))
			require.NoError(t, err, "the pair is as good as before")
		})
	}
}

// What the token measures is what the customer computes.
func TestImportMeasures(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
		for _, keyID := range []string{"k", "1234abcd-12ab-34cd-56ef-1234567890ab"} {
			material := random(spec.Len())
			req := b.request(b.wrap(t, material))
			req.Spec, req.Context = spec, []byte(keyID)
			out, err := b.token.Import(context.Background(), req)
			require.NoError(t, err)
			block, err := aes.NewCipher(material)
			require.NoError(t, err)
			var zero [16]byte
			block.Encrypt(zero[:], zero[:])
			require.Equal(t, zero[:3], out.Identity.KCV[:])
			if spec == hsm.SM4 && hasSM(b.soft) {
				kcv, err := byok.KCV("Aliyun_SM4", material)
				require.NoError(t, err)
				require.Equal(t, hsm.CheckValue{Algorithm: hsm.CheckValueSM4, Value: kcv}, out.CheckValue)
			} else {
				require.Equal(t, hsm.CheckValue{Algorithm: hsm.CheckValueAES, Value: out.Identity.KCV}, out.CheckValue)
			}
			id, err := byok.MaterialID(keyID, material)
			require.NoError(t, err)
			require.Equal(t, id, out.Identity.MaterialID)
		}
	}
}

func TestIdentityDependsOnMaterialAndContext(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	material := random(32)
	first, again := b.imported(t, material), b.imported(t, material)
	require.True(t, first.Identity.Equal(again.Identity))
	require.Equal(t, first.Material, again.Material, "RFC 3394 is deterministic")
	require.False(t, first.Identity.Equal(b.imported(t, random(32)).Identity))

	req := b.request(b.wrap(t, material))
	req.Context = []byte("key-2")
	elsewhere, err := b.token.Import(context.Background(), req)
	require.NoError(t, err)
	require.Equal(t, first.Identity.KCV, elsewhere.Identity.KCV)
	require.False(t, first.Identity.Equal(elsewhere.Identity))
	for _, half := range []int{0, 16} {
		mixed := first.Identity
		copy(mixed.MaterialID[half:half+16], elsewhere.Identity.MaterialID[half:half+16])
		require.False(t, first.Identity.Equal(mixed), "both halves count")
	}
}

func TestImportChecksTheRequest(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	good := b.request(b.wrap(t, random(32)))
	for name, c := range map[string]struct {
		change func(*hsm.ImportRequest)
		want   error
	}{
		"unknown spec":      {func(r *hsm.ImportRequest) { r.Spec = "DES" }, hsm.ErrUnsupported},
		"no spec":           {func(r *hsm.ImportRequest) { r.Spec = "" }, hsm.ErrUnsupported},
		"another algorithm": {func(r *hsm.ImportRequest) { r.Algorithm = hsm.PKCS1v15 }, hsm.ErrUnsupported},
		"unknown pair":      {func(r *hsm.ImportRequest) { r.Pair[0] ^= 1 }, hsm.ErrPairNotFound},
	} {
		req := good
		c.change(&req)
		_, err := b.token.Import(context.Background(), req)
		require.ErrorIs(t, err, c.want, name)
	}
}

// One import asks the token for the RSA operation once, and for nothing twice.
func TestCallsOfEachOperation(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	wrapped := b.wrap(t, random(32))
	imported, err := b.token.Import(ctx, b.request(wrapped))
	require.NoError(t, err)
	key, err := b.token.OpenMaterial(ctx, imported.Material)
	require.NoError(t, err)
	var sealed []byte
	// Every session of the pool that will be used is open by now but one.
	for range 32 {
		sealed, err = key.Encrypt(ctx, nil, []byte("x"), nil)
		require.NoError(t, err)
	}

	tap := hsmtest.On(t, b.soft.Module)
	calls := func(f func()) []string {
		tap.Reset()
		f()
		return tap.Sequence()
	}
	require.Equal(t, []string{
		"C_UnwrapKey", "C_GetAttributeValue", // unwrapped as asked
		"C_EncryptInit", "C_Encrypt", // KCV
		"C_SignInit", "C_Sign", "C_SignInit", "C_Sign", // material id
		"C_WrapKey", "C_DestroyObject",
	}, calls(func() { _, err = b.token.Import(ctx, b.request(wrapped)) }))
	require.NoError(t, err)

	var second *hsm.Key
	require.Equal(t, []string{"C_UnwrapKey"}, calls(func() { second, err = b.token.OpenMaterial(ctx, imported.Material) }))
	require.NoError(t, err)
	require.Equal(t, []string{"C_DestroyObject"}, calls(func() { err = second.Close() }))
	require.NoError(t, err)
	require.Equal(t, []string{"C_EncryptInit", "C_Encrypt"}, calls(func() { _, err = key.Encrypt(ctx, nil, []byte("x"), nil) }))
	require.NoError(t, err)
	require.Equal(t, []string{"C_DecryptInit", "C_Decrypt"}, calls(func() { _, err = key.Decrypt(ctx, nil, sealed, nil) }))
	require.NoError(t, err)
	require.Equal(t, []string{"C_SignInit", "C_Sign"}, calls(func() { _, err = b.token.MAC(ctx, "test") }))
	require.NoError(t, err)

	// Undecryptable and wrong-length blobs cost the known answer on top, and are
	// then tried again.
	knownAnswer := []string{"C_UnwrapKey", "C_EncryptInit", "C_Encrypt", "C_DestroyObject"}
	wrapped[7] ^= 1
	refused := slices.Concat([]string{"C_UnwrapKey"}, knownAnswer, []string{"C_UnwrapKey"})
	undecryptable := calls(func() { _, err = b.token.Import(ctx, b.request(wrapped)) })
	if len(undecryptable) > len(refused) {
		refused = append(refused, "C_CloseSession") // after CKR_GENERAL_ERROR, which may hide an object
	}
	require.Equal(t, refused, undecryptable)
	require.Equal(t, hsm.ErrInvalidMaterial, err)
	lengthSeen := []string{"C_UnwrapKey", "C_GetAttributeValue", "C_EncryptInit", "C_DestroyObject"}
	if hasSM(b.soft) {
		lengthSeen = []string{"C_UnwrapKey"} // our SoftHSM2 refuses lengths that are no AES key's itself
	}
	require.Equal(t, slices.Concat(lengthSeen, knownAnswer, lengthSeen),
		calls(func() { _, err = b.token.Import(ctx, b.request(b.wrap(t, random(31)))) }))
	require.Equal(t, hsm.ErrInvalidMaterial, err)
}

func TestImportUnderLargerPairs(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	for _, spec := range []hsm.PairSpec{hsm.RSA3072, hsm.RSA4096} {
		info, err := b.token.GeneratePair(context.Background(), instance, time.Now(), spec, hsm.OAEPSHA1)
		require.NoError(t, err)
		require.Equal(t, spec, info.Spec)
		pub := parse(t, info.SPKI)
		require.Equal(t, spec.Bits(), pub.N.BitLen())
		large := &bench{soft: b.soft, token: b.token, pair: info, pub: pub}
		material := random(32)
		require.Equal(t, b.imported(t, material), large.imported(t, material))
	}
}

// OpenSSL 3.2 and later answer a tampered v1.5 blob with a random key. Where
// the token's does not, the engine must not believe that it does.
func TestImplicitRejectionIsProbed(t *testing.T) {
	b := newBench(t, hsm.PKCS1v15)
	taken := 0
	for range 20 {
		blob := b.wrap(t, random(32))
		blob[100] ^= 1
		if _, err := b.token.Import(context.Background(), b.request(blob)); err == nil {
			taken++
		}
	}
	if !b.token.ImplicitRejection() {
		require.Zero(t, taken)
	}
}

func TestMaterialRoundTrip(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
		req := b.request(b.wrap(t, random(spec.Len())))
		req.Spec = spec
		out, err := b.token.Import(context.Background(), req)
		require.NoError(t, err)
		data, err := out.Material.MarshalBinary()
		require.NoError(t, err)
		var back hsm.Material
		require.NoError(t, back.UnmarshalBinary(data))
		require.Equal(t, out.Material, back)
		for n := range 36 {
			require.Error(t, back.UnmarshalBinary(data[:n]), "%d bytes", n)
		}
		for i := range 3 {
			wrong := append([]byte(nil), data...)
			wrong[i] ^= 0x80
			require.Error(t, back.UnmarshalBinary(wrong), "byte %d", i)
		}
	}
	_, err := hsm.Material{Spec: "DES"}.MarshalBinary()
	require.Error(t, err)
}

func TestMaterialOfAnotherVaultIsRefused(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	good := b.imported(t, random(32)).Material
	for name, change := range map[string]func(*hsm.Material){
		"vault":     func(m *hsm.Material) { m.Vault[0] ^= 1 },
		"custody":   func(m *hsm.Material) { m.Custody = 2 },
		"truncated": func(m *hsm.Material) { m.Ref = m.Ref[:32] },
		"tampered":  func(m *hsm.Material) { m.Ref[20] ^= 1 },
		"empty":     func(m *hsm.Material) { m.Ref = nil },
	} {
		m := good
		m.Ref = append([]byte(nil), good.Ref...)
		change(&m)
		_, err := b.token.OpenMaterial(ctx, m)
		require.ErrorIs(t, err, hsm.ErrUntrusted, name)
	}
	// SM4 material that was imported while there was no SM4.
	early := good
	early.Spec = hsm.SM4
	early.Ref = early.Ref[:24]
	_, err := b.token.OpenMaterial(ctx, early)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "SM4")
	key, err := b.token.OpenMaterial(ctx, good)
	require.NoError(t, err)
	require.NoError(t, key.Close())
}

// offered are the algorithms that the tests' token has.
func offered(t testing.TB) []hsm.Algorithm {
	t.Helper()
	soft := softhsm.New(t, softhsm.WithKeys())
	cfg := soft.Config()
	cfg.AllowPKCS1v15 = true
	token := open(t, cfg)
	var out []hsm.Algorithm
	for spec, algs := range map[hsm.PairSpec][]hsm.Algorithm{
		hsm.RSA2048: {hsm.OAEPSHA1, hsm.OAEPSHA256, hsm.PKCS1v15}, hsm.ECSM2: {hsm.SM2PKE},
	} {
		for _, alg := range algs {
			if token.Offers(spec, alg) == nil {
				out = append(out, alg)
			}
		}
	}
	require.Contains(t, out, hsm.OAEPSHA1)
	require.NoError(t, token.Close())
	return out
}

func parse(t testing.TB, spki []byte) *rsa.PublicKey {
	t.Helper()
	pub, err := x509.ParsePKIXPublicKey(spki)
	require.NoError(t, err)
	return pub.(*rsa.PublicKey)
}
