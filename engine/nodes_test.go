package engine_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/hsm"
)

// postgresServer is one for all tests of this package.
var postgresServer = sync.OnceValues(func() (*pgtest.Server, error) {
	server, err := pgtest.Start(pgtest.FastSettings...)
	if err == nil {
		shared.Cleanup(func() { _ = server.Stop() })
	}
	return server, err
})

// newDatabase names a database for the nodes of one test.
func newDatabase(t *testing.T) (*pgtest.Server, string) {
	t.Helper()
	server, err := postgresServer()
	pgtest.Need(t, err)
	name, err := server.Database(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() { server.Release(name) })
	dsn := server.DSN(name)
	return server, dsn
}

// node is one of several engines on one database and one token.
type node struct {
	*engine.Engine
	store store.Store
}

// newNode opens a node that sweeps when it is told to, unless a setting says
// otherwise.
func newNode(t *testing.T, dsn string, settings ...func(*engine.Config)) *node {
	t.Helper()
	db, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn})
	require.NoError(t, err)
	cfg := engine.Config{Token: plainToken(), Store: db, ManualSweep: true, PoolSize: 1, PairBound: 1, FailureFloor: time.Millisecond}
	for _, set := range settings {
		set(&cfg)
	}
	e, err := engine.New(t.Context(), cfg)
	require.NoError(t, err)
	instance, err := db.Instance(t.Context())
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, e.Close())
		require.NoError(t, db.Close())
		pairs, err := cfg.Token.Pairs(context.Background(), instance)
		require.NoError(t, err)
		for _, pair := range pairs {
			require.NoError(t, cfg.Token.DestroyPair(context.Background(), pair.ID))
		}
	})
	return &node{Engine: e, store: db}
}

// newNodes opens nodes that hear of each other.
func newNodes(t *testing.T, dsn string, n int, settings ...func(*engine.Config)) []*node {
	t.Helper()
	nodes := make([]*node, n)
	for i := range nodes {
		nodes[i] = newNode(t, dsn, settings...)
	}
	for _, n := range nodes {
		require.Eventually(t, func() bool { return n.store.Epoch() != 0 }, 20*time.Second, time.Millisecond)
	}
	return nodes
}

func (n *node) newKey(t *testing.T) string {
	t.Helper()
	key, err := n.CreateKey(t.Context(), engine.CreateKeyInput{})
	require.NoError(t, err)
	return key.KeyID
}

// importRequest wraps material for a key.
func (n *node) importRequest(t *testing.T, keyID string, material []byte) engine.ImportInput {
	t.Helper()
	params, err := n.GetParametersForImport(t.Context(), keyID, hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	wrapped, err := byok.Wrap(string(hsm.OAEPSHA1), params.PublicKey, material)
	require.NoError(t, err)
	return engine.ImportInput{KeyID: keyID, EncryptedKeyMaterial: wrapped, ImportToken: params.ImportToken}
}

func (n *node) encrypts(keyID string) error {
	_, err := n.Encrypt(context.Background(), keyID, []byte("x"), nil)
	return err
}

// requireStops requires that a node stops to use a key, in the way of kind,
// within a second from now.
func (n *node) requireStops(t *testing.T, keyID string, kind engine.Kind) {
	t.Helper()
	began := time.Now()
	for !errors.Is(n.encrypts(keyID), kind) {
		require.Less(t, time.Since(began), time.Second, "it is still used")
	}
}

// What one node stops, the other stops, which has the key open.
func TestOneNodeStopsAll(t *testing.T) {
	_, dsn := newDatabase(t)
	nodes := newNodes(t, dsn, 2)
	one, two := nodes[0], nodes[1]
	keyID, material := one.newKey(t), randomBytes(32)
	in := one.importRequest(t, keyID, material)
	_, err := one.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	require.NoError(t, two.encrypts(keyID))

	require.NoError(t, one.DisableKey(t.Context(), keyID))
	two.requireStops(t, keyID, engine.KeyDisabled)
	require.NoError(t, one.EnableKey(t.Context(), keyID))
	require.NoError(t, two.encrypts(keyID))

	require.NoError(t, one.DeleteKeyMaterial(t.Context(), keyID))
	two.requireStops(t, keyID, engine.KeyPendingImport)
	_, err = two.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err, "the other node has the pair too")
	require.NoError(t, one.encrypts(keyID))
	require.NoError(t, two.encrypts(keyID))

	// An expiry that comes closer.
	in.ExpireAt = time.Now().Add(2 * time.Second).Truncate(time.Second)
	_, err = one.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return errors.Is(two.encrypts(keyID), engine.KeyPendingImport) },
		time.Until(in.ExpireAt)+time.Second, 5*time.Millisecond)
	in.ExpireAt = time.Time{}
	_, err = one.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	require.NoError(t, two.encrypts(keyID))

	require.NoError(t, one.ScheduleKeyDeletion(t.Context(), keyID, 7))
	two.requireStops(t, keyID, engine.KeyPendingDeletion)
}

