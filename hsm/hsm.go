// Package hsm is one PKCS#11 token as Go values: wrapping pairs, key material
// that is imported, measured and sealed inside the token, and its use.
//
// Start with Init, which makes the keys a token needs, and Open. A customer
// wraps material under the public key of GeneratePair; Import unwraps it in
// the token, measures its length and identity there, seals it under the vault
// key and forgets it; OpenMaterial opens it again for use.
//
// Key material, vault keys and the private halves of wrapping pairs never
// exist outside the token. What a token cannot do is refused with
// ErrUnsupported; nothing is ever done outside the token in its place.
//
// Contexts bound the waiting: for a session of the pool, and for a token that
// went away. A PKCS#11 call itself cannot be interrupted. A caller whose context
// has a deadline gets an answer by then all the same, and leaves a call that
// the token does not answer behind; that keeps its session until it returns.
// Without a deadline callers wait for the token.
//
// The package knows no CMKs, no storage and no network.
package hsm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Fingerprint identifies a key by a SHA-256: of a wrapping pair or the receipt
// key over its SubjectPublicKeyInfo, of a vault key over the RFC 3394 wrapping
// of a public constant, of the MAC key over its MAC of one.
type Fingerprint [32]byte

// String is the fingerprint in hexadecimal.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// MarshalText writes the fingerprint in hexadecimal.
func (f Fingerprint) MarshalText() ([]byte, error) { return []byte(f.String()), nil }

// UnmarshalText reads 64 hexadecimal digits.
func (f *Fingerprint) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(f)) {
		return fmt.Errorf("hsm: a fingerprint has %d hexadecimal digits, not %d", hex.EncodedLen(len(f)), len(text))
	}
	_, err := hex.Decode(f[:], text)
	return err
}

// Pins say which token and which of its keys are ours. Names prove nothing:
// anyone can make a second token of the same label. Init returns them, and
// the operator's configuration keeps them.
type Pins struct {
	Serial     string
	VaultAES   Fingerprint
	VaultSM4   Fingerprint // zero: the token has no SM4
	MACKey     Fingerprint
	ReceiptKey Fingerprint
}

// Config says which token to open and how.
type Config struct {
	// Module is the path of the PKCS#11 library.
	Module string
	// InitArgs is the string that some libraries want from C_Initialize in
	// pReserved, such as NSS's "configDir=sql:/srv/keyferry/nss".
	InitArgs string
	// Label of the token. There must be exactly one token of this label.
	Label string
	// Pins of the token and its keys, as Init returned them.
	Pins Pins
	// PIN returns the user PIN. It is called once whenever the token is
	// opened or comes back; the slice is wiped after use.
	PIN func() ([]byte, error)
	// Sessions bounds the session pool; 0 means 32. A token with fewer gets
	// what it has.
	Sessions int
	// AllowPKCS1v15 offers RSAES_PKCS1_V1_5. It cannot be made safe against a
	// thief of the PIN: whoever has it reads captured blobs while their
	// wrapping pair lives.
	AllowPKCS1v15 bool
	// Profile names how the token speaks SM2 and SM4; "" finds it out by known
	// answers. Profiles are those of the operator, beside BuiltinProfiles.
	Profile  string
	Profiles []Profile
	// Accept is what the operator accepts that this token cannot keep. What
	// the token can keep is kept all the same.
	Accept []Exception
	// Patience bounds how long a call waits for a token that is gone when its
	// context does not, and Close for calls under way; 0 means 10 seconds.
	Patience time.Duration
	// Logger gets what an operator should know; nil discards it.
	Logger *slog.Logger
}

func (c Config) validate() error {
	var errs []error
	if c.Module == "" {
		errs = append(errs, errors.New("hsm: Config.Module is empty"))
	}
	if c.Label == "" {
		errs = append(errs, errors.New("hsm: Config.Label is empty"))
	}
	if c.PIN == nil {
		errs = append(errs, errors.New("hsm: Config.PIN is nil"))
	}
	if c.Pins.Serial == "" {
		errs = append(errs, errors.New("hsm: Config.Pins.Serial is empty"))
	}
	if c.Pins.VaultAES == (Fingerprint{}) || c.Pins.MACKey == (Fingerprint{}) {
		errs = append(errs, errors.New("hsm: Config.Pins has no fingerprint of the vault or the MAC key; run Init"))
	}
	for _, p := range c.Profiles {
		errs = append(errs, p.Validate())
	}
	errs = append(errs, validateAccept(c.Accept))
	if c.Sessions < 0 {
		errs = append(errs, errors.New("hsm: Config.Sessions is negative"))
	}
	return errors.Join(errs...)
}

