// Package postgres is the store for several nodes: a PostgreSQL database of
// version 13 or later, or a cluster that speaks its protocol and takes its SQL.
//
// Start with Migrate, which makes the tables, and Open, which checks that they
// are there. Any number of Stores, in any number of processes, work on one
// database at a time; what keeps them apart is in the statements themselves,
// and no lock is held for longer than a transaction.
//
// A write is durable when its method returns nil, as far as the server's
// settings go: Open turns synchronous_commit on where it is off, and warns of
// fsync=off. A write whose connection was lost between its being sent and its
// being answered ends in store.ErrUnavailable and may have taken effect. It is
// never repeated. What the server itself has rolled back, because transactions
// met, is repeated until the time is up; so are reads that lost their
// connection.
//
// A call whose context has ended waits a moment longer for the server to
// finish the statement that is under way, so that it is settled when the call
// returns; a server that does not answer is given up soon after.
//
// There must be one database. Open takes the host of the DSN that takes writes;
// if there are two, because a failover has left the old primary running with
// nodes that still reach it, they are two databases. Each keeps every promise to
// those who use it, but what is deleted in one is used in the other, for as long
// as it lasts and not for one second, and of two imports one is lost when one of
// the two is thrown away. Nothing here can notice. Who replicates must fence:
// the old primary must be known to take no writes before the new one takes any,
// and a failover must lose nothing that was acknowledged (synchronous_commit=on
// with synchronous_standby_names).
//
// # CockroachDB
//
// The statements keep to what CockroachDB's documentation says that it takes,
// from version 22.2 on (SKIP LOCKED) and best from 24.1 on (READ COMMITTED). No
// binary of it was at hand: nothing here was ever run on it. What is known to
// differ is provided for: it has no notifications, so that every use of a key
// reads its row first once the last look is 400 ms old; columns have no
// collation there; transactions may be SERIALIZABLE and are then made again
// when they meet. Not proven, as the documentation does not settle it:
//
//   - FOR KEY SHARE in the SELECT of an INSERT with ON CONFLICT (PutUsages), and
//     FOR UPDATE SKIP LOCKED in ARRAY(SELECT …) (DeleteNonces);
//   - a row changed, and another table's row added, by the common table
//     expressions of one statement (UpdateKey with a receipt);
//   - that numbers of GENERATED … AS IDENTITY rise in the order in which they are
//     given, on all of its nodes, on which the order of a key's receipts depends;
//   - set_config of statement_timeout, idle_in_transaction_session_timeout and
//     synchronous_commit, the latter being without meaning there;
//   - the statements of goose (github.com/pressly/goose), with its table of
//     locks, and several changes of the schema in one transaction.
//
// PostgreSQL keeps old versions of rows until it vacuums them, and in its
// write-ahead log, replicas and backups for longer. Deleted key material is in
// there, sealed, and opens only in the token.
package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/keyferry/keyferry/engine/store"
)

// Config says where the database is. Only DSN is required.
type Config struct {
	// DSN is a connection string of libpq, as a URL or as a list of keywords
	// and values. It may hold the password, or name a passfile. Of several
	// hosts the one that takes writes is used.
	DSN string
	// Password is used where it is not empty, instead of one in DSN.
	Password string
	// AllowInsecure permits a connection over a network on which the server
	// does not prove who it is, by TLS with sslmode=verify-full or verify-ca.
	// Whoever is on that network can then answer for the database.
	AllowInsecure bool
	// Connections is how many there are at most. 0: 16.
	Connections int
	// Timeout bounds every call, beyond its context, after which it fails with
	// store.ErrUnavailable. 0: ten seconds.
	Timeout time.Duration
	// Logger gets a line for each migration and warnings. Nil: none.
	Logger *slog.Logger
}

func (c *Config) timeout() time.Duration { return cmp.Or(c.Timeout, 10*time.Second) }

func (c *Config) logger() *slog.Logger {
	return cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
}

// How long a call goes on after its context has ended: so long it waits for
// the statement under way, then it asks the server to cancel that, and then it
// gives the connection up.
const (
	cancelDelay = 200 * time.Millisecond
	giveUpDelay = time.Second
)