// A node that does not hear of changes any more stops too: first it hears
// nothing, and then it can read nothing.
func TestNodeThatIsCutOffStops(t *testing.T) {
	server, direct := newDatabase(t)
	proxy, dsn := pgtest.NewProxy(t, server, direct)
	one, two := newNodes(t, direct, 1)[0], newNodes(t, dsn, 1)[0]
	keyID := one.newKey(t)
	_, err := one.ImportKeyMaterial(t.Context(), one.importRequest(t, keyID, randomBytes(32)))
	require.NoError(t, err)
	require.NoError(t, two.encrypts(keyID))

	proxy.LoseEverything()
	require.NoError(t, one.DisableKey(t.Context(), keyID))
	began, last := time.Now(), time.Now()
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		_, err := two.Encrypt(ctx, keyID, []byte("x"), nil)
		cancel()
		if err != nil {
			require.ErrorIs(t, err, engine.Unavailable)
			break
		}
		last = time.Now()
	}
	require.Less(t, last.Sub(began), time.Second)
	proxy.Cut()
	proxy.LoseNothing()
	require.Eventually(t, func() bool { return errors.Is(two.encrypts(keyID), engine.KeyDisabled) }, 20*time.Second, 10*time.Millisecond)
	require.NoError(t, one.EnableKey(t.Context(), keyID))
	require.NoError(t, two.encrypts(keyID))
}

// Of two first imports at once one decides what the key is, for both nodes.
func TestTwoNodesImportAtOnce(t *testing.T) {
	_, dsn := newDatabase(t)
	nodes := newNodes(t, dsn, 2)
	for range 4 {
		keyID := nodes[0].newKey(t)
		var requests [2]engine.ImportInput
		for i, n := range nodes {
			requests[i] = n.importRequest(t, keyID, randomBytes(32))
		}
		won := 0
		for _, err := range inParallel(len(nodes), func(i int) error {
			_, err := nodes[i].ImportKeyMaterial(t.Context(), requests[i])
			return err
		}) {
			if err == nil {
				won++
				continue
			}
			require.ErrorIs(t, err, engine.InvalidKeyMaterial)
		}
		require.Equal(t, 1, won)
		sealed, err := nodes[0].Encrypt(t.Context(), keyID, []byte("carried"), nil)
		require.NoError(t, err)
		opened, err := nodes[1].Decrypt(t.Context(), sealed.Blob, nil)
		require.NoError(t, err)
		require.Equal(t, "carried", string(opened.Plaintext))
	}
}

// Two nodes that sweep all the time do each thing once, and one that ends
// leaves it to the other.
func TestOneNodeSweepsForAll(t *testing.T) {
	_, dsn := newDatabase(t)
	clock := newClock()
	nodes := newNodes(t, dsn, 2, func(c *engine.Config) { c.Now = clock.Now })
	keyID := nodes[0].newKey(t)
	in := nodes[0].importRequest(t, keyID, randomBytes(32))
	in.ExpireAt = clock.Now().Add(time.Hour).Truncate(time.Second)
	_, err := nodes[0].ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	revision := func() int64 {
		row, err := nodes[0].store.Key(t.Context(), keyID)
		require.NoError(t, err)
		return row.Revision
	}
	before := revision()
	clock.advance(2 * time.Hour)
	for _, err := range inParallel(8, func(i int) error { return nodes[i%2].Sweep(t.Context()) }) {
		require.NoError(t, err)
	}
	require.Equal(t, before+1, revision())
	row, err := nodes[0].store.Key(t.Context(), keyID)
	require.NoError(t, err)
	require.Empty(t, row.Material)

	_, err = nodes[1].ImportKeyMaterial(t.Context(), engine.ImportInput{
		KeyID: keyID, EncryptedKeyMaterial: in.EncryptedKeyMaterial, ImportToken: in.ImportToken,
		ExpireAt: clock.Now().Add(time.Hour).Truncate(time.Second),
	})
	require.NoError(t, err)
	clock.advance(2 * time.Hour)
	require.NoError(t, nodes[0].Close())
	require.NoError(t, nodes[1].Sweep(t.Context()))
	row, err = nodes[1].store.Key(t.Context(), keyID)
	require.NoError(t, err)
	require.Empty(t, row.Material, "the other node goes on at once")
}

