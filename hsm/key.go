package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Lengths of GCM, in bytes; NIST SP 800-38D, and RFC 8998 for SM4.
const (
	gcmIVLen  = 12
	gcmTagLen = 16
)

// Overhead is how many bytes longer what Encrypt appends is than the plaintext.
const Overhead = gcmIVLen + gcmTagLen

// Key is open material: a session object that cannot leave the token. It is
// safe for concurrent use.
type Key struct {
	c      *connection
	handle p11.Handle
	cipher cipherNumbers // of AES or SM4

	mu     sync.RWMutex // held for reading while the handle is in use
	closed bool
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
		v := c.vaults[m.Spec]
		var h p11.Handle
		if h, err = c.open(ctx, v, m.Ref); err == nil {
			return &Key{c: c, handle: h, cipher: v.kind.cipher}, nil
		}
		if !errors.Is(err, errConnectionLost) {
			break
		}
	}
	return nil, fault("open key material", err)
}

// open unwraps a blob on a keeper. A keeper that fails is the end of the
// connection: the other materials that it owns are gone, too.
func (c *connection) open(ctx context.Context, v *vault, blob []byte) (p11.Handle, error) {
	var s *p11.Session
	select {
	case s = <-c.keepers:
	case <-c.gone:
		return 0, errConnectionLost
	case <-ctx.Done():
		return 0, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
	}
	defer func() { c.keepers <- s }()
	if c.dead() {
		return 0, errConnectionLost
	}
	h, err := s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, blob, v.opened)
	if err == nil {
		return h, nil
	}
	if worst(err) == p11.NoFault {
		// The blob is at fault, or the token is: it opens one that is good.
		known, sick := s.Unwrap(p11.Plain(p11.AESKeyWrap), v.handle, v.canary, v.opened)
		if sick == nil {
			sick = s.DestroyObject(known)
		}
		if sick == nil {
			return 0, fmt.Errorf("%w: the vault does not open the blob (%w)", ErrUntrusted, err)
		}
		err = sick
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
	n := len(dst)
	out := slices.Grow(dst, Overhead+len(plaintext))[:n+Overhead+len(plaintext)]
	iv, buf := out[n:n+gcmIVLen], out[n+gcmIVLen:]
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
	return out, nil
}

// Decrypt appends to dst the plaintext of what Encrypt appended. Errors:
// ErrAuthentication, ErrKeyLost, ErrUnavailable.
func (k *Key) Decrypt(ctx context.Context, dst, ciphertext, aad []byte) ([]byte, error) {
	if len(ciphertext) < Overhead {
		return nil, ErrAuthentication
	}
	iv, body := ciphertext[:gcmIVLen], ciphertext[gcmIVLen:]
	n := len(dst)
	// Some tokens want room for the tag, too.
	out := slices.Grow(dst, len(body))[:n+len(body)]
	err := k.use(ctx, "decrypt", func(s *session) error {
		written, err := s.Decrypt(p11.GCM(k.cipher.gcm, iv, aad), k.handle, body, out[n:])
		if err == nil {
			if len(written) != len(body)-gcmTagLen {
				return fmt.Errorf("hsm: the token's GCM wrote %d bytes, not %d", len(written), len(body)-gcmTagLen)
			}
			out = out[:n+len(written)]
			return nil
		}
		if worst(err) != p11.NoFault {
			return err
		}
		// The ciphertext is at fault, or the token is: it encrypts a block
		// that GCM never encrypts, for its last bytes exceed every counter.
		var room [16]byte
		defer clear(room[:])
		if _, sick := s.Encrypt(p11.Plain(k.cipher.ecb), k.handle, publicConstant[:16], room[:]); sick != nil {
			return fmt.Errorf("%w: %w", p11.DeviceError, sick)
		}
		return ErrAuthentication
	})
	if err != nil {
		clear(out[n:])
		return nil, err
	}
	return out, nil
}

// use runs f with a session of the key's connection while the key is open.
func (k *Key) use(ctx context.Context, op string, f func(s *session) error) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.closed {
		return ErrKeyLost
	}
	var err error
	for range attempts {
		err = k.c.with(ctx, f)
		switch w := worst(err); {
		case w == p11.SessionFault: // and the key may be alive
		case w >= p11.HandleFault, errors.Is(err, errConnectionLost):
			return fmt.Errorf("%w: %w", ErrKeyLost, err)
		default:
			return fault(op, err)
		}
	}
	return fault(op, err)
}

// Close waits for uses under way and destroys the session object. It is
// idempotent.
func (k *Key) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil
	}
	k.closed = true
	err := k.c.with(context.Background(), func(s *session) error { return s.DestroyObject(k.handle) })
	if worst(err) >= p11.HandleFault || errors.Is(err, errConnectionLost) {
		return nil // gone, or going with its connection
	}
	return fault("close a key", err)
}
