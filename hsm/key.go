package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Lengths of GCM, in bytes; NIST SP 800-38D, and RFC 8998 for SM4.
const (
	gcmIVLen  = 12
	gcmTagLen = 16
)

// Overhead is how many bytes longer what Encrypt appends is than the plaintext.
const Overhead = gcmIVLen + gcmTagLen

// Key is open material, which cannot leave the token: a session object, or the
// token object of resident material. It is safe for concurrent use.
type Key struct {
	c        *connection
	handle   p11.Handle
	cipher   cipherNumbers // of AES or SM4
	resident *ObjectID     // nil: sealed material, whose object is the Key's

	mu      sync.Mutex    // guards what follows
	users   int           // calls that use the handle, waited for or not
	closing bool          // no use begins any more
	unused  chan struct{} // closed when closing, and the last user has ended
	closed  chan struct{} // closed when the object is destroyed, or cannot be
	err     error         // after closed
}

func newKey(c *connection, h p11.Handle, cipher cipherNumbers) *Key {
	return &Key{c: c, handle: h, cipher: cipher, unused: make(chan struct{}), closed: make(chan struct{})}
}

// begin counts a user of the handle, or reports false.
func (k *Key) begin() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closing {
		return false
	}
	k.users++
	return true
}

func (k *Key) end() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.users--; k.users == 0 && k.closing {
		close(k.unused)
	}
}

// OpenMaterial opens material into a Key, which lives until it is closed or
// the token is lost.
//
// Errors: ErrUnsupported (the token cannot use that kind of material),
// ErrUntrusted (another vault's, or no blob of ours), ErrUnavailable.
func (t *Token) OpenMaterial(ctx context.Context, m Material) (*Key, error) {
	if err := t.Usable(m.Spec); err != nil {
		return nil, err
	}
	pins := t.cfg.Pins
	switch {
	case m.Custody == Sealed && m.Spec == SM4 && m.Vault == pins.VaultAES:
		return nil, fmt.Errorf("%w: SM4 material that was imported while the token had no SM4; import it again", ErrUnsupported)
	case m.Custody != Sealed, len(m.Ref) != m.Spec.Len()+8, m.Vault != map[MaterialSpec]Fingerprint{AES256: pins.VaultAES, SM4: pins.VaultSM4}[m.Spec]:
		return nil, fmt.Errorf("%w: material of vault %s", ErrUntrusted, m.Vault)
	}
	var err error
	for range attempts {
		var c *connection
		if c, err = t.connection(ctx); err != nil {
			return nil, err
		}
		var k *Key
		if k, err = c.open(ctx, c.vaults[m.Spec], m.Ref); err == nil {
			return k, nil
		}
		if !errors.Is(err, errConnectionLost) {
			break
		}
	}
	return nil, fault("open key material", err)
}

// open unwraps a blob on a keeper.
func (c *connection) open(ctx context.Context, v *vault, blob []byte) (*Key, error) {
	var keeper *p11.Session
	select {
	case keeper = <-c.keepers:
	case <-c.gone:
		return nil, errConnectionLost
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: all %d sessions that open key material are busy%s: %w", ErrUnavailable, c.kept, c.unanswered(), ctx.Err())
	}
	k, err := within(ctx, func() (*Key, error) {
		defer func() { c.keepers <- keeper }()
		h, err := c.unwrap(keeper, v, blob)
		return newKey(c, h, v.kind.cipher), err
	}, func(k *Key, err error) {
		if err == nil {
			_ = k.Close()
		}
		c.returned()
	})
	if errors.Is(err, errLeft) {
		c.leave()
	}
	return k, err
}

// unwrap opens a blob. What fails and does not fail again is no fault of the
// blob. It ends the connection: a keeper that died has taken other materials
// with it, and one that lives may own what the call has made all the same.
func (c *connection) unwrap(keeper *p11.Session, v *vault, blob []byte) (p11.Handle, error) {
	if c.dead() {
		return 0, errConnectionLost
	}
	h, err := keeper.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened)
	if err == nil {
		return h, nil
	}
	if worst(err) == p11.NoFault {
		// The blob is at fault, or the token is: it opens one that is good.
		known, sick := keeper.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, v.canary, v.opened)
		if sick == nil {
			sick = keeper.DestroyObject(known)
		}
		if sick == nil {
			if h, again := keeper.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened); again == nil {
				sick = keeper.DestroyObject(h)
			} else if worst(again) == p11.NoFault {
				return 0, fmt.Errorf("%w: the vault does not open the blob (%w)", ErrUntrusted, err)
			} else {
				sick = again
			}
		}
		err = errors.Join(err, sick)
	}
	c.t.lost(c, err)
	return 0, errConnectionLost
}