// sweeps counts what an Engine destroyed of its own accord.
type sweeps struct {
	engine.Observer
	keys, pairs atomic.Int64

	mu     sync.Mutex
	failed []error
}

func (s *sweeps) SweptKey()                     { s.keys.Add(1) }
func (s *sweeps) SweptPair()                    { s.pairs.Add(1) }
func (s *sweeps) Used(bool)                     {}
func (s *sweeps) Imported(hsm.Algorithm, error) {}

func (s *sweeps) Swept(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && !errors.Is(err, context.Canceled) { // by Close
		s.failed = append(s.failed, err)
	}
}

// Two nodes that sweep all the time, while customers import and encrypt on both,
// destroy each thing once: what each of them says that it destroyed is, together,
// what was there.
//
// That is so even for keys where both sweep at once, because the lease of one ran
// out in the midst of it: then a pair is found to be gone.
func TestNodesDestroyOnce(t *testing.T) {
	t.Run("one sweeps for all", func(t *testing.T) { testNodesDestroyOnce(t, false) })
	t.Run("both sweep", func(t *testing.T) { testNodesDestroyOnce(t, true) })
}

// generous is a store whose leases everybody has.
type generous struct{ store.Store }

func (generous) Lease(context.Context, string, string, time.Duration) (bool, error) { return true, nil }

func testNodesDestroyOnce(t *testing.T, both bool) {
	_, dsn := newDatabase(t)
	clock := newClock()
	const keys, pairs = 40, 3
	counts := make([]*sweeps, 2)
	nodes := make([]*node, len(counts))
	for i := range nodes {
		counts[i] = &sweeps{}
		nodes[i] = newNodes(t, dsn, 1, func(c *engine.Config) {
			c.Now, c.Observer, c.ManualSweep, c.SweepInterval = clock.Now, counts[i], false, time.Millisecond
			c.PoolSize, c.PairBound = 1, pairs
			if both {
				c.Store = generous{c.Store}
			}
		})[0]
	}
	expire := clock.Now().Add(time.Hour).Truncate(time.Second)
	expiring := make([]string, keys)
	for _, err := range inParallel(8, func(worker int) error {
		for i := worker; i < keys; i += 8 {
			n := nodes[i%2]
			expiring[i] = n.newKey(t)
			in := n.importRequest(t, expiring[i], randomBytes(32))
			in.ExpireAt = expire
			if _, err := n.ImportKeyMaterial(t.Context(), in); err != nil {
				return err
			}
		}
		return nil
	}) {
		require.NoError(t, err)
	}
	bound := 0
	rows, err := nodes[0].store.Pairs(t.Context(), time.Time{}, 0)
	require.NoError(t, err)
	for _, row := range rows {
		if !row.BoundAt.IsZero() {
			bound++
		}
	}
	require.Equal(t, pairs, bound)

	load, stop := context.WithCancel(t.Context())
	var working sync.WaitGroup
	for i := range 4 {
		n := nodes[i%2]
		keyID := n.newKey(t)
		in := n.importRequest(t, keyID, randomBytes(32))
		working.Go(func() {
			for load.Err() == nil {
				_, _ = n.ImportKeyMaterial(load, in) // until its token expires
				_, _ = n.Encrypt(load, keyID, []byte("x"), nil)
			}
		})
	}
	total := func(count func(*sweeps) *atomic.Int64) (n int64) {
		for _, c := range counts {
			n += count(c).Load()
		}
		return n
	}
	sweptKeys, sweptPairs := func(s *sweeps) *atomic.Int64 { return &s.keys }, func(s *sweeps) *atomic.Int64 { return &s.pairs }
	clock.advance(2 * time.Hour)
	require.Eventually(t, func() bool { return total(sweptKeys) >= keys }, 30*time.Second, time.Millisecond)
	clock.advance(engine.ImportTokenLife)
	require.Eventually(t, func() bool { return total(sweptPairs) >= pairs }, 30*time.Second, time.Millisecond)
	stop()
	working.Wait()
	for _, n := range nodes {
		require.NoError(t, n.Close())
	}
	require.EqualValues(t, keys, total(sweptKeys))
	if !both {
		require.EqualValues(t, pairs, total(sweptPairs))
	}
	require.Empty(t, slices.Concat(counts[0].failed, counts[1].failed), "what is gone already is no failure")
	rows, err = nodes[0].store.Pairs(t.Context(), clock.Now(), 100)
	require.NoError(t, err)
	require.Empty(t, rows)
	for _, keyID := range expiring {
		row, err := nodes[0].store.Key(t.Context(), keyID)
		require.NoError(t, err)
		require.Empty(t, row.Material)
		_, entries, err := nodes[0].store.KeyReceipts(t.Context(), keyID, 0, 1)
		require.NoError(t, err)
		require.Equal(t, 2, entries, "an import and one deletion")
	}
}

