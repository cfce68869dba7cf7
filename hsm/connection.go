package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
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
	caps *capabilities

	sm       sm
	vaults   map[MaterialSpec]*vault // never changed once made
	mac      p11.Handle
	measured *p11.Template
	pairs    sync.Map          // PairID → *pair
	places   chan *p11.Session // the pool: a session, or nil for one not opened yet
	keepers  chan *p11.Session
	kept     int           // keepers that were opened
	gone     chan struct{} // closed when the connection is lost or closed

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

// connect opens the token as configured. It is called by one goroutine at a time.
func (t *Token) connect() (_ *connection, err error) {
	tok, err := findToken(t.mod, t.cfg.Label, t.cfg.Pins.Serial)
	if err != nil {
		return nil, err
	}
	c := &connection{
		t: t, slot: tok.Slot, keepers: make(chan *p11.Session, keepers), gone: make(chan struct{}),
		measured: p11.NewTemplate(measured()...),
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
			return nil, fmt.Errorf("%w: cannot open a session: %w", ErrUnavailable, err)
		}
		c.keepers <- s
		c.kept++
		if i == 0 {
			if err := login(s, p11.NormalUser, t.cfg.PIN); err != nil {
				return nil, err
			}
		}
	}
	s := <-c.keepers
	defer func() { c.keepers <- s }()
	if known := t.caps.Load(); known != nil {
		c.sm = known.sm
	} else if c.sm, err = findProfile(t.mod, c.slot, s, t.cfg.Profile, t.cfg.Profiles); err != nil {
		return nil, fault("find the token's profile", err)
	}
	if err := c.findKeys(s); err != nil {
		return nil, fault("find the token's keys", err)
	}
	// A token that comes back is the same: its serial and keys are pinned.
	if c.caps = t.caps.Load(); c.caps == nil {
		if c.caps, err = c.probe(s); err != nil {
			return nil, fault("probe the token", err)
		}
	}
	return c, nil
}

