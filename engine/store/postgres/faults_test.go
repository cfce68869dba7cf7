package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/postgres"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
)

func testKey(n int) store.Key {
	return store.Key{
		KeyID: fmt.Sprintf("key-%d", n), KeyVersionID: fmt.Sprintf("version-%d", n), Revision: 1,
		Spec: "Aliyun_AES_256", State: "Enabled", CreatedAt: time.Unix(1_800_000_000, 0).UTC(), Material: []byte("sealed"), MAC: []byte("mac"),
	}
}

func next(key store.Key) store.Update {
	key.Revision++
	return store.Update{Key: key}
}

// TestAnswerLost loses the connection after a write was sent and done, and
// before its answer has come. The outcome is unknown, and said to be.
func TestAnswerLost(t *testing.T) {
	server := sharedServer(t)
	dsn := newDSN(t, server)
	direct := open(t, dsn)
	defer func() { require.NoError(t, direct.Close()) }()
	past, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, past.Close(context.Background())) }()
	p, dsn := pgtest.NewProxy(t, server, dsn)
	// One connection, which knows every statement after the first time.
	s, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Connections: 1})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	key := testKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))
	far := time.Unix(1_900_000_000, 0)
	nonce := func(value string) (bool, error) {
		return s.AddNonce(t.Context(), store.Nonce{Value: value, ExpiresAt: far}, time.Unix(1_800_000_000, 0))
	}

	for _, tt := range []struct {
		name  string
		write func(n int) error
		last  string // what the client sends last
		done  func() bool
		again func() // shows that the write was not made twice
	}{
		{
			"one statement",
			func(n int) error {
				if n == 0 {
					_ = s.UpdateKey(t.Context(), next(testKey(2)))
					return nil
				}
				return s.UpdateKey(t.Context(), next(key))
			}, key.KeyID,
			func() bool {
				got, err := direct.Key(context.Background(), key.KeyID)
				return err == nil && got.Revision == 2
			},
			func() { require.ErrorIs(t, s.UpdateKey(t.Context(), next(key)), store.ErrConflict) },
		},
		{
			"a transaction", func(n int) error { return s.AddPair(t.Context(), store.Pair{ID: [16]byte{byte(n)}}) }, "commit\x00",
			func() bool {
				pairs, err := direct.Pairs(context.Background(), time.Time{}, 0)
				return err == nil && len(pairs) == 2
			},
			func() { require.ErrorIs(t, s.AddPair(t.Context(), store.Pair{ID: [16]byte{1}}), store.ErrExists) },
		},
		{
			"a nonce",
			func(n int) error {
				_, err := nonce(fmt.Sprint(n))
				return err
			}, "",
			func() bool {
				var n int
				err := past.QueryRow(context.Background(), `SELECT count(*) FROM nonce`).Scan(&n)
				return err == nil && n == 2
			},
			func() {
				fresh, err := nonce("1")
				require.NoError(t, err)
				require.False(t, fresh, "it may not be used again: whether it was is not known")
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			require.NoError(t, tt.write(0))
			p.LoseAnswersAfter(tt.last)
			answer := make(chan error, 1)
			go func() { answer <- tt.write(1) }()
			require.Eventually(t, tt.done, 10*time.Second, 5*time.Millisecond)
			require.Empty(t, answer, "it does not know")
			p.Cut()
			p.LoseNothing()
			require.ErrorIs(t, <-answer, store.ErrUnavailable)
			tt.again()
		})
	}
}

// TestReadsSurvive loses the connections between and under reads: they are
// made again.
func TestReadsSurvive(t *testing.T) {
	server := sharedServer(t)
	p, dsn := pgtest.NewProxy(t, server, newDSN(t, server))
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	key := testKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))
	for range 5 {
		p.Cut()
		got, err := s.Key(t.Context(), key.KeyID)
		require.NoError(t, err)
		require.Equal(t, key, got)
		_, total, err := s.ListKeys(t.Context(), store.KeyFilter{}, 0, 10)
		require.NoError(t, err)
		require.Equal(t, 1, total)
	}
}

