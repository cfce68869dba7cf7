package hsm_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// How long and how often a test looks for what must come.
const (
	waitFor = 30 * time.Second
	tick    = time.Millisecond
)

// instance marks the pairs of these tests.
const instance = "0123456789abcdef"

// bench is a token with one wrapping pair.
type bench struct {
	soft  *softhsm.Token
	token *hsm.Token
	pair  hsm.PairInfo
	pub   *rsa.PublicKey
	sm2   *ecdsa.PublicKey // of an SM2 pair
}

func newBench(t testing.TB, alg hsm.Algorithm, change ...func(*hsm.Config)) *bench {
	t.Helper()
	b := &bench{soft: softhsm.New(t, softhsm.WithKeys())}
	cfg := b.soft.Config()
	cfg.AllowPKCS1v15 = alg == hsm.PKCS1v15
	for _, f := range change {
		f(&cfg)
	}
	b.token = open(t, cfg)
	if alg == hsm.SM2PKE {
		needSM(t, b.soft)
		b.pair, b.sm2 = newSM2Pair(t, b.token)
	} else {
		b.pair, b.pub = newPair(t, b.token, alg)
	}
	return b
}

func newSM2Pair(t testing.TB, token *hsm.Token) (hsm.PairInfo, *ecdsa.PublicKey) {
	t.Helper()
	info, err := token.GeneratePair(context.Background(), instance, time.Now(), hsm.ECSM2, hsm.SM2PKE)
	require.NoError(t, err)
	return info, parseSM2(t, info.SPKI)
}

func parseSM2(t testing.TB, spki []byte) *ecdsa.PublicKey {
	t.Helper()
	pub, err := smx509.ParsePKIXPublicKey(spki)
	require.NoError(t, err)
	return pub.(*ecdsa.PublicKey)
}

func open(t testing.TB, cfg hsm.Config) *hsm.Token {
	t.Helper()
	token, err := hsm.Open(context.Background(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	return token
}

func newPair(t testing.TB, token *hsm.Token, alg hsm.Algorithm) (hsm.PairInfo, *rsa.PublicKey) {
	t.Helper()
	info, err := token.GeneratePair(context.Background(), instance, time.Now(), hsm.RSA2048, alg)
	require.NoError(t, err)
	return info, parse(t, info.SPKI)
}

// hasSM reports whether the token speaks SM4 and SM2: our own SoftHSM2 does,
// the distribution's does not.
func hasSM(soft *softhsm.Token) bool { return soft.Pins.VaultSM4 != hsm.Fingerprint{} }

// needSM skips a test on a token without SM. "make test" runs the tests on
// both kinds of token.
func needSM(t testing.TB, soft *softhsm.Token) {
	t.Helper()
	if !hasSM(soft) {
		t.Skipf("%s has neither SM4 nor SM2: build ours by \"make softhsm\" and name it in KEYFERRY_SOFTHSM_MODULE", soft.Module)
	}
}

// wrap wraps as a customer does.
func (b *bench) wrap(t testing.TB, material []byte) []byte {
	t.Helper()
	var out []byte
	var err error
	switch b.pair.Algorithm {
	case hsm.PKCS1v15:
		out, err = rsa.EncryptPKCS1v15(rand.Reader, b.pub, material)
	case hsm.OAEPSHA256:
		out, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, b.pub, material, nil)
	case hsm.SM2PKE:
		out, err = sm2.Encrypt(rand.Reader, b.sm2, material, sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2))
	default:
		out, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, b.pub, material, nil)
	}
	require.NoError(t, err)
	return out
}

func (b *bench) request(wrapped []byte) hsm.ImportRequest {
	return hsm.ImportRequest{
		Pair: b.pair.ID, Algorithm: b.pair.Algorithm, Wrapped: wrapped, Spec: hsm.AES256, Context: []byte("key-1"),
	}
}

func (b *bench) imported(t testing.TB, material []byte) hsm.Imported {
	t.Helper()
	out, err := b.token.Import(context.Background(), b.request(b.wrap(t, material)))
	require.NoError(t, err)
	return out
}

func (b *bench) opened(t testing.TB, material []byte) *hsm.Key {
	t.Helper()
	key, err := b.token.OpenMaterial(context.Background(), b.imported(t, material).Material)
	require.NoError(t, err)
	return key
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
