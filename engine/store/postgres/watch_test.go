package postgres_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
)

// reports are the KeyIDs that a Store reported.
type reports struct {
	mu   sync.Mutex
	seen []string
}

func watch(s store.Store) *reports {
	r := &reports{}
	s.Watch(func(keyID, versionID string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.seen = append(r.seen, keyID+" "+versionID)
	})
	return r
}

func (r *reports) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := r.seen
	r.seen = nil
	return seen
}

// awaitEpoch waits until changes are reported.
func awaitEpoch(t *testing.T, s store.Store) (epoch uint64) {
	t.Helper()
	require.Eventually(t, func() bool { epoch = s.Epoch(); return epoch != 0 }, 20*time.Second, time.Millisecond)
	return epoch
}

func TestWatch(t *testing.T) {
	dsn := newDSN(t, sharedServer(t))
	one, two := open(t, dsn), open(t, dsn)
	defer func() { require.NoError(t, one.Close()) }()
	defer func() { require.NoError(t, two.Close()) }()
	own, others := watch(one), watch(two)
	awaitEpoch(t, one)
	awaitEpoch(t, two)

	key := testKey(1)
	require.NoError(t, one.CreateKey(t.Context(), key))
	silent := next(key)
	require.NoError(t, one.UpdateKey(t.Context(), silent))
	stale := next(silent.Key)
	stale.Stale, stale.Receipt = true, &store.Receipt{KeyID: key.KeyID, Entry: []byte("e"), RowDigest: []byte("d"), MAC: []byte("m")}
	require.NoError(t, one.UpdateKey(t.Context(), stale))
	require.ErrorIs(t, one.UpdateKey(t.Context(), stale), store.ErrConflict)
	require.NoError(t, one.DeleteKey(t.Context(), store.Deletion{KeyID: key.KeyID, Revision: 3}))
	var seen []string
	require.Eventually(t, func() bool {
		seen = append(seen, others.take()...)
		return len(seen) >= 2
	}, 10*time.Second, time.Millisecond)
	require.Equal(t, []string{"key-1 version-1", "key-1 version-1"}, seen, "the stale one and the deletion, each once")
	require.Empty(t, own.take(), "one's own changes are known")
}

// TestWatchLost takes the notifications away in different manners. The epoch
// ends, and what was missed belongs to another one than what comes.
func TestWatchLost(t *testing.T) {
	server := sharedServer(t)
	direct := newDSN(t, server)
	for name, lose := range map[string]func(p *pgtest.Proxy){
		"the network": (*pgtest.Proxy).LoseEverything,
		// A session that another one of a pooler has taken the place of.
		"the answers": func(p *pgtest.Proxy) { p.LoseAnswersAfter(" beat ") },
	} {
		t.Run(name, func(t *testing.T) {
			p, dsn := pgtest.NewProxy(t, server, direct)
			s := open(t, dsn)
			defer func() { require.NoError(t, s.Close()) }()
			before := awaitEpoch(t, s)
			lose(p)
			require.Eventually(t, func() bool { return s.Epoch() == 0 }, 10*time.Second, time.Millisecond)
			p.Cut()
			p.LoseNothing()
			require.NotEqual(t, before, awaitEpoch(t, s))
		})
	}
	t.Run("the session", func(t *testing.T) {
		s := open(t, direct)
		defer func() { require.NoError(t, s.Close()) }()
		before := awaitEpoch(t, s)
		// It ends between two heartbeats, and comes back between two looks.
		execute(t, direct, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE '%pg_notify($1%'`)
		require.Eventually(t, func() bool { return s.Epoch() != before && s.Epoch() != 0 }, 10*time.Second, time.Millisecond)
	})
}

// TestEpochLapses: half a second without a sign is enough.
func TestEpochLapses(t *testing.T) {
	server := sharedServer(t)
	p, dsn := pgtest.NewProxy(t, server, newDSN(t, server))
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	awaitEpoch(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 550*time.Millisecond)
	defer cancel()
	p.LoseEverything()
	<-ctx.Done()
	require.Zero(t, s.Epoch())
}
