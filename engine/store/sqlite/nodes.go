package sqlite

import (
	"context"
	"sync"
	"time"
)

// Shared implements store.Store. Nobody else can open the database.
func (s *Store) Shared() bool { return false }

// Watch implements store.Store. Nobody else can change the database.
func (s *Store) Watch(func(keyID, versionID string)) {}

// Epoch implements store.Store.
func (s *Store) Epoch() uint64 { return 1 }

// leases are in memory: they end with the process, and no other one has the
// database.
type leases struct {
	mu   sync.Mutex
	held map[string]lease
}

type lease struct {
	holder string
	ends   time.Time
}

// Lease implements store.Store.
func (s *Store) Lease(ctx context.Context, name, holder string, life time.Duration) (held bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	select {
	case <-s.readers.closed:
		return false, errClosed
	default:
	}
	s.leases.mu.Lock()
	defer s.leases.mu.Unlock()
	now := time.Now()
	if l, ok := s.leases.held[name]; ok && l.holder != holder && now.Before(l.ends) {
		return false, nil
	}
	if s.leases.held == nil {
		s.leases.held = make(map[string]lease)
	}
	s.leases.held[name] = lease{holder, now.Add(life)}
	return true, nil
}
