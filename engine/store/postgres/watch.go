package postgres

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
)

// channel is what Stores of one database tell each other on.
const channel = "keyferry"

// Times of a watcher.
const (
	// heartbeat is how often a watcher sends a notification to itself.
	heartbeat = 150 * time.Millisecond
	// trust is how long after one was sent that came back nothing is taken to
	// be missing.
	trust = 500 * time.Millisecond
	// firstPause and lastPause are between attempts to connect again.
	firstPause, lastPause = 50 * time.Millisecond, time.Second
)

// watcher listens on a connection of its own for what other Stores notify.
//
// PostgreSQL delivers notifications in the order in which their transactions
// committed, and all of them, for as long as the session lives. So a heartbeat
// that the watcher sent to itself and got back proves that everything that was
// committed before it was reported; also that the session is still the one
// that listens, whatever stands between. Whoever trusts the watcher for a while
// after each heartbeat misses nothing for longer than that.
type watcher struct {
	config *pgx.ConnConfig
	log    *slog.Logger
	name   string // of this Store, in what it sends

	// The greatest number of a session that listened, and until when it is
	// trusted, as time since start. Readers take until first.
	until   atomic.Int64
	session atomic.Uint64
	start   time.Time

	mu    sync.Mutex
	stale func(keyID, versionID string)

	stop  context.CancelFunc
	ended sync.WaitGroup

	// Of the goroutine of run.
	sent, received uint64
	sentAt         time.Time
}

func newWatcher(config *pgx.ConnConfig, log *slog.Logger) *watcher {
	config = config.Copy()
	// The context of a wait ends again and again, and must not cost the
	// connection.
	config.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.DeadlineContextWatcherHandler{Conn: conn.Conn()}
	}
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{config: config, log: log, name: rand.Text()[:12], start: time.Now(), stop: stop}
	config.OnNotification = w.receive
	w.ended.Go(func() { w.run(ctx) })
	return w
}

func (w *watcher) close() {
	w.stop()
	w.ended.Wait()
}

// epoch is what Store.Epoch returns.
func (w *watcher) epoch() uint64 {
	until := w.until.Load()
	session := w.session.Load()
	if time.Since(w.start) >= time.Duration(until) {
		return 0
	}
	return session
}

// run keeps a session listening until ctx ends.
func (w *watcher) run(ctx context.Context) {
	pause := firstPause
	for ctx.Err() == nil {
		listened, err := w.listen(ctx)
		w.until.Store(0)
		if ctx.Err() != nil {
			return
		}
		if listened {
			pause = firstPause
		}
		w.log.LogAttrs(ctx, slog.LevelWarn, "changes by other nodes are not reported at the moment; every use of a key asks the database instead",
			slog.Any("error", err))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		pause = min(2*pause, lastPause)
	}
}

// listen opens a session and listens until it fails.
func (w *watcher) listen(ctx context.Context) (listened bool, err error) {
	dialing, cancel := context.WithTimeout(ctx, w.config.ConnectTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(dialing, w.config)
	if err != nil {
		return false, err
	}
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpDelay)
		defer cancel()
		_ = conn.Close(ending)
	}()
	if _, err := conn.Exec(dialing, `LISTEN `+channel); err != nil {
		return false, err
	}
	// What was read before this session listened belongs to another epoch.
	w.session.Add(1)
	w.received = w.sent
	for {
		if err := w.beat(ctx, conn); err != nil {
			return true, err
		}
		if err := w.await(ctx, conn, time.Now().Add(heartbeat)); err != nil {
			return true, err
		}
	}
}

// beat sends a heartbeat, once the one before has come back.
func (w *watcher) beat(ctx context.Context, conn *pgx.Conn) error {
	if w.received < w.sent {
		if time.Since(w.sentAt) > 10*trust {
			return fmt.Errorf("notifications do not come back: is there a pooler that gives each transaction another session?")
		}
		return nil
	}
	w.sent++
	w.sentAt = time.Now()
	ctx, cancel := context.WithTimeout(ctx, 10*trust)
	defer cancel()
	_, err := conn.Exec(ctx, `SELECT pg_notify($1, $2)`, channel, fmt.Sprintf("%s beat %d", w.name, w.sent))
	return err
}

// await hands on what is notified until a moment.
func (w *watcher) await(ctx context.Context, conn *pgx.Conn, until time.Time) error {
	waiting, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	for waiting.Err() == nil {
		if err := conn.PgConn().WaitForNotification(waiting); err != nil && (!pgconn.Timeout(err) || conn.IsClosed()) {
			return err
		}
	}
	return ctx.Err()
}

// receive is called in the goroutine of run.
func (w *watcher) receive(_ *pgconn.PgConn, n *pgconn.Notification) {
	words := strings.Split(n.Payload, " ")
	if n.Channel != channel || len(words) != 3 {
		return
	}
	switch {
	case words[0] != w.name:
		w.mu.Lock()
		stale := w.stale
		w.mu.Unlock()
		if stale != nil && words[1] != "beat" {
			stale(words[1], words[2])
		}
	case words[1] == "beat" && words[2] == fmt.Sprint(w.sent):
		w.received = w.sent
		w.until.Store(int64(w.sentAt.Add(trust).Sub(w.start)))
	}
}

// Shared implements store.Store.
func (s *Store) Shared() bool { return true }

// Watch implements store.Store.
func (s *Store) Watch(stale func(keyID, versionID string)) {
	if s.watcher == nil {
		return
	}
	s.watcher.mu.Lock()
	defer s.watcher.mu.Unlock()
	s.watcher.stale = stale
}

// Epoch implements store.Store.
func (s *Store) Epoch() uint64 {
	if s.watcher == nil {
		return 0
	}
	return s.watcher.epoch()
}
