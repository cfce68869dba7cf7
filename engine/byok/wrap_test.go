package byok_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
)

// openssl runs the command, which must be installed.
func openssl(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "openssl %s: %s", strings.Join(args, " "), stderr.String())
	return out
}

// keyPair makes a pair with openssl: the file of its private half, and the
// SubjectPublicKeyInfo.
func keyPair(t testing.TB, args ...string) (file string, spki []byte) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "private.pem")
	openssl(t, nil, append([]string{"genpkey", "-quiet", "-out", file}, args...)...)
	return file, openssl(t, nil, "pkey", "-in", file, "-pubout", "-outform", "DER")
}

func rsaPair(t testing.TB, bits int) (file string, spki []byte) {
	t.Helper()
	return keyPair(t, "-algorithm", "RSA", "-pkeyopt", fmt.Sprintf("rsa_keygen_bits:%d", bits))
}

func sm2Pair(t testing.TB) (file string, spki []byte) {
	t.Helper()
	return keyPair(t, "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:SM2")
}

// randomMaterial is fresh for every test and never printed.
func randomMaterial(t testing.TB, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	_, err := rand.Read(b)
	require.NoError(t, err)
	return b
}

func TestOpenSSLUnwraps(t *testing.T) {
	oaep := func(hash string) []string {
		return []string{
			"-pkeyopt", "rsa_padding_mode:oaep", "-pkeyopt", "rsa_oaep_md:" + hash, "-pkeyopt", "rsa_mgf1_md:" + hash,
		}
	}
	options := map[string][]string{
		byok.OAEPSHA1:   oaep("sha1"),
		byok.OAEPSHA256: oaep("sha256"),
		byok.PKCS1v15:   {"-pkeyopt", "rsa_padding_mode:pkcs1"},
	}
	for _, bits := range []int{2048, 3072, 4096} {
		file, spki := rsaPair(t, bits)
		for algorithm, option := range options {
			for _, size := range []int{16, 32} {
				t.Run(fmt.Sprintf("%s/%d/%d", algorithm, bits, size), func(t *testing.T) {
					material := randomMaterial(t, size)
					wrapped, err := byok.Wrap(algorithm, spki, material)
					require.NoError(t, err)
					require.Len(t, wrapped, bits/8)
					again, err := byok.Wrap(algorithm, spki, material)
					require.NoError(t, err)
					require.NotEqual(t, wrapped, again)
					got := openssl(t, wrapped, append([]string{"pkeyutl", "-decrypt", "-inkey", file}, option...)...)
					require.True(t, bytes.Equal(material, got))
				})
			}
		}
	}
	file, spki := sm2Pair(t)
	for _, size := range []int{16, 32} {
		t.Run(fmt.Sprintf("%s/%d", byok.SM2PKE, size), func(t *testing.T) {
			for range cases() {
				material := randomMaterial(t, size)
				wrapped, err := byok.Wrap(byok.SM2PKE, spki, material)
				require.NoError(t, err)
				require.Len(t, wrapped, 65+32+size)
				require.EqualValues(t, 4, wrapped[0])
				// OpenSSL speaks only the ASN.1 form of GM/T 0009.
				der, err := sm2.PlainCiphertext2ASN1(wrapped, sm2.C1C3C2)
				require.NoError(t, err)
				require.True(t, bytes.Equal(material, openssl(t, der, "pkeyutl", "-decrypt", "-inkey", file)))
			}
		})
	}
}

// cases is how many random ones are compared with the openssl command.
func cases() int {
	if os.Getenv("KEYFERRY_SLOW") == "1" {
		return 200
	}
	return 10
}

func TestMaterialIsBoundedByThePadding(t *testing.T) {
	_, spki := rsaPair(t, 2048)
	for algorithm, room := range map[string]int{byok.OAEPSHA1: 214, byok.OAEPSHA256: 190, byok.PKCS1v15: 245} {
		_, err := byok.Wrap(algorithm, spki, make([]byte, room))
		require.NoError(t, err)
		_, err = byok.Wrap(algorithm, spki, make([]byte, room+1))
		require.ErrorIs(t, err, byok.ErrMaterial)
	}
}

