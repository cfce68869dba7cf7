package hsm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// What a call answers ends its session, never the connection: a token may
// answer anything to what a customer has sent. Only a token that then fails a
// known answer is lost.

// connection returns the present one, or waits for the next.
func (t *Token) connection(ctx context.Context) (*connection, error) {
	if c := t.conn.Load(); c != nil {
		return c, nil
	}
	patience := time.NewTimer(t.cfg.Patience)
	defer patience.Stop()
	for {
		t.mu.Lock()
		back, end, away := t.back, t.end, t.away
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
			return nil, fmt.Errorf("%w: waited %v for it to come back (%v)", ErrUnavailable, t.cfg.Patience, away)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: it has not come back yet (%v): %w", ErrUnavailable, away, ctx.Err())
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
	t.losses.Add(1)
	t.back = make(chan struct{})
	t.away = why
	t.log.Error("token lost; opening it again", "token", t.cfg.Label, "cause", why)
	t.ending.Add(1)
	t.wg.Go(func() {
		c.shutdown()
		t.ending.Add(-1)
	})
	t.wg.Go(func() { t.reopen(c) })
}

// The waits between attempts to open a lost token. They apply, too, to a token
// that is lost again and again, each time within lastWait.
const (
	firstWait = 50 * time.Millisecond
	lastWait  = 5 * time.Second
)

// reopen replaces a lost connection. One of them runs at a time.
func (t *Token) reopen(old *connection) {
	if !t.awaitCalls(old) {
		return
	}
	wait := t.pause(old)
	for again := false; t.rest(wait); again = true {
		// A module that lost its token may need to be told to look again. None
		// is finalised while a call is under way in it.
		err := t.mod.Reinitialize(again && t.ending.Load() == 0)
		var c *connection
		var shown bool
		if err == nil {
			c, shown, err = t.connect()
		}
		wait = min(max(2*wait, firstWait), lastWait)
		if t.settle(c, shown, err) {
			return
		}
		t.log.Warn("token is still away", "token", t.cfg.Label, "cause", err, "next_attempt_in", wait)
	}
}

// pause is how long a token that was lost young is left alone before it is
// opened again.
func (t *Token) pause(old *connection) (wait time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(old.born) >= lastWait {
		t.flap = 0
		return 0
	}
	wait = t.flap
	t.flap = min(max(2*t.flap, firstWait), lastWait)
	return wait
}

// settle takes the result of one attempt to open a lost token, and reports
// whether it was the last.
func (t *Token) settle(c *connection, shown bool, err error) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.end != nil: // closed meanwhile
		if c != nil {
			t.wg.Go(c.shutdown)
		}
		return true
	case err == nil:
		t.caps.Store(c.caps)
		t.conn.Store(c)
		t.returns.Add(1)
		close(t.back)
		t.log.Info("token is back", "token", t.cfg.Label)
		return true
	case errors.Is(err, ErrPIN):
		t.end = err // trying again would lock the token
	case errors.Is(err, ErrUntrusted) && shown:
		// Not an ErrUntrusted to callers, to whom that says that a single
		// record or pair is not ours.
		t.end = fmt.Errorf("%w: the token that came back was refused: %v", ErrUnavailable, err)
	default:
		t.away = err
		return false
	}
	close(t.back)
	t.log.Error("token refused; nothing is tried again until the process is restarted", "token", t.cfg.Label, "cause", err)
	return true
}

// awaitCalls waits for the calls under way of a lost connection, as long as
// calls for a token. It reports false when the Token was closed meanwhile.
func (t *Token) awaitCalls(old *connection) bool {
	patience := time.NewTimer(t.cfg.Patience)
	defer patience.Stop()
	select {
	case <-old.idle:
		return true
	case <-t.closed:
		return false
	case <-patience.C:
		t.log.Error("calls to the lost token do not return; opening it beside them, without initialising the module again",
			"token", t.cfg.Label, "waited", t.cfg.Patience)
		return true
	}
}

// rest waits, and reports false when the Token was closed meanwhile.
func (t *Token) rest(wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-t.closed:
		return false
	default:
	}
	select {
	case <-timer.C:
		return true
	case <-t.closed:
		return false
	}
}

// examine decides, after a session has died or failed without a reason,
// whether the token is still there, still logged in and still itself.
func (c *connection) examine(why error) {
	if c.dead() {
		return
	}
	if sick := c.sick(); sick != nil {
		c.t.lost(c, fmt.Errorf("%w (%w)", why, sick))
	}
}

// sick returns nil if a new session, or an old one where the token grants no
// new, gives the known answer, and none of the keepers that are free has died:
// the materials that they own die with them without a word.
func (c *connection) sick() error {
	s, err := c.t.mod.OpenSession(c.slot)
	proved := err == nil
	if proved {
		err = c.prove(s)
		_ = s.Close()
		if err != nil {
			return err
		}
	}
	for range c.kept {
		select {
		case k := <-c.keepers:
			in, dead := k.LoggedIn()
			if dead == nil && !in {
				dead = p11.UserNotLoggedIn
			}
			if dead == nil && !proved {
				dead = c.prove(k)
				proved = dead == nil
			}
			c.keepers <- k
			if dead != nil {
				return dead
			}
		default: // busy, and so the judge of itself
		}
	}
	if proved {
		return nil
	}
	return err
}

// prove has a session make the MAC by which the MAC key is known. It needs the
// login, the key and a token that computes.
func (c *connection) prove(s *p11.Session) error {
	sum, err := s.Sign(p11.Plain(p11.SHA256HMAC), c.mac, macInput(fingerprintDomain, publicConstant), make([]byte, macLen))
	if err == nil && sha256.Sum256(sum) != c.t.cfg.Pins.MACKey {
		return errors.New("hsm: the token gives a known answer wrongly")
	}
	return err
}

// absent is for what a search did not find: a session that is not logged in any
// more finds no private object and says nothing. The error is one for do.
func (c *connection) absent(s *p11.Session) error {
	if err := c.prove(s); err != nil {
		return fmt.Errorf("%w: a search found nothing, and the token fails a known answer: %w", p11.UserNotLoggedIn, err)
	}
	return nil
}

// worst classifies an error of PKCS#11 calls by the worst return value in it.
func worst(err error) (fault p11.Fault) {
	values(err, func(rv p11.RV) { fault = max(fault, rv.Fault()) })
	var interrupted *p11.InterruptedError
	if errors.As(err, &interrupted) {
		fault = max(fault, p11.SessionFault)
	}
	return fault
}

// failed reports whether err says that a PKCS#11 call failed, and unwell
// whether that may be the token's fault.
func failed(err error) (failed, unwell bool) {
	values(err, func(rv p11.RV) {
		failed = true
		unwell = unwell || rv.Doubtful() || rv.Fault() >= p11.SessionFault
	})
	return failed, unwell
}

// inputMayCause reports whether a customer's input may be all that is wrong.
func inputMayCause(err error) bool {
	may := !isKind(err)
	values(err, func(rv p11.RV) { may = may && (rv.Doubtful() || rv.Fault() == p11.NoFault) })
	return may
}

// values calls f with every return value in the tree of err.
func values(err error, f func(p11.RV)) {
	switch e := err.(type) { //nolint:errorlint // this is the walk itself
	case nil:
	case p11.RV:
		f(e)
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			values(err, f)
		}
	case interface{ Unwrap() error }:
		values(e.Unwrap(), f)
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
	ErrMaterialGone, ErrFull, ErrMark,
}

func isKind(err error) bool {
	for _, kind := range kinds {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}
