package postgres_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

// children are the programs this test binary can be.
var children = storetest.Children{
	"report": storetest.Reporter(func(dsn string) (store.Store, error) {
		return postgres.Open(context.Background(), postgres.Config{DSN: dsn})
	}),
}

func TestKilled(t *testing.T) {
	dsn := newDSN(t, sharedServer(t))
	storetest.RunKilled(t, dsn, func(t *testing.T) store.Store { return open(t, dsn) })
}

// TestServerKilled kills the server, with all of its processes, while a client
// writes, and starts it again. What was acknowledged is there; the Store, which
// stays open all the while, goes on by itself.
func TestServerKilled(t *testing.T) {
	server, err := pgtest.Start() // it forces its writes to the disk
	pgtest.Need(t, err)
	defer func() { require.NoError(t, server.Stop()) }()
	s := open(t, newDSN(t, server))
	defer func() { require.NoError(t, s.Close()) }()
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	kills := 2
	if os.Getenv("KEYFERRY_SLOW") != "" {
		kills = 10
	}
	for range kills {
		report := &cutOff{at: 200 + rng.IntN(1000), reached: make(chan struct{})}
		failed := make(chan error, 1)
		go func() { failed <- storetest.Report(t.Context(), s, report) }()
		select {
		case <-report.reached:
		case err := <-failed:
			t.Fatal("the server was not even killed yet: ", err)
		}
		require.NoError(t, server.Kill())
		require.ErrorIs(t, <-failed, store.ErrUnavailable)
		_, err := s.Key(t.Context(), "any")
		require.ErrorIs(t, err, store.ErrUnavailable)
		require.NoError(t, server.Restart())
		storetest.CheckReport(t, s, report.bytes())
	}
}

// cutOff collects what is written and says when it is so many bytes.
type cutOff struct {
	at      int
	reached chan struct{}

	mu   sync.Mutex
	text bytes.Buffer
}

func (c *cutOff) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.text.Len()
	c.text.Write(p)
	if before < c.at && c.text.Len() >= c.at {
		close(c.reached)
	}
	return len(p), nil
}

func (c *cutOff) bytes() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return bytes.Clone(c.text.Bytes())
}