// Encrypt encrypts by GCM, of AES or SM4 as the material is, with a random 96-bit IV and appends to dst
//
//	IV (12) ‖ ciphertext (as long as the plaintext) ‖ tag (16)
//
// The caller counts: one key must not encrypt more than 2^32 times (NIST SP
// 800-38D section 8.3). Errors: ErrKeyLost, ErrUnavailable.
func (k *Key) Encrypt(ctx context.Context, dst, plaintext, aad []byte) ([]byte, error) {
	// Of the call alone, which the caller may leave behind.
	sealed := make([]byte, Overhead+len(plaintext))
	iv, buf := sealed[:gcmIVLen], sealed[gcmIVLen:]
	if _, err := rand.Read(iv); err != nil {
		return nil, err
	}
	err := k.use(ctx, "encrypt", func(s *session) error {
		written, err := s.Encrypt(p11.GCM(k.cipher.gcm, iv, aad), k.handle, plaintext, buf)
		if err == nil && len(written) != len(buf) {
			return fmt.Errorf("hsm: the token's GCM wrote %d bytes, not %d", len(written), len(buf))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return append(dst, sealed...), nil
}

// Decrypt appends to dst the plaintext of what Encrypt appended. Errors:
// ErrAuthentication, ErrKeyLost, ErrUnavailable.
func (k *Key) Decrypt(ctx context.Context, dst, ciphertext, aad []byte) ([]byte, error) {
	if len(ciphertext) < Overhead {
		return nil, ErrAuthentication
	}
	iv, body := ciphertext[:gcmIVLen], ciphertext[gcmIVLen:]
	// Of the call alone, which the caller may leave behind. Some tokens want
	// room for the tag, too.
	room := make([]byte, len(body))
	plain := room[:len(body)-gcmTagLen]
	err := k.use(ctx, "decrypt", func(s *session) (err error) {
		s.wipe = func() { clear(room) }
		defer func() {
			if err != nil {
				clear(room)
			}
		}()
		decrypt := func() error {
			written, err := s.Decrypt(p11.GCM(k.cipher.gcm, iv, aad), k.handle, body, room)
			if err == nil && len(written) != len(plain) {
				return fmt.Errorf("hsm: the token's GCM wrote %d bytes, not %d", len(written), len(plain))
			}
			return err
		}
		if err = decrypt(); err == nil || !inputMayCause(err) {
			return err
		}
		// The ciphertext is at fault, or the token is: it encrypts a block
		// that GCM never encrypts, for its last bytes exceed every counter,
		// and then repeats what it said.
		var block [16]byte
		defer clear(block[:])
		if _, sick := s.Encrypt(p11.Plain(k.cipher.ecb), k.handle, publicConstant[:16], block[:]); sick != nil {
			return fmt.Errorf("%w: %w", p11.DeviceError, sick)
		}
		if err = decrypt(); err == nil || !inputMayCause(err) {
			return err
		}
		return ErrAuthentication
	})
	if err != nil {
		return nil, err
	}
	dst = append(dst, plain...)
	clear(room)
	return dst, nil
}

// use runs f with a session of the key's connection while the key is open. f
// may be run again, and what it writes must not be read after an error.
func (k *Key) use(ctx context.Context, op string, f func(s *session) error) error {
	var err error
	for range attempts {
		err = k.c.with(ctx, func(s *session) error {
			if !k.begin() {
				return ErrKeyLost
			}
			defer k.end()
			return f(s)
		})
		w := worst(err)
		_, unwell := failed(err)
		switch {
		case errors.Is(err, errConnectionLost), w == p11.HandleFault, unwell && k.c.dead():
			if k.resident != nil {
				k.c.residents.Delete(*k.resident)
			}
			return fmt.Errorf("%w: %w", ErrKeyLost, err)
		case !unwell:
			return fault(op, err)
		}
	}
	return fault(op, err)
}

// closePatience bounds how long Close waits for the token.
const closePatience = 10 * time.Second

// Close waits for uses under way and destroys the session object; the object of
// resident material stays. It is idempotent. ErrUnavailable: the token does not
// answer, and the object goes when it does, or does not destroy it, and the
// object goes with its connection.
func (k *Key) Close() error { return k.CloseWithin(closePatience) }

// CloseWithin is Close by a caller who waits no longer than that, or not at all.
// No use begins after it in any case; what is left it does later.
func (k *Key) CloseWithin(d time.Duration) error {
	k.mu.Lock()
	if !k.closing {
		k.closing = true
		if k.users == 0 {
			close(k.unused)
		}
		go k.destroy()
	}
	k.mu.Unlock()
	patience := time.NewTimer(d)
	defer patience.Stop()
	select {
	case <-k.closed:
		return k.err
	case <-patience.C:
		return fmt.Errorf("%w: waited %v for a use of the key to end", ErrUnavailable, d)
	}
}

func (k *Key) destroy() {
	defer close(k.closed)
	<-k.unused
	if k.resident != nil {
		return
	}
	var err error
	for range attempts {
		err = k.c.with(context.Background(), func(s *session) error { return s.DestroyObject(k.handle) })
		if err == nil || worst(err) == p11.HandleFault || k.c.dead() {
			return // gone, or going with its connection
		}
	}
	k.err = fault("close a key", err)
}
