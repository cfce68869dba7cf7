package hsm

// Stats is the state of a Token at one moment, and what has happened to it.
type Stats struct {
	Here     bool // false while it is gone
	Sessions int  // of the pool, at most
	InUse    int  // of those, at this moment
	Lost     uint64
	Back     uint64
}

// Stats waits for nothing and calls nothing of the module.
func (t *Token) Stats() Stats {
	s := Stats{Lost: t.losses.Load(), Back: t.returns.Load()}
	if c := t.conn.Load(); c != nil {
		s.Here, s.Sessions = true, c.sessions()
		s.InUse = max(0, s.Sessions-len(c.places))
	}
	return s
}