func TestWrapRefuses(t *testing.T) {
	_, good := rsaPair(t, 2048)
	_, short := rsaPair(t, 1024)
	_, curve := sm2Pair(t)
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	nist, err := x509.MarshalPKIXPublicKey(p256.Public())
	require.NoError(t, err)
	parsed, err := x509.ParsePKIXPublicKey(good)
	require.NoError(t, err)
	pkcs1 := x509.MarshalPKCS1PublicKey(parsed.(*rsa.PublicKey))
	offCurve := bytes.Clone(curve)
	offCurve[len(offCurve)-1] ^= 1
	even, err := x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: parsed.(*rsa.PublicKey).N, E: 4})
	require.NoError(t, err)
	armoured := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: good})

	rsaAlgorithms := []string{byok.OAEPSHA1, byok.OAEPSHA256, byok.PKCS1v15}
	both := append([]string{byok.SM2PKE}, rsaAlgorithms...)
	for _, tc := range []struct {
		name       string
		algorithms []string
		spki       []byte
		material   []byte
		want       error
	}{
		{"no material", both, good, nil, byok.ErrMaterial},
		{"unknown algorithm", []string{"", "RSAES_OAEP_SHA_512", "rsaes_oaep_sha_1"}, good, make([]byte, 32), byok.ErrAlgorithm},
		{"no key", both, nil, make([]byte, 32), byok.ErrPublicKey},
		{"garbage", both, []byte("no key at all"), make([]byte, 32), byok.ErrPublicKey},
		{"truncated", both, good[:len(good)-1], make([]byte, 32), byok.ErrPublicKey},
		{"trailing byte", both, append(bytes.Clone(good), 0), make([]byte, 32), byok.ErrPublicKey},
		{"PEM", both, armoured, make([]byte, 32), byok.ErrPublicKey},
		{"PKCS #1", both, pkcs1, make([]byte, 32), byok.ErrPublicKey},
		{"1024 bits", rsaAlgorithms, short, make([]byte, 32), byok.ErrPublicKey},
		{"even exponent", rsaAlgorithms, even, make([]byte, 32), byok.ErrPublicKey},
		{"another kind of curve", both, nist, make([]byte, 32), byok.ErrPublicKey},
		{"SM2 for RSA", rsaAlgorithms, curve, make([]byte, 32), byok.ErrPublicKey},
		{"RSA for SM2", []string{byok.SM2PKE}, good, make([]byte, 32), byok.ErrPublicKey},
		{"truncated SM2", []string{byok.SM2PKE}, curve[:len(curve)-1], make([]byte, 32), byok.ErrPublicKey},
		{"trailing byte after SM2", []string{byok.SM2PKE}, append(bytes.Clone(curve), 0), make([]byte, 32), byok.ErrPublicKey},
		{"not on the curve", []string{byok.SM2PKE}, offCurve, make([]byte, 32), byok.ErrPublicKey},
	} {
		for _, algorithm := range tc.algorithms {
			t.Run(tc.name+"/"+algorithm, func(t *testing.T) {
				wrapped, err := byok.Wrap(algorithm, tc.spki, tc.material)
				require.ErrorIs(t, err, tc.want)
				require.Nil(t, wrapped)
			})
		}
	}
}

// What OpenSSL measures is what KCV answers, for random material.
func TestOpenSSLMeasuresTheSameKCV(t *testing.T) {
	for spec, cipher := range map[string]string{byok.AES256: "-aes-256-ecb", byok.SM4: "-sm4-ecb"} {
		for range cases() {
			material := randomMaterial(t, byok.MaterialLen(spec))
			block := openssl(t, make([]byte, 16), "enc", cipher, "-nopad", "-K", hex.EncodeToString(material))
			kcv, err := byok.KCV(spec, material)
			require.NoError(t, err)
			require.Equal(t, block[:3], kcv[:])
		}
	}
	require.Zero(t, byok.MaterialLen("Aliyun_AES_128"))
}

// A public key comes from outside: no bytes of it may panic.
func FuzzWrap(f *testing.F) {
	_, rsaKey := rsaPair(f, 2048)
	_, sm2Key := sm2Pair(f)
	f.Add(byok.OAEPSHA256, rsaKey)
	f.Add(byok.SM2PKE, sm2Key)
	f.Fuzz(func(t *testing.T, algorithm string, spki []byte) {
		wrapped, err := byok.Wrap(algorithm, spki, make([]byte, 16))
		require.Equal(t, err == nil, wrapped != nil)
	})
}

func Example() {
	// The public key is what GetParametersForImport answers, Base64 decoded. The
	// private half of this one was thrown away.
	publicKey, err := os.ReadFile("testdata/public-key.der")
	if err != nil {
		panic(err)
	}
	material := make([]byte, 32) // for the example; take random bytes
	wrapped, err := byok.Wrap(byok.OAEPSHA256, publicKey, material)
	if err != nil {
		panic(err)
	}
	kcv, err := byok.KCV(byok.AES256, material)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%d bytes to import, key check value %x\n", len(wrapped), kcv)
	// Output: 256 bytes to import, key check value dc95c0
}
