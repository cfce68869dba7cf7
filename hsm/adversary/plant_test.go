package adversary

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"

	"github.com/miekg/pkcs11"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/adversary/thief"
)

// plant puts look-alikes of our objects beside or in the place of ours and
// waits for the server to take them. Here it is for the server to notice; hsm's
// own tests have the coarser ones.
func plant(g *group) {
	at := pkcs11.NewAttribute
	if err := g.token.Close(); err != nil {
		g.t.Fatal(err)
	}
	// What the thief reads of ours and can say of his own.
	aes := []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, true),
		at(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1"), at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, false),
		at(pkcs11.CKA_WRAP, true), at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_ENCRYPT, false), at(pkcs11.CKA_DECRYPT, false),
		at(pkcs11.CKA_SIGN, false), at(pkcs11.CKA_VERIFY, false), at(pkcs11.CKA_DERIVE, false),
		at(pkcs11.CKA_ALLOWED_MECHANISMS, thief.ULong(pkcs11.CKM_AES_KEY_WRAP)), at(pkcs11.CKA_UNWRAP_TEMPLATE, thief.Nested(g.vaultPins)),
		at(pkcs11.CKA_DESTROYABLE, false),
	}
	mac := []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), at(pkcs11.CKA_TOKEN, true),
		at(pkcs11.CKA_PRIVATE, true), at(pkcs11.CKA_LABEL, "keyferry mac HMAC-SHA-256 v1"), at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, false),
		at(pkcs11.CKA_SIGN, true), at(pkcs11.CKA_VERIFY, false), at(pkcs11.CKA_ENCRYPT, false), at(pkcs11.CKA_DECRYPT, false),
		at(pkcs11.CKA_WRAP, false), at(pkcs11.CKA_UNWRAP, false), at(pkcs11.CKA_DERIVE, false),
		at(pkcs11.CKA_ALLOWED_MECHANISMS, thief.ULong(pkcs11.CKM_SHA256_HMAC)), at(pkcs11.CKA_DESTROYABLE, false),
	}
	last := []*pkcs11.Attribute{at(pkcs11.CKA_COPYABLE, false), at(pkcs11.CKA_MODIFIABLE, false)}
	value := at(pkcs11.CKA_VALUE, random(32))
	length := at(pkcs11.CKA_VALUE_LEN, 32)
	join := func(lists ...[]*pkcs11.Attribute) (out []*pkcs11.Attribute) {
		for _, l := range lists {
			out = append(out, l...)
		}
		return out
	}
	for name, put := range map[string]func() error{
		"S1/vault of known value":                func() error { return g.create(join(aes, []*pkcs11.Attribute{value})) },
		"S1/vault of known value, frozen":        func() error { return g.create(join(aes, []*pkcs11.Attribute{value}, last)) },
		"S1/vault generated without CKA_TRUSTED": func() error { return g.generate(pkcs11.CKM_AES_KEY_GEN, join(aes, []*pkcs11.Attribute{length})) },
		"S1/MAC key of known value":              func() error { return g.create(join(mac, []*pkcs11.Attribute{value}, last)) },
		"S1/MAC key that equals ours but in its value": func() error {
			return g.generate(pkcs11.CKM_GENERIC_SECRET_KEY_GEN, join(mac, []*pkcs11.Attribute{length}, last))
		},
		"S1/certificate of the pair's identifier": func() error {
			return g.create([]*pkcs11.Attribute{
				at(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), at(pkcs11.CKA_CERTIFICATE_TYPE, pkcs11.CKC_X_509), at(pkcs11.CKA_TOKEN, true),
				at(pkcs11.CKA_ID, g.pair.ID[:]), at(pkcs11.CKA_SUBJECT, []byte{0x30, 0}), at(pkcs11.CKA_VALUE, []byte{0x30, 0}),
			})
		},
		"T7/public half of the thief's": g.publicHalf,
	} {
		g.try(name, byServer(hsm.ErrUntrusted), func() error {
			if err := put(); err != nil {
				return err
			}
			return g.taken()
		})
	}

	// T8: a private half of known value, right in everything that can be said.
	own, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		g.t.Fatal(err)
	}
	label, err := g.bytes(g.wrapping.handle, pkcs11.CKA_LABEL)
	if err != nil {
		g.t.Fatal(err)
	}
	private := join([]*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, true),
		at(pkcs11.CKA_LABEL, label), at(pkcs11.CKA_ID, g.pair.ID[:]), at(pkcs11.CKA_SENSITIVE, true), at(pkcs11.CKA_EXTRACTABLE, false),
		at(pkcs11.CKA_DECRYPT, false), at(pkcs11.CKA_SIGN, false), at(pkcs11.CKA_SIGN_RECOVER, false), at(pkcs11.CKA_DERIVE, false),
		at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_ALLOWED_MECHANISMS, thief.ULong(pkcs11.CKM_RSA_PKCS_OAEP)),
		at(pkcs11.CKA_UNWRAP_TEMPLATE, thief.Nested(g.pairPins)),
	})
	g.try("T8/known pair beside ours", byServer(hsm.ErrUntrusted), func() error {
		if err := g.create(join(private, known(own), last)); err != nil {
			return err
		}
		return g.taken()
	})
	// In all but its value this is ours: the thief had the token generate it. He
	// does not know it, but two pairs of one name are refused.
	g.try("D/own pair that equals ours beside it", byServer(hsm.ErrUntrusted), func() error {
		_, _, err := g.p.GenerateKeyPair(g.s, mechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN),
			[]*pkcs11.Attribute{at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_MODULUS_BITS, 2048), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1})},
			join(private[2:], last))
		if err != nil {
			return err
		}
		return g.taken()
	})
	g.try("D1/destroy the pair", hole("D1"), func() error { return g.p.DestroyObject(g.s, g.wrapping.handle) })
	g.try("T7/own pair in the place of ours, which the store tells by its fingerprint", verdict{}, func() error {
		// It passes as a pair, for it is as good as ours; that it is another one
		// shows in its public key.
		token, err := hsm.Open(context.Background(), g.soft.Config())
		if err != nil {
			return err
		}
		defer func() { _ = token.Close() }()
		info, err := token.Pair(context.Background(), g.pair.ID)
		if err == nil && info.Fingerprint != g.pair.Fingerprint {
			return errHarmless
		}
		return err
	})
}