// Token is an open token. It is safe for concurrent use.
//
// A token that goes away is opened again in the background: calls wait for it
// within their context and Config.Patience, then fail with ErrUnavailable. A
// refused PIN ends that for good: every later call fails with ErrPIN. So does a
// token that has the serial and not the keys that are pinned, and there calls
// fail with ErrUnavailable; one of another serial is not logged in to, and is
// waited past.
type Token struct {
	cfg Config
	log *slog.Logger
	mod *p11.Module

	verify func(c *connection, s *p11.Session) error // of every new connection

	conn atomic.Pointer[connection]   // nil while there is none
	caps atomic.Pointer[Capabilities] // of the first connection; never nil

	losses, returns atomic.Uint64 // of the token, for Stats

	mu     sync.Mutex    // guards what follows
	back   chan struct{} // closed when conn or end is set; made anew when conn is lost
	away   error         // why there is no connection, while there is none
	flap   time.Duration // the pause before a token that dies young is opened again
	end    error         // why there will never be a connection again
	closed chan struct{}
	wg     sync.WaitGroup
	ending atomic.Int32 // lost connections with calls under way

	// doubts counts logins in a row that were refused without a reason. It is of
	// whoever opens the token, one goroutine at a time.
	doubts int
}

// Open opens the token, logs in once, and proves by known answers what it can
// do and that its keys are the pinned ones. It takes the time of generating
// one RSA-2048 pair. When ctx ends it returns, even where a call to the token
// has not; what that opens is closed again. A token that cannot keep a rule is
// refused with an ExceptionError unless Config.Accept has the exception.
//
// Errors: ErrPIN, ErrUntrusted (another serial, another vault, an object with
// CKA_TRUSTED that is not ours), ErrUnsupported, ErrUnavailable.
func Open(ctx context.Context, cfg Config) (*Token, error) {
	return openBy(ctx, cfg, (*connection).verify)
}

func openBy(ctx context.Context, cfg Config, verify func(*connection, *p11.Session) error) (*Token, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Sessions == 0 {
		cfg.Sessions = 32
	}
	if cfg.Patience == 0 {
		cfg.Patience = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return leaving(ctx, func() (*Token, error) { return open(cfg, verify) }, func(late *Token, err error) {
		if err == nil {
			_ = late.Close() // nobody learns of it
		}
	})
}

func open(cfg Config, verify func(*connection, *p11.Session) error) (*Token, error) {
	mod, err := p11.Load(cfg.Module, cfg.InitArgs)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrUnavailable, err)
	}
	t := &Token{cfg: cfg, log: cfg.Logger, mod: mod, back: make(chan struct{}), closed: make(chan struct{}), verify: verify}
	c, _, err := t.connect()
	if err != nil {
		return nil, errors.Join(err, t.mod.Close())
	}
	t.caps.Store(c.caps)
	t.conn.Store(c)
	close(t.back)
	return t, nil
}

// Close ends all sessions, after the calls under way have returned, and with
// them every Key. It is idempotent. Calls that do not return within
// Config.Patience are left behind, with an error: the module is finalised when
// they do return, for beneath a call that would crash it.
func (t *Token) Close() error {
	t.mu.Lock()
	if errors.Is(t.end, ErrClosed) {
		t.mu.Unlock()
		return nil
	}
	c := t.conn.Swap(nil)
	if c != nil || t.end != nil {
		t.back = make(chan struct{})
	}
	t.end = ErrClosed
	close(t.back)
	close(t.closed)
	t.mu.Unlock()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if c != nil {
			c.shutdown()
		}
		t.wg.Wait()
	}()
	patience := time.NewTimer(t.cfg.Patience)
	defer patience.Stop()
	select {
	case <-ended:
		return t.mod.Close()
	case <-patience.C:
		go func() {
			<-ended
			_ = t.mod.Close() // nobody learns of it
		}()
		return fmt.Errorf("%w: calls have not returned in %v; the module is finalised when they do", ErrUnavailable, t.cfg.Patience)
	}
}

// Capabilities are what the token proved at Open. Do not modify them.
func (t *Token) Capabilities() *Capabilities { return t.caps.Load() }

// Offers reports whether the token proved at Open that it unwraps under pairs
// of that spec by that algorithm. The error is ErrUnsupported and names what
// is missing.
func (t *Token) Offers(spec PairSpec, alg Algorithm) error {
	return t.caps.Load().Offers(spec, alg)
}

// Usable reports whether material of that spec can encrypt and decrypt on this
// token. Material that cannot is still imported and identified.
func (t *Token) Usable(spec MaterialSpec) error {
	err := t.caps.Load().Usable(spec)
	if err == nil && spec == SM4 && t.cfg.Pins.VaultSM4 == (Fingerprint{}) {
		return fmt.Errorf("%w: the token has SM4 and no SM4 vault is pinned; run init to make it", ErrUnsupported)
	}
	return err
}

// ImplicitRejection reports whether the token answers a tampered
// RSAES_PKCS1_V1_5 blob with a random key instead of an error, as OpenSSL 3.2
// and later do. An import by that algorithm is then only as sure as the check
// value or material id that the customer expects.
func (t *Token) ImplicitRejection() bool {
	return t.caps.Load().implicitRejection
}