// findToken finds the one token of a label, and insists on the serial. An
// empty serial stands for any.
func findToken(mod *p11.Module, label, serial string) (p11.Token, error) {
	all, err := mod.Tokens()
	if err != nil {
		return p11.Token{}, fmt.Errorf("%w: cannot list the tokens: %w", ErrUnavailable, err)
	}
	var found []p11.Token
	for _, tok := range all {
		if tok.Initialized && tok.Label == label {
			found = append(found, tok)
		}
	}
	switch {
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

// login tries the PIN once and wipes it.
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
	switch w := worst(err); {
	case err == nil, errors.Is(err, p11.UserAlreadyLoggedIn):
		return nil
	case errors.Is(err, p11.AnotherAlreadyLoggedIn):
		return fmt.Errorf("%w: the other user is logged in to this token in this process", ErrUnavailable)
	case w == p11.SessionFault, w == p11.TokenFault:
		return fmt.Errorf("%w: cannot log in: %w", ErrUnavailable, err)
	}
	// Whatever else a token answers, it may have counted the try.
	if user == p11.SO {
		return fmt.Errorf("%w: %w", ErrSOPIN, err)
	}
	return fmt.Errorf("%w: %w", ErrPIN, err)
}

// shutdown ends the connection: nobody gets a session any more, calls under
// way finish, and only then the owners of the opened materials are closed, so
// that no handle is used after it may have been given to another object.
func (c *connection) shutdown() {
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

// connection returns the present one, or waits for the next.
func (t *Token) connection(ctx context.Context) (*connection, error) {
	if c := t.conn.Load(); c != nil {
		return c, nil
	}
	patience := time.NewTimer(t.cfg.Patience)
	defer patience.Stop()
	for {
		t.mu.Lock()
		back, end := t.back, t.end
		t.mu.Unlock()
		if end != nil {
			return nil, end
		}
		if c := t.conn.Load(); c != nil {
			return c, nil
		}
		select {
		case <-back:
		case <-patience.C:
			return nil, fmt.Errorf("%w: waited %v for it to come back", ErrUnavailable, t.cfg.Patience)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// lost says that c is of no use any more and has it replaced.
func (t *Token) lost(c *connection, why error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn.Load() != c || t.end != nil {
		return
	}
	c.kill()
	t.conn.Store(nil)
	t.back = make(chan struct{})
	t.log.Error("token lost; opening it again", "token", t.cfg.Label, "cause", why)
	t.wg.Go(func() {
		c.shutdown()
		t.reopen()
	})
}

// The waits between attempts to open a lost token.
const (
	firstWait = 50 * time.Millisecond
	lastWait  = 5 * time.Second
)

func (t *Token) reopen() {
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		// A module that lost its token may need to be told to look again.
		err := t.mod.Reinitialize(wait > firstWait)
		var c *connection
		if err == nil {
			c, err = t.connect()
		}
		t.mu.Lock()
		switch {
		case t.end != nil: // closed meanwhile
			t.mu.Unlock()
			if c != nil {
				c.shutdown()
			}
			return
		case err == nil:
			t.caps.Store(c.caps)
			t.conn.Store(c)
			close(t.back)
			t.mu.Unlock()
			t.log.Info("token is back", "token", t.cfg.Label)
			return
		case errors.Is(err, ErrPIN), errors.Is(err, ErrUntrusted):
			// Trying again would lock the token, or use a thief's.
			t.end = err
			close(t.back)
			t.mu.Unlock()
			t.log.Error("token refused; nothing is tried again until the process is restarted", "token", t.cfg.Label, "cause", err)
			return
		}
		t.mu.Unlock()
		t.log.Warn("token is still away", "token", t.cfg.Label, "cause", err, "next_attempt_in", wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-t.closed:
			timer.Stop()
			return
		}
	}
}

// acquire takes a session of the pool, in order of asking.
func (c *connection) acquire(ctx context.Context) (*p11.Session, error) {
	for {
		var s *p11.Session
		select {
		case s = <-c.places:
		case <-c.gone:
			return nil, errConnectionLost
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: all %d sessions are busy: %w", ErrUnavailable, c.sessions(), ctx.Err())
		}
		if c.dead() {
			c.places <- s
			return nil, errConnectionLost
		}
		if s != nil {
			return s, nil
		}
		s, err := c.t.mod.OpenSession(c.slot)
		if err == nil {
			return s, nil
		}
		if !errors.Is(err, p11.SessionCount) || !c.shrink() {
			c.places <- nil
			return nil, err
		}
	}
}

// errConnectionLost: another connection is to be asked for.
var errConnectionLost = fmt.Errorf("%w: connection lost", ErrUnavailable)

// session is a session of the pool while it is lent.
type session struct {
	*p11.Session
	spoilt bool // may hold an object that nobody knows: closed instead of kept
}

// with lends a session of the pool to f. A session that died, or is in a state
// nobody knows, is closed; where it died of the token's loss the connection is
// given up. All of that happens while the session's place is held, so that
// nobody finalises the module meanwhile.
func (c *connection) with(ctx context.Context, f func(s *session) error) (err error) {
	lent, err := c.acquire(ctx)
	if err != nil {
		if worst(err) > p11.NoFault {
			c.t.lost(c, err)
		}
		return err
	}
	s := &session{Session: lent}
	returned := false
	defer func() {
		if s.spoilt || !returned || c.dead() { // not returned: f panicked
			_ = lent.Close()
			lent = nil
		}
		c.places <- lent
	}()
	err = f(s)
	returned = true
	switch w := worst(err); {
	case w >= p11.TokenFault:
		c.t.lost(c, err)
	case w == p11.SessionFault:
		s.spoilt = true
		c.examine(err)
	}
	return err
}

// worst classifies an error of a PKCS#11 call.
func worst(err error) p11.Fault {
	if err == nil {
		return p11.NoFault
	}
	var rv p11.RV
	if !errors.As(err, &rv) {
		return p11.NoFault
	}
	fault := rv.Fault()
	var interrupted *p11.InterruptedError
	if errors.As(err, &interrupted) {
		fault = max(fault, p11.SessionFault)
	}
	return fault
}

// attempts is how often an operation is tried: once more when its session had
// died, once more when the token had.
const attempts = 3

// do runs f with a session. f is run again with another session, or on the
// token's next connection, when its error says that the session or the token
// went away: f must leave nothing behind but session objects.
func (t *Token) do(ctx context.Context, op string, f func(c *connection, s *session) error) error {
	var err error
	for range attempts {
		if ctx.Err() != nil {
			return fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		}
		var c *connection
		if c, err = t.connection(ctx); err != nil {
			return err
		}
		err = c.with(ctx, func(s *session) error { return f(c, s) })
		if worst(err) < p11.SessionFault && !errors.Is(err, errConnectionLost) {
			break
		}
	}
	return fault(op, err)
}

// examine decides, after a session has died, whether the token is still there
// and still logged in.
func (c *connection) examine(why error) {
	s, err := c.t.mod.OpenSession(c.slot)
	if errors.Is(err, p11.SessionCount) {
		return // it is there
	}
	in := false
	if err == nil {
		in, err = s.LoggedIn()
		_ = s.Close()
	}
	// The keepers' materials die with them without a word.
	alive := err == nil && in
	for range keepers {
		if !alive {
			break
		}
		select {
		case k := <-c.keepers:
			in, err := k.LoggedIn()
			alive = err == nil && in
			c.keepers <- k
		default: // busy, and so the judge of itself
		}
	}
	if !alive {
		c.t.lost(c, why)
	}
}

// fault gives an error of a PKCS#11 call its kind. Errors that have one, and
// those of customers' input, stay as they are.
func fault(op string, err error) error {
	var rv p11.RV
	if err == nil || !errors.As(err, &rv) || isKind(err) {
		return err
	}
	return fmt.Errorf("%w: %s: %w", ErrUnavailable, op, err)
}

var kinds = []error{
	ErrInvalidMaterial, ErrUnavailable, ErrPIN, ErrUnsupported, ErrPairNotFound, ErrUntrusted, ErrKeyLost, ErrAuthentication, ErrClosed,
}

func isKind(err error) bool {
	for _, kind := range kinds {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
