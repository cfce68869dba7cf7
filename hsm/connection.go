package hsm

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// keepers is how many sessions own the opened materials. Session objects die
// with the session that made them, so these are never used for anything that
// could cost them their life.
const keepers = 2

// connection is one life of the token: from a login until the token is lost or
// closed. Handles are valid within one connection only; nothing of it is ever
// used with the next.
type connection struct {
	t    *Token
	slot uint
	caps *Capabilities

	rules      rules // what is left of the templates on this token
	sm         sm
	vaults     map[MaterialSpec]*vault // never changed once made
	mac        p11.Handle
	receipt    *signer // nil: none is pinned
	measured   *p11.Template
	attributes []string          // of measured, as receipts name them
	pairs      sync.Map          // PairID → *pair
	residents  sync.Map          // ObjectID → *verifiedResident
	places     chan *p11.Session // the pool: a session, or nil for one not opened yet
	keepers    chan *p11.Session
	kept       int           // keepers that were opened
	born       time.Time     // when it was complete
	gone       chan struct{} // closed when the connection is lost or closed
	idle       chan struct{} // closed when the last of its calls has returned
	left       atomic.Int32  // calls under way that nobody waits for any more

	mu   sync.Mutex // guards size, and the closing of gone
	size int        // of the pool
}

// kill makes every later use of the connection fail.
func (c *connection) kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.dead() {
		close(c.gone)
	}
}

// shrink gives up the place of a session that the token would not grant, and
// reports whether others are left.
func (c *connection) shrink() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.size == 1 || c.dead() {
		return false
	}
	c.size--
	c.t.log.Warn("token grants fewer sessions than configured", "token", c.t.cfg.Label, "sessions", c.size)
	return true
}

func (c *connection) sessions() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size
}

func (c *connection) dead() bool {
	select {
	case <-c.gone:
		return true
	default:
		return false
	}
}

// connect opens the token as configured. It is called by one goroutine at a
// time. shown reports whether the token was shown the PIN.
func (t *Token) connect() (_ *connection, shown bool, err error) {
	tok, err := findToken(t.mod, t.cfg.Label, t.cfg.Pins.Serial)
	if err != nil {
		return nil, false, err
	}
	c := &connection{
		t: t, slot: tok.Slot, keepers: make(chan *p11.Session, keepers),
		gone: make(chan struct{}), idle: make(chan struct{}),
	}
	c.size = t.cfg.Sessions
	if n := int(tok.MaxSessions); n > 0 {
		c.size = max(1, min(c.size, n-keepers))
	}
	c.places = make(chan *p11.Session, c.size)
	for range c.size {
		c.places <- nil
	}
	defer func() {
		if err != nil {
			c.shutdown()
		}
	}()
	for i := range keepers {
		s, err := t.mod.OpenSession(c.slot)
		if err != nil {
			return nil, shown, fmt.Errorf("%w: cannot open a session: %w", ErrUnavailable, err)
		}
		c.keepers <- s
		c.kept++
		if i == 0 {
			shown = true
			if err := t.login(s, tok); err != nil {
				return nil, shown, err
			}
		}
	}
	s := <-c.keepers
	defer func() { c.keepers <- s }()
	if err := t.verify(c, s); err != nil {
		return nil, shown, err
	}
	c.born = time.Now()
	return c, shown, nil
}

// verify finds what the connection works with, and insists that it is ours.
func (c *connection) verify(s *p11.Session) (err error) {
	cfg := &c.t.cfg
	// A token that comes back is the same: its serial and keys are pinned.
	known := c.t.caps.Load()
	if c.caps = known; known == nil {
		p := prober{mod: c.t.mod, slot: c.slot, log: c.t.log, v15: cfg.AllowPKCS1v15, profile: cfg.Profile, profiles: cfg.Profiles}
		if c.caps, err = p.probe(); err != nil {
			return fault("probe the token", err)
		}
	}
	c.sm = c.caps.sm
	if c.rules, err = c.caps.accepted(cfg.Accept); err != nil {
		return err
	}
	if err := c.findKeys(s); err != nil {
		return fault("find the token's keys", err)
	}
	asked := c.rules.keep(measured())
	c.measured, c.attributes = p11.NewTemplate(asked...), describe(asked)
	if known == nil {
		c.tellExceptions()
		if err := c.proveVault(s); err != nil {
			return fault("prove the vault", err)
		}
	}
	return nil
}

