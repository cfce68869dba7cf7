package hsm

import (
	"context"
	"errors"
)

// Stats is the state of a Token at one moment, and what has happened to it.
type Stats struct {
	Here     bool // false while it is gone
	Sessions int  // of the pool, at most
	InUse    int  // of those, at this moment
	Lost     uint64
	Back     uint64
	// Refused is why nothing is tried again until the process is restarted and
	// a person has acted: ErrPIN, or ErrUnavailable of a token that came back
	// and is another. nil if that is not so.
	Refused error
}

// Stats waits for nothing and calls nothing of the module.
func (t *Token) Stats() Stats {
	s := Stats{Lost: t.losses.Load(), Back: t.returns.Load()}
	t.mu.Lock()
	if !errors.Is(t.end, ErrClosed) {
		s.Refused = t.end
	}
	t.mu.Unlock()
	if c := t.conn.Load(); c != nil {
		s.Here, s.Sessions = true, c.sessions()
		s.InUse = max(0, s.Sessions-len(c.places))
	}
	return s
}

// Memory is what a token says of its memory for private objects, in bytes. Both
// are 0 where it says nothing, as software tokens do.
type Memory struct {
	Free  uint64 `json:"free"`
	Total uint64 `json:"total"`
}

// Low reports whether less than a fifth is free. It is false where the token
// says nothing.
func (m Memory) Low() bool { return m.Free < m.Total/5 }

// Memory asks the token for its memory (C_GetTokenInfo). Errors:
// ErrUnavailable, ErrPIN, ErrClosed.
func (t *Token) Memory(ctx context.Context) (Memory, error) {
	var m Memory
	// With a session, for nobody finalises the module while it is lent.
	err := t.do(ctx, "ask for the token's memory", func(c *connection, _ *session) error {
		info, err := t.mod.Token(c.slot)
		m = Memory{info.FreePrivate, info.TotalPrivate}
		return err
	})
	if err != nil {
		return Memory{}, err
	}
	return m, nil
}
