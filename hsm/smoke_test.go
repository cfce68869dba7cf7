package hsm_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

func TestSmoke(t *testing.T) {
	ctx := context.Background()
	tok := softhsm.New(t, softhsm.WithKeys()).Open(t)
	t.Log(tok.Offers(hsm.RSA2048, hsm.OAEPSHA1), tok.Offers(hsm.RSA2048, hsm.OAEPSHA256), tok.Offers(hsm.RSA4096, hsm.OAEPSHA1))
	info, err := tok.GeneratePair(ctx, "0123456789abcdef", hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	pub, err := x509.ParsePKIXPublicKey(info.SPKI)
	require.NoError(t, err)
	material := make([]byte, 32)
	_, _ = rand.Read(material)
	wrapped, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, pub.(*rsa.PublicKey), material, nil)
	require.NoError(t, err)
	req := hsm.ImportRequest{Pair: info.ID, Algorithm: hsm.OAEPSHA1, Wrapped: wrapped, Spec: hsm.AES256, Context: []byte("key")}
	imp, err := tok.Import(ctx, req)
	require.NoError(t, err)
	key, err := tok.OpenMaterial(ctx, imp.Material)
	require.NoError(t, err)
	ct, err := key.Encrypt(ctx, nil, []byte("hello"), []byte("aad"))
	require.NoError(t, err)
	pt, err := key.Decrypt(ctx, nil, ct, []byte("aad"))
	require.NoError(t, err)
	require.Equal(t, "hello", string(pt))
	_, err = key.Decrypt(ctx, nil, ct, []byte("aae"))
	require.ErrorIs(t, err, hsm.ErrAuthentication)
	require.NoError(t, key.Close())
	req.Wrapped[5] ^= 1
	_, err = tok.Import(ctx, req)
	require.Equal(t, hsm.ErrInvalidMaterial, err)
	pairs, err := tok.Pairs(ctx, "0123456789abcdef")
	require.NoError(t, err)
	require.Len(t, pairs, 1)
	require.NoError(t, tok.DestroyPair(ctx, info.ID))
	_, err = tok.Pair(ctx, info.ID)
	require.ErrorIs(t, err, hsm.ErrPairNotFound)
}