// findToken finds the one token of a label, and insists on the serial. An
// empty serial stands for any.
func findToken(mod *p11.Module, label, serial string) (p11.Token, error) {
	all, err := mod.Tokens()
	if err != nil && len(all) == 0 {
		return p11.Token{}, fmt.Errorf("%w: cannot list the tokens: %w", ErrUnavailable, err)
	}
	var found []p11.Token
	for _, tok := range all {
		if tok.Initialized && tok.Label == label {
			found = append(found, tok)
		}
	}
	switch {
	case len(found) == 0 && err != nil:
		return p11.Token{}, fmt.Errorf("%w: no token labelled %q among those that answer: %w", ErrUnavailable, label, err)
	case len(found) == 0:
		return p11.Token{}, fmt.Errorf("%w: the module has no initialised token labelled %q", ErrUnavailable, label)
	case len(found) > 1:
		return p11.Token{}, fmt.Errorf("%w: %d tokens are labelled %q; one of them may be a thief's: remove it", ErrUntrusted, len(found), label)
	case serial != "" && found[0].Serial != serial:
		return p11.Token{}, fmt.Errorf("%w: the token labelled %q has serial %q, not the pinned %q", ErrUntrusted, label, found[0].Serial, serial)
	case !found[0].PINInitialized:
		return p11.Token{}, fmt.Errorf("%w: the user PIN of token %q was never set", ErrPIN, label)
	}
	return found[0], nil
}

// errDoubtfulLogin: the token refused a login and did not say why.
var errDoubtfulLogin = errors.New("hsm: login refused without a reason")

// login tries a PIN once and wipes it.
func login(s *p11.Session, user p11.User, pin func() ([]byte, error)) error {
	secret, err := pin()
	if errors.Is(err, ErrPIN) {
		return err
	}
	if err != nil {
		return fmt.Errorf("hsm: cannot read the PIN: %w", err)
	}
	err = s.Login(user, secret)
	clear(secret)
	kind := ErrPIN
	if user == p11.SO {
		kind = ErrSOPIN
	}
	switch w := worst(err); {
	case err == nil, errors.Is(err, p11.UserAlreadyLoggedIn):
		return nil
	case errors.Is(err, p11.AnotherAlreadyLoggedIn):
		return fmt.Errorf("%w: the other user is logged in to this token in this process", ErrUnavailable)
	case w == p11.SessionFault, w == p11.TokenFault:
		return fmt.Errorf("%w: cannot log in: %w", ErrUnavailable, err)
	case w == p11.PINFault:
		return fmt.Errorf("%w: %w", kind, err)
	}
	// Whatever else a token answers, it may have counted the try.
	return fmt.Errorf("%w: %w: %w", kind, errDoubtfulLogin, err)
}

// login logs the user in. A refused PIN is never tried again. A refusal without
// a reason, which a token that is just going away gives, is tried once more at
// the next attempt to open the token, unless the token says that it has counted
// a wrong PIN. The last try before a token locks itself is left to people.
func (t *Token) login(s *p11.Session, tok p11.Token) error {
	switch {
	case tok.PINLocked:
		return fmt.Errorf("%w: the token says that it is locked", ErrPIN)
	case tok.PINFinalTry:
		return fmt.Errorf("%w: the token says that one more wrong PIN locks it; log in once by another tool", ErrPIN)
	}
	err := login(s, p11.NormalUser, t.cfg.PIN)
	if !errors.Is(err, errDoubtfulLogin) {
		if err == nil {
			t.doubts = 0
		}
		return err
	}
	t.doubts++
	now, gone := findToken(t.mod, t.cfg.Label, t.cfg.Pins.Serial)
	if t.doubts > 1 || gone == nil && (now.PINCountLow || now.PINFinalTry || now.PINLocked) {
		return err
	}
	return fmt.Errorf("%w: cannot log in: %v", ErrUnavailable, err) // no longer an ErrPIN
}

// shutdown ends the connection: nobody gets a session any more, calls under
// way finish, and only then the owners of the opened materials are closed, so
// that no handle is used after it may have been given to another object.
func (c *connection) shutdown() {
	defer close(c.idle)
	c.kill()
	for range c.sessions() {
		if s := <-c.places; s != nil {
			_ = s.Close() // of a token that may be gone
		}
	}
	for range c.kept {
		_ = (<-c.keepers).Close()
	}
}
