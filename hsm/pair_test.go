package hsm_test

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
)

func TestPairLifecycle(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	require.Equal(t, hsm.RSA2048, b.pair.Spec)
	require.Equal(t, hsm.OAEPSHA1, b.pair.Algorithm)
	require.Equal(t, hsm.Fingerprint(sha256.Sum256(b.pair.SPKI)), b.pair.Fingerprint)
	again, err := b.token.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
	require.Equal(t, b.pair, again)

	// A fresh connection finds and verifies the same.
	require.NoError(t, b.token.Close())
	token := open(t, b.soft.Config())
	again, err = token.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
	require.Equal(t, b.pair, again)

	other, _ := newPair(t, token, hsm.OAEPSHA1)
	require.NotEqual(t, other.Fingerprint, b.pair.Fingerprint)
	list, err := token.Pairs(ctx, instance)
	require.NoError(t, err)
	require.Len(t, list, 2)
	for _, p := range list {
		require.Contains(t, []hsm.PairID{b.pair.ID, other.ID}, p.ID)
		require.NotZero(t, p.CreatedAt)
	}
	list, err = token.Pairs(ctx, "another-instance")
	require.NoError(t, err)
	require.Empty(t, list)

	for range 2 {
		require.NoError(t, token.DestroyPair(ctx, other.ID))
	}
	_, err = token.Pair(ctx, other.ID)
	require.ErrorIs(t, err, hsm.ErrPairNotFound)
	_, err = token.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
}

// Destroyed behind our back, as by another node: the handle that is kept does
// not hide it.
func TestPairDestroyedElsewhere(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	req := b.request(b.wrap(t, random(32)))
	p, s := user(t, b.soft)
	for _, o := range find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_ID, b.pair.ID[:])) {
		require.NoError(t, p.DestroyObject(s, o))
	}
	_, err := b.token.Import(context.Background(), req)
	require.ErrorIs(t, err, hsm.ErrPairNotFound)
}

func TestPairsAreOfferedAsProven(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	require.NoError(t, b.token.Offers(hsm.RSA2048, hsm.OAEPSHA1))
	for _, c := range []struct {
		spec hsm.PairSpec
		alg  hsm.Algorithm
		text string
	}{
		{hsm.RSA2048, hsm.PKCS1v15, "switched off"},
		{hsm.RSA2048, "RSAES_OAEP_SHA_512", "RSAES_OAEP_SHA_512"},
		{"RSA_1024", hsm.OAEPSHA1, "RSA_1024"},
		{hsm.ECSM2, hsm.OAEPSHA1, "EC_SM2"},
		{hsm.RSA2048, hsm.SM2PKE, "SM2PKE"},
		{"", "", "wrapping"},
	} {
		err := b.token.Offers(c.spec, c.alg)
		require.ErrorIs(t, err, hsm.ErrUnsupported)
		require.ErrorContains(t, err, c.text)
		_, err = b.token.GeneratePair(ctx, instance, time.Now(), c.spec, c.alg)
		require.ErrorIs(t, err, hsm.ErrUnsupported)
	}
}

// The pair's private half is only good for what it is for; the token refuses
// the rest to whoever has the PIN.
func TestPairIsGuarded(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	blob := b.wrap(t, random(32))
	p, s := user(t, b.soft)
	found := find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_ID, b.pair.ID[:]))
	require.Len(t, found, 1, "the public half is not kept")
	priv := found[0]
	oaep := pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))
	require.Error(t, p.DecryptInit(s, []*pkcs11.Mechanism{oaep}, priv))
	require.Error(t, p.SignInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_X_509, nil)}, priv))
	_, err := p.GetAttributeValue(s, priv, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_PRIVATE_EXPONENT, nil)})
	require.Error(t, err)
	require.Error(t, p.SetAttributeValue(s, priv, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true)}))
	_, err = p.CopyObject(s, priv, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true)})
	require.Error(t, err)
	_, err = p.UnwrapKey(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}, priv, blob, hsm.MeasuredForTest())
	require.Equal(t, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID), err, "the one mechanism of its algorithm")
	for _, weaker := range []uint{pkcs11.CKA_SENSITIVE, pkcs11.CKA_WRAP_WITH_TRUSTED, pkcs11.CKA_PRIVATE} {
		attrs := hsm.MeasuredForTest()
		for _, a := range attrs {
			if a.Type == weaker {
				a.Value = []byte{0}
			}
		}
		_, err = p.UnwrapKey(s, []*pkcs11.Mechanism{oaep}, priv, blob, attrs)
		require.Error(t, err)
	}
	o, err := p.UnwrapKey(s, []*pkcs11.Mechanism{oaep}, priv, blob, hsm.MeasuredForTest())
	require.NoError(t, err, "with our own template it works: the refusals above are the pins'")
	_, err = p.GetAttributeValue(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
	require.Error(t, err)
}

