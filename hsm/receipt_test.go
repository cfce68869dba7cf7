package hsm_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// What the token signs verifies under the pinned key, by one private-key
// operation.
func TestSignReceipt(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	token := soft.Open(t)
	spki, err := token.ReceiptKey(t.Context())
	require.NoError(t, err)
	require.Equal(t, soft.Pins.ReceiptKey, hsm.Fingerprint(sha256.Sum256(spki)))
	require.Equal(t, soft.Pins.Serial, token.Serial())
	key, err := x509.ParsePKIXPublicKey(spki)
	require.NoError(t, err)
	tap := hsmtest.On(t, soft.Module)
	for range 64 { // one in 256 has a leading zero, which DER leaves out
		digest := [32]byte(random(32))
		tap.Reset()
		signature, err := token.SignReceipt(t.Context(), digest)
		require.NoError(t, err)
		require.Equal(t, 1, tap.Calls()["C_Sign"])
		require.True(t, ecdsa.VerifyASN1(key.(*ecdsa.PublicKey), digest[:], signature))
	}
}

// The pin decides which key signs, whatever else calls itself so.
func TestReceiptKeyIsPinned(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	p, s := user(t, soft)
	id := []byte("lookalike")
	_, _, err := p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)},
		[]*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"),
		}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_ID, id), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"),
		})
	require.NoError(t, err)
	require.NoError(t, p.Logout(s))
	token := soft.Open(t)
	spki, err := token.ReceiptKey(t.Context())
	require.NoError(t, err)
	require.Equal(t, soft.Pins.ReceiptKey, hsm.Fingerprint(sha256.Sum256(spki)))

	other := softhsm.New(t, softhsm.WithKeys())
	cfg := other.Config()
	cfg.Pins.ReceiptKey = soft.Pins.ReceiptKey
	_, err = hsm.Open(context.Background(), cfg)
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	cfg.Pins.ReceiptKey = hsm.Fingerprint{}
	without, err := hsm.Open(context.Background(), cfg)
	require.NoError(t, err)
	_, err = without.ReceiptKey(t.Context())
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	_, err = without.SignReceipt(t.Context(), [32]byte{})
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.NoError(t, without.Close())
}
