package hsm

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Bare makes the bare calls of PKCS#11 that lie below the operations of a Token,
// on a session of its own: as another program would that does nothing else, has
// every handle and knows every size. Whoever wants to know what the operations
// cost beyond the token runs it beside them; nothing is checked but that the
// calls succeed, and nothing that they make is kept.
//
// It is for one goroutine at a time, and dies with the connection of the token
// on which it was opened.
type Bare struct {
	c    *connection
	s    *p11.Session
	blob [blobRoom]byte
	sum  [macLen]byte
	out  []byte
}

// Bare opens a session beside the pool. Errors: ErrUnavailable.
func (t *Token) Bare(ctx context.Context) (*Bare, error) {
	c, err := t.connection(ctx)
	if err != nil {
		return nil, err
	}
	s, err := t.mod.OpenSession(c.slot)
	if err != nil {
		return nil, fault("open a session", err)
	}
	return &Bare{c: c, s: s}, nil
}

// Close closes the session, and destroys what a failed call may have left in it.
func (b *Bare) Close() error { return fault("close a session", b.s.Close()) }

// unwrap is C_UnwrapKey of a customer's blob. The pair must be one that the
// token has found before: nothing is searched for here.
func (b *Bare) unwrap(id PairID, wrapped []byte, tmpl *p11.Template) (p11.Handle, error) {
	known, ok := b.c.pairs.Load(id)
	if !ok {
		return 0, ErrPairNotFound
	}
	p := known.(*pair)
	params, wrapped, err := p.unwrapParams(wrapped)
	if err != nil {
		return 0, err
	}
	return b.s.Unwrap(params, p.handle, wrapped, tmpl)
}

// Unwrap makes the calls of the shortest import there could be, with a pair of
// sealed custody: C_UnwrapKey and C_DestroyObject.
func (b *Bare) Unwrap(id PairID, wrapped []byte) error {
	key, err := b.unwrap(id, wrapped, b.c.measured)
	if err != nil {
		return fault("unwrap", err)
	}
	return fault("unwrap", b.s.DestroyObject(key))
}

// UnwrapResident is Unwrap with a pair of resident custody: C_UnwrapKey into an
// object of the token, and C_DestroyObject. Residents lists what is left of it
// where the process is killed.
func (b *Bare) UnwrapResident(id PairID, instance string, wrapped []byte) error {
	var object ObjectID
	rand.Read(object[:]) // never fails: crypto/rand
	key, err := b.unwrap(id, wrapped, b.c.rules.template(residentObject(object, residentLabel{instance: instance, made: time.Now()})...))
	if err != nil {
		return fault("unwrap", err)
	}
	return fault("unwrap", b.s.DestroyObject(key))
}

// Import makes every call that Token.Import makes of good material: C_UnwrapKey,
// C_GetAttributeValue of the whole template, C_Encrypt of a block and two C_Sign
// with the material, C_WrapKey under the vault, and C_DestroyObject.
func (b *Bare) Import(id PairID, wrapped, context []byte) error {
	key, err := b.unwrap(id, wrapped, b.c.measured)
	if err != nil {
		return fault("import", err)
	}
	if _, _, err = b.s.Differs(key, b.c.measured); err == nil {
		_, err = measureKCV(b.s, p11.AESECB, key)
	}
	if err == nil {
		_, err = b.c.measureID(b.s, key, context)
	}
	if err == nil {
		_, err = b.s.Wrap(p11.Plain(p11.AESKeyWrap), b.c.vaults[AES256].handle, key, b.blob[:])
	}
	if gone := b.s.DestroyObject(key); err == nil {
		err = gone
	}
	return fault("import", err)
}

// MAC makes the calls of Token.MAC: C_SignInit and C_Sign.
func (b *Bare) MAC(input []byte) error {
	_, err := b.s.Sign(p11.Plain(p11.SHA256HMAC), b.c.mac, input, b.sum[:])
	return fault("compute a MAC", err)
}

// Open makes the calls of opening material and closing it again: C_UnwrapKey by
// the vault, and C_DestroyObject.
func (b *Bare) Open(m Material) error {
	v := b.c.vaults[m.Spec]
	if v == nil || m.Custody != Sealed {
		return fmt.Errorf("%w: %s material that is %s", ErrUnsupported, m.Spec, m.Custody)
	}
	key, err := b.s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, m.Ref, v.opened)
	if err == nil {
		err = b.s.DestroyObject(key)
	}
	return fault("open key material", err)
}

// Encrypt makes the calls of Key.Encrypt: C_EncryptInit and C_Encrypt by GCM. The
// key must be open on the connection of b.
func (b *Bare) Encrypt(k *Key, iv *[gcmIVLen]byte, plaintext, aad []byte) error {
	_, err := b.s.Encrypt(p11.GCM(k.cipher.gcm, iv[:], aad), k.handle, plaintext, b.room(len(plaintext)+gcmTagLen))
	return fault("encrypt", err)
}

// Decrypt makes the calls of Key.Decrypt on what that takes: C_DecryptInit and
// C_Decrypt by GCM.
func (b *Bare) Decrypt(k *Key, ciphertext, aad []byte) error {
	if len(ciphertext) < Overhead {
		return ErrAuthentication
	}
	_, err := b.s.Decrypt(p11.GCM(k.cipher.gcm, ciphertext[:gcmIVLen], aad), k.handle, ciphertext[gcmIVLen:], b.room(len(ciphertext)))
	return fault("decrypt", err)
}

func (b *Bare) room(n int) []byte {
	if len(b.out) < n {
		b.out = make([]byte, n)
	}
	return b.out
}