// A thief with the PIN puts a pair of his own in the place of ours.
func TestSubstitutedPairIsRefused(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	yes, no := true, false
	cases := []struct {
		name                                      string
		decrypt, copyable, sensitive, extractable bool
		mechanisms                                []uint
	}{
		{"decrypts", yes, no, yes, no, nil},
		{"can be twin", no, yes, yes, no, nil},
		{"readable", no, no, no, no, nil},
		{"extractable", no, no, yes, yes, nil},
		{"no unwrap template, else like ours", no, no, yes, no, []uint{pkcs11.CKM_RSA_PKCS_OAEP}},
	}
	pairs, keys := make([]hsm.PairInfo, len(cases)), make([]*rsa.PublicKey, len(cases))
	for i := range cases {
		pairs[i], keys[i] = newPair(t, b.token, hsm.OAEPSHA1)
	}
	p, s := user(t, b.soft)
	at := pkcs11.NewAttribute
	for i, c := range cases {
		ours := find(t, p, s, at(pkcs11.CKA_ID, pairs[i].ID[:]))[0]
		label, err := p.GetAttributeValue(s, ours, []*pkcs11.Attribute{at(pkcs11.CKA_LABEL, nil)})
		require.NoError(t, err)
		private := []*pkcs11.Attribute{
			at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, true), at(pkcs11.CKA_ID, pairs[i].ID[:]), at(pkcs11.CKA_LABEL, label[0].Value),
			at(pkcs11.CKA_SENSITIVE, c.sensitive), at(pkcs11.CKA_EXTRACTABLE, c.extractable), at(pkcs11.CKA_DECRYPT, c.decrypt),
			at(pkcs11.CKA_SIGN, false), at(pkcs11.CKA_SIGN_RECOVER, false), at(pkcs11.CKA_DERIVE, false), at(pkcs11.CKA_UNWRAP, true),
		}
		if c.mechanisms != nil {
			private = append(private, at(pkcs11.CKA_ALLOWED_MECHANISMS, []byte{9, 0, 0, 0, 0, 0, 0, 0}))
		}
		private = append(private, at(pkcs11.CKA_COPYABLE, c.copyable), at(pkcs11.CKA_MODIFIABLE, false))
		_, _, err = p.GenerateKeyPair(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)},
			[]*pkcs11.Attribute{at(pkcs11.CKA_MODULUS_BITS, 2048), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})}, private)
		require.NoError(t, err, c.name)
	}

	// Beside ours they are passed over, instead of ours refused.
	require.NoError(t, b.token.Close())
	token := open(t, b.soft.Config())
	for i, c := range cases {
		info, err := token.Pair(ctx, pairs[i].ID)
		require.NoError(t, err, c.name)
		require.Equal(t, pairs[i], info, c.name)
	}
	require.NoError(t, token.Close())

	p, s = user(t, b.soft)
	for i := range cases {
		for _, o := range find(t, p, s, at(pkcs11.CKA_ID, pairs[i].ID[:])) {
			n, err := p.GetAttributeValue(s, o, []*pkcs11.Attribute{at(pkcs11.CKA_MODULUS, nil)})
			require.NoError(t, err)
			if bytes.Equal(n[0].Value, keys[i].N.Bytes()) {
				require.NoError(t, p.DestroyObject(s, o))
			}
		}
	}
	require.NoError(t, p.Logout(s))
	token = open(t, b.soft.Config())
	for i, c := range cases {
		_, err := token.Pair(ctx, pairs[i].ID)
		require.ErrorIs(t, err, hsm.ErrUntrusted, c.name)
	}
}

// A pair that fails its known answer is not handed out.
func TestGeneratedPairIsProven(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	before, err := b.token.Pairs(context.Background(), instance)
	require.NoError(t, err)
	tap := hsmtest.On(t, b.soft.Module)
	tap.Inject(hsmtest.Fault{Call: "C_UnwrapKey", RV: pkcs11.CKR_FUNCTION_FAILED, Times: -1})
	_, err = b.token.GeneratePair(context.Background(), instance, time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.Equal(t, 3, tap.Heal(), "tried with three sessions")
	after, err := b.token.Pairs(context.Background(), instance)
	require.NoError(t, err)
	require.ElementsMatch(t, before, after)
}