// connConfig reads the DSN, or returns everything that is wrong with the
// configuration. No error shows the password.
func (c *Config) connConfig() (*pgxpool.Config, error) {
	var errs []error
	if c.DSN == "" {
		errs = append(errs, errors.New("postgres: Config.DSN is empty"))
	}
	if c.Connections < 0 {
		errs = append(errs, errors.New("postgres: Config.Connections is negative"))
	}
	if c.Timeout < 0 {
		errs = append(errs, errors.New("postgres: Config.Timeout is negative"))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	cfg, err := pgxpool.ParseConfig(c.DSN)
	if err != nil {
		// The error quotes the DSN, and not every spelling of a password in it
		// is recognised.
		return nil, errors.New("postgres: the DSN is not a connection string of PostgreSQL, or names a certificate, passfile or service that cannot be read")
	}
	if c.Password != "" {
		cfg.ConnConfig.Password = c.Password
	}
	if !c.AllowInsecure {
		if err := requireVerified(cfg.ConnConfig); err != nil {
			return nil, err
		}
	}
	cfg.MaxConns = int32(cmp.Or(c.Connections, 16))
	cfg.PingTimeout = time.Second
	cfg.ConnConfig.ConnectTimeout = cmp.Or(cfg.ConnConfig.ConnectTimeout, c.timeout()/2)
	if cfg.ConnConfig.RuntimeParams["application_name"] == "" {
		cfg.ConnConfig.RuntimeParams["application_name"] = "keyferry"
	}
	if cfg.ConnConfig.ValidateConnect == nil {
		cfg.ConnConfig.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	cfg.ConnConfig.BuildContextWatcherHandler = func(conn *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: conn, CancelRequestDelay: cancelDelay, DeadlineDelay: giveUpDelay}
	}
	cfg.AfterConnect = c.prepareSession
	return cfg, nil
}

// prepareSession sets what a session must have, whatever the server, the
// database or the role say. The server ends by itself what its client has
// abandoned, so that a node that was cut off holds no lock for long.
func (c *Config) prepareSession(ctx context.Context, conn *pgx.Conn) error {
	limit := fmt.Sprintf("%dms", (c.timeout() + giveUpDelay).Milliseconds())
	_, err := conn.Exec(ctx, `SELECT set_config('statement_timeout', $1, false),
		set_config('idle_in_transaction_session_timeout', $1, false),
		set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
			ELSE current_setting('synchronous_commit') END, false)`, limit)
	return err
}

// requireVerified refuses a connection over a network whose other end may be
// anybody. A socket file and the loopback interface are no network.
func requireVerified(cfg *pgx.ConnConfig) error {
	ends := []*pgconn.FallbackConfig{{Host: cfg.Host, TLSConfig: cfg.TLSConfig}}
	for _, end := range append(ends, cfg.Fallbacks...) {
		ip := net.ParseIP(end.Host)
		if strings.HasPrefix(end.Host, "/") || end.Host == "localhost" || ip != nil && ip.IsLoopback() {
			continue
		}
		verified := end.TLSConfig != nil &&
			(!end.TLSConfig.InsecureSkipVerify || end.TLSConfig.VerifyPeerCertificate != nil || end.TLSConfig.VerifyConnection != nil)
		if !verified {
			return fmt.Errorf("postgres: the connection to %s would not prove that it is the database: "+
				"set sslmode=verify-full, and sslrootcert, in the DSN", end.Host)
		}
	}
	return nil
}

// Store is a store.Store in a PostgreSQL database.
type Store struct {
	pool     *pgxpool.Pool
	timeout  time.Duration
	log      *slog.Logger
	instance string
	notifies bool // the server has pg_notify; CockroachDB has not
	nonces   *nonceWriter
	watcher  *watcher // nil: the server has no notifications
	closed   atomic.Bool
}

var _ store.Store = (*Store)(nil)

// Open connects to a database that Migrate has made. It fails if the schema is
// not that of this program. The context bounds opening only.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	poolConfig, err := cfg.connConfig()
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	pool, err := pgxpool.NewWithConfig(ctx, poolConfig)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	s := &Store{pool: pool, timeout: cfg.timeout(), log: cfg.logger()}
	s.nonces = newNonceWriter(s)
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := s.checkSchema(ctx); err != nil {
		return nil, err
	}
	if err := s.checkServer(ctx); err != nil {
		return nil, err
	}
	if s.instance, err = s.readInstance(ctx); err != nil {
		return nil, err
	}
	if s.notifies {
		s.watcher = newWatcher(poolConfig.ConnConfig, s.log)
	}
	return s, nil
}

// checkServer looks for settings under which nothing here can keep its word.
func (s *Store) checkServer(ctx context.Context) error {
	var encoding, fsync string
	var notifies bool
	err := s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		return c.QueryRow(ctx, `SELECT current_setting('server_encoding'), COALESCE(current_setting('fsync', true), 'on'),
			EXISTS (SELECT 1 FROM pg_proc WHERE proname = 'pg_notify')`).Scan(&encoding, &fsync, &notifies)
	})
	if err != nil {
		return err
	}
	s.notifies = notifies
	if encoding != "UTF8" {
		return fmt.Errorf("postgres: the database has the encoding %s: make one with UTF8", encoding)
	}
	if fsync == "off" {
		s.log.LogAttrs(ctx, slog.LevelWarn, "the database server runs with fsync=off: what it acknowledges does not survive a crash")
	}
	return nil
}

// Close ends the calls under way and closes the connections. Later calls fail;
// Close itself does nothing the second time.
func (s *Store) Close() error {
	s.nonces.close()
	if s.watcher != nil {
		s.watcher.close()
	}
	s.closed.Store(true)
	s.pool.Close()
	return nil
}