// Pairs are generated by one node and taken by all.
func TestNodesShareAPool(t *testing.T) {
	_, dsn := newDatabase(t)
	nodes := newNodes(t, dsn, 2, func(c *engine.Config) { c.PoolSize, c.PairBound = 2, 64 })
	keyID := nodes[0].newKey(t)
	for _, err := range inParallel(6, func(i int) error {
		_, err := nodes[i%2].GetParametersForImport(t.Context(), keyID, hsm.RSA2048, hsm.OAEPSHA1)
		if err == nil {
			err = nodes[0].Sweep(t.Context())
		}
		return errors.Join(err, nodes[1].Sweep(t.Context()))
	}) {
		require.NoError(t, err)
	}
	ready := func() (n int) {
		counts, err := nodes[0].store.PairCounts(t.Context(), time.Now())
		require.NoError(t, err)
		for _, c := range counts {
			if c.Algorithm == string(hsm.OAEPSHA1) {
				require.Equal(t, 6, c.Bound, "each call has a pair of its own")
				n = c.Ready
			}
		}
		return n
	}
	require.Eventually(t, func() bool { return ready() == 2 }, time.Minute, 10*time.Millisecond, "and no more")
}

// Nodes use a key together as often as its budget allows, to the last use, and
// no more often, however they take turns and end, and however some are killed:
// what a kill costs is bounded.
func TestNodesShareABudget(t *testing.T) {
	_, dsn := newDatabase(t)
	const budget, reserved = 300, 8
	open := func() *node {
		n := newNodes(t, dsn, 1, func(c *engine.Config) { c.CacheSize = 1 })[0]
		n.SetUsageLimits(budget, reserved)
		return n
	}
	nodes := []*node{open(), open(), open()}
	keys := make([]string, 2)
	for i := range keys {
		keys[i] = nodes[0].newKey(t)
		_, err := nodes[0].ImportKeyMaterial(t.Context(), nodes[0].importRequest(t, keys[i], randomBytes(32)))
		require.NoError(t, err)
	}
	var total [2]atomic.Int64
	counted := func(i int) uint64 {
		usage, err := nodes[0].store.Usage(t.Context(), keys[i])
		require.NoError(t, err)
		return usage.Uses
	}
	for round, refused := 0, false; !refused; round++ {
		var done atomic.Int64
		for _, err := range inParallel(2*len(nodes), func(i int) error {
			n := nodes[i/2]
			for j := range 7 { // each use closes the other key
				key := (i + j) % 2
				switch err := n.encrypts(keys[key]); {
				case err == nil:
					total[key].Add(1)
					done.Add(1)
				case !errors.Is(err, engine.LimitExceeded):
					return err
				}
			}
			return n.Sweep(t.Context())
		}) {
			require.NoError(t, err)
		}
		for key := range keys {
			require.LessOrEqual(t, total[key].Load(), int64(counted(key)), "more uses than are counted")
		}
		switch round {
		case 2:
			require.NoError(t, nodes[1].Close()) // in good order
			nodes[1] = open()
		case 4:
			nodes[2] = open() // the one before says nothing any more, as if it were killed
		}
		refused = done.Load() == 0
	}
	for key := range keys {
		require.EqualValues(t, budget, counted(key))
		require.InDelta(t, budget, total[key].Load(), reserved)
		require.LessOrEqual(t, total[key].Load(), int64(budget))
	}
}

