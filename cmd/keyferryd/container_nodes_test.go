//go:build container

package main

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
)

// TestContainerNodes has two servers on one PostgreSQL and one token, as
// softhsm/compose.nodes.yaml sets them up. Under load one of them loses the
// database and gets it back, and the other is killed. No import that was
// answered is lost, and what is deleted is not used for longer than a second,
// wherever.
func TestContainerNodes(t *testing.T) {
	t.Parallel()
	one := newBox(t, "compose.yaml", "compose.nodes.yaml")
	two := one.at("keyferryd-2")
	one.compose(t, "up", "-d")
	for _, b := range []*box{one, two} {
		b.waitUntilHealthy(t)
	}
	one.readSecret(t)
	two.keys = one.keys

	docker(t, "exec", one.at("database").id(t), "sh", "-euc", "! ls /run/secrets/* /run/officer/* /var/lib/keyferry/tokens/*")
	require.NotContains(t, one.compose(t, "logs"), one.keys.AccessKeySecret)

	onFirst, onSecond := newLoad(t, one, 2), newLoad(t, two, 2)
	onFirst.start(t)
	onSecond.start(t)
	onFirst.waitFor(t, 10)
	onSecond.waitFor(t, 10)

	t.Run("deletion on one stops use on both", func(t *testing.T) {
		u := newUser(t, one, two)
		require.NoError(t, u.owner.call(t.Context(), "DeleteKeyMaterial", map[string]string{"KeyId": u.owner.keyID}, nil))
		deleted := time.Now()
		u.waitFor(t, "Rejected.PendingImport")
		require.Less(t, u.lastUse().Sub(deleted), time.Second)
	})

	t.Run("the second is cut off from the database", func(t *testing.T) {
		u := newUser(t, one, two)
		network := one.project + "_database"
		docker(t, "network", "disconnect", network, two.id(t))
		cut := time.Now()
		require.NoError(t, u.owner.call(t.Context(), "DeleteKeyMaterial", map[string]string{"KeyId": u.owner.keyID}, nil))
		deleted := time.Now()
		u.waitFor(t, "ServiceUnavailableTemporary")
		require.Less(t, time.Since(cut), 10*time.Second, "Alibaba Cloud's SDKs would not hear of it")
		require.Less(t, u.lastUse().Sub(deleted), time.Second)
		onFirst.waitFor(t, 10)
		docker(t, "network", "connect", network, two.id(t))
		onSecond.waitFor(t, 10)
		u.waitFor(t, "Rejected.PendingImport")
	})

	t.Run("the first is killed", func(t *testing.T) {
		docker(t, "kill", "-s", "KILL", one.id(t))
		onSecond.waitFor(t, 20)
		onFirst.stop(t)
		onFirst.check(t, two)
		docker(t, "start", one.id(t))
		one.waitUntilHealthy(t)
		again := newLoad(t, one, 1)
		again.start(t)
		again.waitFor(t, 5)
		again.stop(t)
		onSecond.stop(t)
		for _, l := range []*load{onFirst, onSecond, again} {
			l.check(t, one)
			l.check(t, two)
		}
	})
}

// load is customers of one server, who go on whatever becomes of it.
type load struct {
	customers []*resolute
	answered  chan struct{} // gets one for each import, as long as somebody waits
	stop      func(t *testing.T)
}

func newLoad(t *testing.T, b *box, n int) *load {
	t.Helper()
	l := &load{answered: make(chan struct{})}
	for range n {
		l.customers = append(l.customers, &resolute{customer: newCustomer(t, b.client(t))})
	}
	return l
}