// TestNoAnswer has a network that swallows everything. Contexts and
// Config.Timeout bound the waiting.
func TestNoAnswer(t *testing.T) {
	server := sharedServer(t)
	p, dsn := pgtest.NewProxy(t, server, newDSN(t, server))
	s, err := postgres.Open(t.Context(), postgres.Config{DSN: dsn, Timeout: 300 * time.Millisecond})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	key := testKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))
	p.LoseEverything()
	_, err = s.Key(t.Context(), key.KeyID)
	require.ErrorIs(t, err, store.ErrUnavailable)
	require.NotErrorIs(t, err, context.DeadlineExceeded, "that is for the caller's own")
	require.ErrorIs(t, s.UpdateKey(t.Context(), next(key)), store.ErrUnavailable)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.UpdateKey(ctx, next(key)), context.DeadlineExceeded)
	p.Cut()
	p.LoseNothing()
	require.Eventually(t, func() bool { return s.UpdateKey(context.Background(), next(key)) == nil }, 10*time.Second, 10*time.Millisecond)
}

// TestWaitGivenUp ends a context while its write waits for a row that someone
// else has locked. The write is never made.
func TestWaitGivenUp(t *testing.T) {
	dsn := newDSN(t, sharedServer(t))
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	key := testKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))
	other, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close(context.Background())) }()
	_, err = other.Exec(t.Context(), `BEGIN; SELECT 1 FROM cmk FOR UPDATE`)
	require.NoError(t, err)

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.UpdateKey(ctx, next(key)), context.DeadlineExceeded)
	_, err = other.Exec(t.Context(), `ROLLBACK`)
	require.NoError(t, err)
	_, err = s.NextBoot(t.Context())
	require.NoError(t, err)
	got, err := s.Key(t.Context(), key.KeyID)
	require.NoError(t, err)
	require.Equal(t, key, got)
}

// TestSerializable has the database make every transaction SERIALIZABLE, as
// CockroachDB does: those that meet are made again until they get through.
func TestSerializable(t *testing.T) {
	server := sharedServer(t)
	dsn := newDSN(t, server)
	cfg, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	set := func(value string) {
		require.NoError(t, server.Exec(context.Background(), cfg.Database,
			fmt.Sprintf(`ALTER DATABASE %s SET default_transaction_isolation = '%s'`, cfg.Database, value)))
	}
	set("serializable")
	defer set("read committed")
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	const callers, rounds = 8, 20
	errs := make(chan error)
	for range callers {
		go func() {
			var failed error
			for range rounds {
				_, err := s.NextBoot(context.Background())
				failed = errors.Join(failed, err)
			}
			errs <- failed
		}()
	}
	for range callers {
		require.NoError(t, <-errs)
	}
	boot, err := s.NextBoot(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, callers*rounds+1, boot)
}

// TestReadOnly has the server take no writes any more, as one that became a
// replica of another.
func TestReadOnly(t *testing.T) {
	server := sharedServer(t)
	dsn := newDSN(t, server)
	cfg, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	s := open(t, dsn)
	defer func() { require.NoError(t, s.Close()) }()
	key := testKey(1)
	require.NoError(t, s.CreateKey(t.Context(), key))
	set := func(value string) {
		require.NoError(t, server.Exec(t.Context(), "postgres", `ALTER DATABASE `+cfg.Database+` SET default_transaction_read_only = `+value))
	}
	set("on")
	defer func() { set("off") }()
	// New connections refuse it, and those that are open are ended.
	require.NoError(t, server.Exec(t.Context(), "postgres",
		`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '`+cfg.Database+`'`))
	require.ErrorIs(t, s.UpdateKey(t.Context(), next(key)), store.ErrUnavailable)
	set("off")
	require.Eventually(t, func() bool { return s.UpdateKey(context.Background(), next(key)) == nil }, 10*time.Second, 10*time.Millisecond)
}