// Whoever tries blobs on several nodes at once learns no more of them than on
// one, and nothing at all once the budget is used up: neither from a new node,
// nor from what was under way then.
func TestNodesShareTheFailureBudget(t *testing.T) {
	_, dsn := newDatabase(t)
	const budget, asked = 20, 30 // asked of each node
	settings := func(c *engine.Config) { c.FailureBudget = budget }
	nodes := newNodes(t, dsn, 2, settings)
	held := &held{commits: make(chan struct{}), begun: make(chan struct{}, 1)}
	slow := newNodes(t, dsn, 1, settings, func(c *engine.Config) { held.Store, c.Store = c.Store, held })[0]
	keyID := nodes[0].newKey(t)
	good := nodes[0].importRequest(t, keyID, randomBytes(32))
	bad := good
	bad.EncryptedKeyMaterial = randomBytes(256)
	bad.EncryptedKeyMaterial[0] = 0

	late := make(chan error, 1)
	go func() {
		_, err := slow.ImportKeyMaterial(context.Background(), good)
		late <- err
	}()
	<-held.begun // its material is unwrapped
	told := map[engine.Kind]int{}
	for _, err := range inParallel(asked*len(nodes), func(i int) error {
		_, err := nodes[i%len(nodes)].ImportKeyMaterial(t.Context(), bad)
		return err
	}) {
		var refused *engine.Error
		require.ErrorAs(t, err, &refused)
		told[refused.Kind]++
	}
	require.Equal(t, map[engine.Kind]int{engine.InvalidKeyMaterial: budget, engine.InvalidImportToken: asked*len(nodes) - budget}, told)
	close(held.commits)
	require.ErrorIs(t, <-late, engine.InvalidImportToken)

	require.NoError(t, nodes[0].Close())
	for _, n := range []*node{nodes[1], slow, newNode(t, dsn, settings)} {
		for _, in := range []engine.ImportInput{good, bad} {
			_, err := n.ImportKeyMaterial(t.Context(), in)
			require.ErrorIs(t, err, engine.InvalidImportToken)
		}
	}
	key, err := nodes[1].DescribeKey(t.Context(), keyID)
	require.NoError(t, err)
	require.Equal(t, engine.PendingImport, key.State)
	again := nodes[1].importRequest(t, keyID, randomBytes(32))
	_, err = nodes[1].ImportKeyMaterial(t.Context(), again)
	require.NoError(t, err, "another import token has its own budget")
}

// The server of the database is killed under load, and comes back. Nobody uses a
// key while it cannot be asked for longer than the node believes what it has
// read, nothing that was answered is lost, and both nodes go on by themselves.
func TestNodesOutliveTheirServer(t *testing.T) {
	server, err := pgtest.Start() // it forces its writes to the disk
	pgtest.Need(t, err)
	t.Cleanup(func() { require.NoError(t, server.Stop()) })
	name, err := server.Database(t.Context())
	require.NoError(t, err)
	nodes := newNodes(t, server.DSN(name), 2)
	keyID := nodes[0].newKey(t)
	_, err = nodes[0].ImportKeyMaterial(t.Context(), nodes[0].importRequest(t, keyID, randomBytes(32)))
	require.NoError(t, err)

	// Each customer imports with an expiry that grows.
	const customers = 4
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var working sync.WaitGroup
	acknowledged, own := make([]atomic.Int64, customers), make([]string, customers)
	answered := make(chan struct{}, 1)
	failed := make(chan error, customers)
	for i := range customers {
		n := nodes[i%2]
		own[i] = n.newKey(t)
		in := n.importRequest(t, own[i], randomBytes(32))
		working.Go(func() {
			for expire := time.Now().Add(time.Hour).Truncate(time.Second); ctx.Err() == nil; expire = expire.Add(time.Second) {
				in.ExpireAt = expire
				_, err := n.ImportKeyMaterial(ctx, in)
				if err == nil {
					acknowledged[i].Store(expire.Unix())
					select {
					case answered <- struct{}{}:
					default:
					}
				} else if !errors.Is(err, engine.Unavailable) {
					failed <- err
					return
				}
			}
		})
	}
	served := func() {
		for range 3 * customers {
			select {
			case <-answered:
			case err := <-failed:
				require.NoError(t, err)
			case <-time.After(time.Minute):
				t.Fatal("nobody is served")
			}
		}
	}
	served()
	require.NoError(t, server.Kill())
	killed := time.Now()
	for _, n := range nodes {
		for n.encrypts(keyID) == nil {
			require.Less(t, time.Since(killed), time.Second)
		}
		require.ErrorIs(t, n.encrypts(keyID), engine.Unavailable)
	}
	require.NoError(t, server.Restart())
	served()
	stop()
	working.Wait()
	for _, n := range nodes {
		require.NoError(t, n.encrypts(keyID))
		for i := range customers {
			key, err := n.DescribeKey(t.Context(), own[i])
			require.NoError(t, err)
			require.GreaterOrEqual(t, key.ExpireAt.Unix(), acknowledged[i].Load(), "an import that was answered is lost")
		}
	}
}

// held is a store that commits no change of a key until it may.
type held struct {
	store.Store
	begun, commits chan struct{}
}

func (s *held) UpdateKey(ctx context.Context, update store.Update) error {
	select {
	case s.begun <- struct{}{}:
	default:
	}
	<-s.commits
	return s.Store.UpdateKey(ctx, update)
}
