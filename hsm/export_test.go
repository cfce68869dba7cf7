package hsm

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// MeasuredForTest is the template of customers' unwraps for another client of
// PKCS#11, such as thieves.
func MeasuredForTest() []*pkcs11.Attribute { return foreign(measured()) }

// ResidentForTest is the template of resident material, likewise.
func ResidentForTest() []*pkcs11.Attribute { return foreign(resident()) }

// HandleForTest is the handle of open material.
func HandleForTest(k *Key) pkcs11.ObjectHandle { return pkcs11.ObjectHandle(k.handle) }

func foreign(attrs []p11.Attr) []*pkcs11.Attribute {
	var out []*pkcs11.Attribute
	for _, a := range attrs {
		out = append(out, &pkcs11.Attribute{Type: uint(a.Type), Value: a.Value()})
	}
	return out
}

// CopyVaultForTest copies the vault key with an empty template, which
// miekg/pkcs11 cannot pass: the one copy that the token lets a user make.
func CopyVaultForTest(ctx context.Context, t *Token) error {
	return t.do(ctx, "copy the vault", func(c *connection, s *session) error {
		_, err := s.CopyObject(c.vaults[AES256].handle, p11.NewTemplate())
		return err
	})
}

// SM2BlobForTest is the mechanism by which a token of those numbers unwraps a
// customer's ciphertext, and what it is given.
func SM2BlobForTest(n SM2Numbers, blob []byte) (mechanism uint32, out []byte, err error) {
	m, out, err := n.sm2Blob(blob)
	return uint32(m), out, err
}

// AdoptPairForTest puts an RSA private key that the test knows on the token,
// as a session object that unwraps as wrapping pairs do, and lets Import take
// it for a pair. It lives as long as the token's connection.
func AdoptPairForTest(ctx context.Context, t *Token, key *rsa.PrivateKey, alg Algorithm) (PairInfo, error) {
	c, err := t.connection(ctx)
	if err != nil {
		return PairInfo{}, err
	}
	p := &pair{PairInfo: PairInfo{Algorithm: alg, Custody: Sealed}, rsa: &key.PublicKey}
	if _, err := rand.Read(p.ID[:]); err != nil {
		return PairInfo{}, err
	}
	// The components of PKCS#11 v2.40 mechanisms section 2.1.3.
	parts := []p11.Attr{p11.Bytes(p11.Modulus, key.N.Bytes()), p11.Bytes(p11.PublicExponent, big.NewInt(int64(key.E)).Bytes())}
	for i, n := range []*big.Int{key.D, key.Primes[0], key.Primes[1], key.Precomputed.Dp, key.Precomputed.Dq, key.Precomputed.Qinv} {
		const privateExponent = 0x123 // and the others, in this order
		parts = append(parts, p11.Bytes(privateExponent+p11.Attribute(i), n.Bytes()))
	}
	s := <-c.keepers
	defer func() { c.keepers <- s }()
	p.handle, err = s.CreateObject(c.rules.template(join(parts, wrappingPrivate(p11.KeyRSA, p.ID[:], "keyferry test", mechanism(alg)))...))
	if err != nil {
		return PairInfo{}, err
	}
	c.pairs.Store(p.ID, p)
	return p.PairInfo, nil
}

// ForgetFlapsForTest has the next loss of a token taken for the first.
func ForgetFlapsForTest(t *Token) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flap = 0
}

// ForgetPairsForTest has pairs searched for in the token again.
func ForgetPairsForTest(t *Token) {
	if c := t.conn.Load(); c != nil {
		c.pairs.Clear()
	}
}

// LoseForTest has the token opened anew.
func LoseForTest(t *Token) {
	if c := t.conn.Load(); c != nil {
		t.lost(c, errConnectionLost)
	}
}

// OpenHalfForTest opens what carries no CKM_AES_KEY_WRAP, such as the RPC of
// p11-kit: the pool, the MAC key and the search for pairs, without vaults.
func OpenHalfForTest(ctx context.Context, cfg Config) (*Token, error) {
	return openBy(ctx, cfg, func(c *connection, s *p11.Session) error {
		macs, handles, err := macKeys(s, c.rules)
		i := slices.Index(macs, cfg.Pins.MACKey)
		if err != nil || i < 0 {
			return fault("find half of the token's keys", errors.Join(err, ErrUnavailable))
		}
		c.measured = c.rules.template(measured()...)
		c.mac, c.caps = handles[i], &Capabilities{wrapping: map[Algorithm]error{OAEPSHA1: nil}, maxModulus: RSA2048.Bits()}
		return nil
	})
}
