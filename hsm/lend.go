package hsm

import (
	"context"
	"errors"
	"fmt"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// take takes a place of the pool, in order of asking.
func (c *connection) take(ctx context.Context) (*p11.Session, error) {
	select {
	case s := <-c.places:
		if c.dead() {
			c.places <- s
			return nil, errConnectionLost
		}
		return s, nil
	case <-c.gone:
		return nil, errConnectionLost
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: all %d sessions are busy%s: %w", ErrUnavailable, c.sessions(), c.unanswered(), ctx.Err())
	}
}

// unanswered says why sessions may be busy for long.
func (c *connection) unanswered() string {
	if n := c.left.Load(); n > 0 {
		return fmt.Sprintf(", %d of them with calls that the token has not answered in time", n)
	}
	return ""
}

// errConnectionLost: another connection is to be asked for.
var errConnectionLost = fmt.Errorf("%w: connection lost", ErrUnavailable)

// errShrunk: the token did not grant a session for a place, which is given up.
var errShrunk = errors.New("hsm: the pool has become smaller")

// session is a session of the pool while it is lent.
type session struct {
	*p11.Session
	spoilt bool   // may hold an object that nobody knows: closed instead of kept
	wipe   func() // if not nil: of a result that nobody waits for any more
}

// with lends a session of the pool to f. One in which a call has failed, or
// that is in a state that nobody knows, is closed; where the token may be at
// fault it has to prove itself. All of that happens while the session's place
// is held, so that nobody finalises the module meanwhile.
//
// Where ctx has a deadline f runs in a goroutine, which is left behind with the
// session when ctx ends: what f writes must not be read after an error.
func (c *connection) with(ctx context.Context, f func(s *session) error) error {
	for {
		place, err := c.take(ctx)
		if err != nil {
			return err
		}
		_, err = within(ctx, func() (*session, error) { return c.lend(place, f) }, func(s *session, _ error) {
			if s != nil && s.wipe != nil {
				s.wipe()
			}
			c.returned()
		})
		if errors.Is(err, errLeft) {
			c.leave()
		}
		if !errors.Is(err, errShrunk) {
			return err
		}
	}
}

// leave counts a call that its caller has left behind.
func (c *connection) leave() {
	c.t.log.Warn("the token has not answered a call by the time its caller gave up; the call keeps its session",
		"token", c.t.cfg.Label, "unanswered", c.left.Add(1))
}

func (c *connection) returned() {
	c.t.log.Warn("the token has answered a call that nobody waits for any more",
		"token", c.t.cfg.Label, "unanswered", c.left.Add(-1))
}

// lend runs f with the session of a place, or with a new one.
func (c *connection) lend(place *p11.Session, f func(s *session) error) (s *session, err error) {
	gaveUp := false
	defer func() {
		if !gaveUp {
			c.places <- place
		}
	}()
	if place == nil {
		if place, err = c.t.mod.OpenSession(c.slot); err != nil {
			if errors.Is(err, p11.SessionCount) && c.shrink() {
				gaveUp = true
				return nil, errShrunk
			}
			c.examine(err)
			return nil, fmt.Errorf("%w: cannot open a session: %w", p11.SessionClosed, err)
		}
	}
	s = &session{Session: place}
	returned := false
	defer func() {
		if s.spoilt || !returned || c.dead() { // not returned: f panicked
			_ = place.Close()
			place = nil
		}
	}()
	err = f(s)
	returned = true
	failed, unwell := failed(err)
	s.spoilt = s.spoilt || failed
	if unwell {
		c.examine(err)
	}
	return s, err
}

// errLeft: the caller has not waited for the end of a call.
var errLeft = fmt.Errorf("%w: the token has not answered", ErrUnavailable)

// within does work, which cannot be interrupted, on the caller's time. If ctx
// has a deadline the caller leaves the work behind when ctx ends, with an error
// that wraps errLeft; the result, when there is one, then goes to late.
func within[T any](ctx context.Context, work func() (T, error), late func(T, error)) (T, error) {
	if _, bounded := ctx.Deadline(); !bounded {
		return work()
	}
	return leaving(ctx, work, late)
}

// leaving is within where ctx need not have a deadline: a person may interrupt
// what is done once, such as the opening of a token.
func leaving[T any](ctx context.Context, work func() (T, error), late func(T, error)) (T, error) {
	type result struct {
		value    T
		err      error
		panicked any
	}
	results, left := make(chan result), make(chan struct{})
	go func() {
		var r result
		func() {
			defer func() { r.panicked = recover() }()
			r.value, r.err = work()
		}()
		select {
		case results <- r:
		case <-left:
			late(r.value, r.err)
		}
	}()
	select {
	case r := <-results:
		if r.panicked != nil {
			panic(r.panicked)
		}
		return r.value, r.err
	case <-ctx.Done():
		close(left)
		var none T
		return none, fmt.Errorf("%w: %w", errLeft, ctx.Err())
	}
}

// attempts is how often an operation is tried: once more when its session had
// died, once more when the token had.
const attempts = 3

// do runs f with a session. f is run again with another session, or on the
// token's next connection, when its error says that the session or the token
// may be at fault: f must leave nothing behind but session objects. What f
// writes must not be read after an error.
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
		if _, unwell := failed(err); !unwell && !errors.Is(err, errConnectionLost) {
			break
		}
	}
	return fault(op, err)
}
