package contract

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

// wrapAny wraps what package byok, which is for customers, refuses to.
func wrapAny(t *testing.T, alg hsm.Algorithm, pair hsm.PairInfo, material []byte) []byte {
	t.Helper()
	parsed, err := x509.ParsePKIXPublicKey(pair.SPKI)
	require.NoError(t, err)
	pub := parsed.(*rsa.PublicKey)
	var blob []byte
	switch alg {
	case hsm.PKCS1v15:
		blob, err = rsa.EncryptPKCS1v15(rand.Reader, pub, material)
	case hsm.OAEPSHA256:
		blob, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, material, nil)
	default:
		blob, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, material, nil)
	}
	require.NoError(t, err)
	return blob
}