// taken is nil if the server takes something of the thief's for its own, and
// errHarmless if it works with its own as before.
func (g *group) taken() error {
	ctx := context.Background()
	token, err := hsm.Open(ctx, g.soft.Config())
	if err != nil {
		return err
	}
	defer func() { _ = token.Close() }()
	info, err := token.Pair(ctx, g.pair.ID)
	if err != nil {
		return err
	}
	if info.Fingerprint != g.pair.Fingerprint || !bytes.Equal(info.SPKI, g.pair.SPKI) {
		return nil
	}
	out, err := token.Import(ctx, hsm.ImportRequest{
		Pair: g.pair.ID, Algorithm: g.pair.Algorithm, Wrapped: g.captured, Spec: hsm.AES256, Context: []byte("key-1"),
	})
	if err != nil {
		return err
	}
	if !bytes.Equal(out.Material.Ref, g.sealed.Ref) {
		return nil // sealed under another vault
	}
	return errHarmless
}

func (g *group) create(attrs []*pkcs11.Attribute) error {
	_, err := g.p.CreateObject(g.s, attrs)
	return err
}

func (g *group) generate(m uint, attrs []*pkcs11.Attribute) error {
	var rest []*pkcs11.Attribute
	for _, a := range attrs { // the class and the type go without saying
		if a.Type != pkcs11.CKA_CLASS && a.Type != pkcs11.CKA_KEY_TYPE {
			rest = append(rest, a)
		}
	}
	_, err := g.p.GenerateKey(g.s, mechanism(m), rest)
	return err
}

// publicHalf makes a public key of the thief's that bears the pair's name.
func (g *group) publicHalf() error {
	at := pkcs11.NewAttribute
	return g.create([]*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), at(pkcs11.CKA_TOKEN, true),
		at(pkcs11.CKA_ID, g.pair.ID[:]), at(pkcs11.CKA_MODULUS, random(256)), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
	})
}

// known are the attributes of a private key's value.
func known(k *rsa.PrivateKey) []*pkcs11.Attribute {
	at := pkcs11.NewAttribute
	return []*pkcs11.Attribute{
		at(pkcs11.CKA_MODULUS, k.N.Bytes()), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}), at(pkcs11.CKA_PRIVATE_EXPONENT, k.D.Bytes()),
		at(pkcs11.CKA_PRIME_1, k.Primes[0].Bytes()), at(pkcs11.CKA_PRIME_2, k.Primes[1].Bytes()), at(pkcs11.CKA_EXPONENT_1, k.Precomputed.Dp.Bytes()),
		at(pkcs11.CKA_EXPONENT_2, k.Precomputed.Dq.Bytes()), at(pkcs11.CKA_COEFFICIENT, k.Precomputed.Qinv.Bytes()),
	}
}