func (l *load) start(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	errs := make([]error, len(l.customers))
	for i, c := range l.customers {
		blob := wrapped(t, byok.OAEPSHA1, c.publicKey, c.material)
		wg.Go(func() { errs[i] = c.work(ctx, blob, l.answered) })
	}
	l.stop = func(t *testing.T) {
		t.Helper()
		cancel()
		wg.Wait()
		require.NoError(t, errors.Join(errs...))
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// waitFor waits until so many more imports are answered.
func (l *load) waitFor(t *testing.T, imports int) {
	t.Helper()
	late := time.After(time.Minute)
	for range imports {
		select {
		case <-l.answered:
		case <-late:
			t.Fatal("the server does not serve")
		}
	}
}

// check requires that a server has what the customers were told.
func (l *load) check(t *testing.T, b *box) {
	t.Helper()
	for _, c := range l.customers {
		c.client = b.client(t)
		made := c.receiptExpiries(t)
		require.IsIncreasing(t, made)
		require.Subset(t, made, c.acknowledged, "an import that was answered is lost")
		require.Subset(t, c.attempted, made)
		var answer struct {
			KeyMetadata struct {
				keyState
				MaterialExpireTime time.Time
			}
		}
		require.NoError(t, c.call(t.Context(), "DescribeKey", map[string]string{"KeyId": c.keyID}, &answer))
		require.Equal(t, "Enabled", answer.KeyMetadata.KeyState)
		require.Equal(t, made[len(made)-1], answer.KeyMetadata.MaterialExpireTime.Unix())
	}
}

// resolute is a customer who imports again and again, each time with a later
// expiry.
type resolute struct {
	*customer
	attempted, acknowledged []int64 // the expiries
}

// work ends with ctx. It fails only for answers that neither a kill nor a lost
// database explains.
func (c *resolute) work(ctx context.Context, wrapped string, answered chan<- struct{}) error {
	for expire := time.Now().Add(1000 * time.Hour).Unix(); ctx.Err() == nil; expire++ {
		params := c.params(wrapped)
		params["KeyMaterialExpireUnix"] = strconv.FormatInt(expire, 10)
		c.attempted = append(c.attempted, expire)
		switch err := c.call(ctx, "ImportKeyMaterial", params, nil); {
		case err == nil:
			c.acknowledged = append(c.acknowledged, expire)
			select {
			case answered <- struct{}{}:
			default:
			}
		case codeOf(err) != "" && codeOf(err) != "ServiceUnavailableTemporary":
			return err
		default: // it may have taken effect
			select {
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond): // as any client waits
			}
		}
	}
	return nil
}

// user encrypts under a key on one server, all the time, until the test ends.
// Its owner deals with the other.
type user struct {
	owner *customer

	mu    sync.Mutex
	last  time.Time // when the last use was asked for that was granted
	codes chan string
}

func newUser(t *testing.T, owners, users *box) *user {
	t.Helper()
	u := &user{owner: newCustomer(t, owners.client(t)), codes: make(chan string)}
	require.NoError(t, u.owner.call(t.Context(), "ImportKeyMaterial",
		u.owner.params(wrapped(t, byok.OAEPSHA1, u.owner.publicKey, u.owner.material)), nil))
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		c := users.client(t)
		wg.Go(func() { u.use(ctx, c) })
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	u.waitFor(t, "")
	return u
}

func (u *user) use(ctx context.Context, c *client) {
	for ctx.Err() == nil {
		sent := time.Now()
		err := c.call(ctx, "Encrypt", map[string]string{"KeyId": u.owner.keyID, "Plaintext": "YQ=="}, nil)
		if err == nil {
			u.mu.Lock()
			if sent.After(u.last) {
				u.last = sent
			}
			u.mu.Unlock()
		}
		if err == nil || codeOf(err) != "" {
			select {
			case u.codes <- codeOf(err):
			case <-time.After(time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

func (u *user) lastUse() time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.last
}

// waitFor waits for an answer of that code; "" is that of a use.
func (u *user) waitFor(t *testing.T, code string) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		select {
		case got := <-u.codes:
			if got == code {
				return
			}
			require.Contains(t, []string{"", "ServiceUnavailableTemporary"}, got)
		case <-late:
			t.Fatalf("no answer %q", code)
		}
	}
}
