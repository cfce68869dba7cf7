package adversary

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/adversary/thief"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// instance marks the pairs of this suite.
const instance = "0123456789abcdef"

// object is one of those that a thief is after.
type object struct {
	name   string
	handle pkcs11.ObjectHandle
	class  uint
}

func (o object) id() uint { return uint(o.handle) }

// scene is a token as Keyferry uses it, and a thief on it: logged in, with the
// database and a customer's request that was overheard.
type scene struct {
	report *report
	soft   *softhsm.Token
	token  *hsm.Token // open as the server has it; it logged the process in
	pair   hsm.PairInfo
	pub    *rsa.PublicKey

	material []byte       // what nobody may learn
	captured []byte       // as the customer wrapped it
	sealed   hsm.Material // as the database has it
	key      *hsm.Key     // as the server has it open

	p    *pkcs11.Ctx
	slot uint
	s    pkcs11.SessionHandle // the thief's
	raw  *thief.Module

	vault, mac, receipt, receiptPublic, wrapping, measured, opened object
	vaultPins, pairPins                                            []thief.Attribute

	// Of a token with SM4 and SM2; their handles are 0 on others.
	vaultSM4, openedSM4, wrappingSM2 object
}

// newScene sets the stage with a pair of one algorithm.
func newScene(t *testing.T, r *report, alg hsm.Algorithm) *scene {
	t.Helper()
	ctx := context.Background()
	s := &scene{report: r, soft: softhsm.New(t, softhsm.WithKeys())}
	cfg := s.soft.Config()
	cfg.AllowPKCS1v15 = alg == hsm.PKCS1v15
	var err error
	s.token, err = hsm.Open(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.token.Close()) })
	r.ours = s.token.Usable(hsm.SM4) == nil // no other SoftHSM2 speaks SM4

	s.pair, err = s.token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, alg)
	require.NoError(t, err)
	spki, err := x509.ParsePKIXPublicKey(s.pair.SPKI)
	require.NoError(t, err)
	s.pub = spki.(*rsa.PublicKey)
	s.material = random(32)
	s.captured, err = byok.Wrap(string(alg), s.pair.SPKI, s.material)
	require.NoError(t, err)
	s.sealed = s.imported(t, hsm.AES256)
	s.key, err = s.token.OpenMaterial(ctx, s.sealed)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.key.Close()) })

	s.enter(t)
	at := pkcs11.NewAttribute
	s.opened = s.only(t, "opened material", at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
	s.vault = s.only(t, "vault", at(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1"))
	s.mac = s.only(t, "MAC key", at(pkcs11.CKA_LABEL, "keyferry mac HMAC-SHA-256 v1"))
	s.receipt = s.only(t, "receipt key", at(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"), at(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	s.receiptPublic = s.only(t, "receipt public key", at(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"), at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
	s.wrapping = s.only(t, "wrapping pair", at(pkcs11.CKA_ID, s.pair.ID[:]))
	s.pairPins, err = s.raw.UnwrapTemplate(uint(s.s), s.wrapping.id())
	require.NoError(t, err)
	s.vaultPins, err = s.raw.UnwrapTemplate(uint(s.s), s.vault.id())
	require.NoError(t, err)
	// The thief unwraps what he overheard, exactly as the server does.
	h, code := s.unwrapCaptured(s.pairPins)
	require.NoError(t, rv(code))
	s.measured = object{"measured material", pkcs11.ObjectHandle(h), pkcs11.CKO_SECRET_KEY}
	if s.report.ours {
		s.enterSM(t)
	}
	return s
}

// enterSM adds what only a token with SM4 and SM2 has.
func (s *scene) enterSM(t *testing.T) {
	t.Helper()
	ctx, at := context.Background(), pkcs11.NewAttribute
	s.vaultSM4 = s.only(t, "SM4 vault", at(pkcs11.CKA_LABEL, "keyferry vault SM4 v1"))
	pair, err := s.token.GeneratePair(ctx, instance, time.Now(), hsm.ECSM2, hsm.SM2PKE)
	require.NoError(t, err)
	s.wrappingSM2 = s.only(t, "SM2 wrapping pair", at(pkcs11.CKA_ID, pair.ID[:]), at(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	key, err := s.token.OpenMaterial(ctx, s.imported(t, hsm.SM4))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, key.Close()) })
	s.openedSM4 = s.only(t, "opened SM4 material", at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		at(pkcs11.CKA_KEY_TYPE, softhsmSM4))
}

// CKK_SM4 and CKM_SM4_ of our build.
const (
	softhsmSM4    = 0x80000106
	softhsmSM4ECB = 0x80000108
	softhsmSM4GCM = 0x8000010f
)

// imported imports material as the server does: all of it, or its first half
// as an SM4 key.
func (s *scene) imported(t *testing.T, spec hsm.MaterialSpec) hsm.Material {
	t.Helper()
	wrapped, err := byok.Wrap(string(s.pair.Algorithm), s.pair.SPKI, s.material[:spec.Len()])
	require.NoError(t, err)
	out, err := s.token.Import(context.Background(), hsm.ImportRequest{
		Pair: s.pair.ID, Algorithm: s.pair.Algorithm, Wrapped: wrapped, Spec: spec, Context: []byte("key-1"),
	})
	require.NoError(t, err)
	return out.Material
}

// enter gives the thief a session of his own. The server in this process is
// logged in, and login belongs to the process.
func (s *scene) enter(t *testing.T) {
	t.Helper()
	hsmtest.Keep(t, s.soft.Module)
	s.p = pkcs11.New(s.soft.Module)
	require.NotNil(t, s.p)
	var err error
	s.raw, err = thief.Load(s.soft.Module)
	require.NoError(t, err)
	slots, err := s.p.GetSlotList(true)
	require.NoError(t, err)
	found := false
	for _, slot := range slots {
		info, err := s.p.GetTokenInfo(slot)
		require.NoError(t, err)
		if info.Label == s.soft.Label {
			s.slot, found = slot, true
		}
	}
	require.True(t, found)
	s.s = s.session(t)
}

func (s *scene) session(t *testing.T) pkcs11.SessionHandle {
	t.Helper()
	h, err := s.p.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	return h
}

// login logs a user in with a PIN of the token's.
func (s *scene) login(t *testing.T, user uint, pin func() ([]byte, error)) {
	t.Helper()
	text, err := pin()
	require.NoError(t, err)
	require.NoError(t, s.p.Login(s.s, user, string(text)))
}

func (s *scene) find(attrs ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := s.p.FindObjectsInit(s.s, attrs); err != nil {
		return nil, err
	}
	found, _, err := s.p.FindObjects(s.s, 1000)
	if err != nil {
		return nil, err
	}
	return found, s.p.FindObjectsFinal(s.s)
}

func (s *scene) only(t *testing.T, name string, attrs ...*pkcs11.Attribute) object {
	t.Helper()
	found, err := s.find(attrs...)
	require.NoError(t, err)
	require.Len(t, found, 1, name)
	return object{name, found[0], uint(s.number(t, found[0], pkcs11.CKA_CLASS))}
}

// bytes reads one attribute.
func (s *scene) bytes(o pkcs11.ObjectHandle, attribute uint) ([]byte, error) {
	got, err := s.p.GetAttributeValue(s.s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(attribute, nil)})
	if err != nil {
		return nil, err
	}
	return got[0].Value, nil
}

func (s *scene) number(t *testing.T, o pkcs11.ObjectHandle, attribute uint) uint64 {
	t.Helper()
	b, err := s.bytes(o, attribute)
	require.NoError(t, err)
	var n uint64
	for i, x := range b {
		n |= uint64(x) << (8 * i)
	}
	return n
}

// objects are all that a thief is after.
func (s *scene) objects() []object {
	all := []object{s.vault, s.mac, s.receipt, s.wrapping, s.measured, s.opened}
	if s.report.ours {
		all = append(all, s.vaultSM4, s.wrappingSM2, s.openedSM4)
	}
	return all
}

func (s *scene) unwrapping(key object, mechanism uint, blob []byte, template []thief.Attribute) thief.Unwrapping {
	return thief.Unwrapping{
		Module: s.raw, Session: uint(s.s), Key: key.id(), Mechanism: mechanism, OAEP: mechanism == pkcs11.CKM_RSA_PKCS_OAEP,
		Blob: blob, Template: template,
	}
}

// unwrapCaptured unwraps the customer's blob under the pair.
func (s *scene) unwrapCaptured(template []thief.Attribute) (handle uint, code thief.RV) {
	return s.unwrapping(s.wrapping, s.pairMechanism(), s.captured, template).Once()
}

// unwrapSealed opens the database's blob under the vault.
func (s *scene) unwrapSealed(template []thief.Attribute) (handle uint, code thief.RV) {
	return s.unwrapping(s.vault, pkcs11.CKM_AES_KEY_WRAP, s.sealed.Ref, template).Once()
}

func (s *scene) pairMechanism() uint {
	if s.pair.Algorithm == hsm.PKCS1v15 {
		return pkcs11.CKM_RSA_PKCS
	}
	return pkcs11.CKM_RSA_PKCS_OAEP
}

func (s *scene) destroy(o pkcs11.ObjectHandle) { _ = s.p.DestroyObject(s.s, o) }

// stolen reports whether the object's value is the customer's material.
func (s *scene) stolen(o pkcs11.ObjectHandle) bool {
	value, err := s.bytes(o, pkcs11.CKA_VALUE)
	return err == nil && bytes.Equal(value, s.material)
}

// works proves that the token still does everything for the server.
func (s *scene) works(t *testing.T) {
	t.Helper()
	ctx := context.Background()
	key, err := s.token.OpenMaterial(ctx, s.imported(t, hsm.AES256))
	require.NoError(t, err)
	out, err := key.Encrypt(ctx, nil, []byte("text"), nil)
	require.NoError(t, err)
	back, err := s.key.Decrypt(ctx, nil, out, nil)
	require.NoError(t, err)
	require.Equal(t, "text", string(back))
	require.NoError(t, key.Close())
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// textbook is the RSA operation without padding (RFC 8017 section 5.1.1).
func textbook(pub *rsa.PublicKey, m []byte) []byte {
	c := new(big.Int).Exp(new(big.Int).SetBytes(m), big.NewInt(int64(pub.E)), pub.N)
	return c.FillBytes(make([]byte, pub.Size()))
}

// oaep wraps as a customer does, with SHA-1.
func oaep(t *testing.T, pub *rsa.PublicKey, material []byte) []byte {
	t.Helper()
	out, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, material, nil)
	require.NoError(t, err)
	return out
}
