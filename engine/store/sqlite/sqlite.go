// Package sqlite is the embedded store: one SQLite file, one process.
//
// Start with Open. The database is in WAL mode with synchronous=FULL: a write
// has reached the disk when its method returns nil. Writes that are waiting
// together share one transaction and so one fsync; see writer. Reads have
// connections of their own, wait for nobody, and see every write that has
// returned.
//
// The file belongs to one Store at a time, which a lock beside it enforces. It
// has mode 0600. Deleted content is overwritten with zeros (secure_delete), and
// deleted key material leaves the write-ahead log about a second later. What
// that cannot promise: copies that the file system or the disk keep of blocks
// they have replaced, and, once in tens of thousands of deletions, one that
// SQLite leaves in the unused part of a page that it split, until it uses the
// page again. What may be found that way is sealed all the same.
//
// The driver is modernc.org/sqlite, SQLite translated to Go, so that programs
// need no C compiler for it.
package sqlite

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	sqlitedriver "modernc.org/sqlite"

	"github.com/keyferry/keyferry/engine/store"
)

// Config says where the database is. Only Path is required.
type Config struct {
	// Path of the database file. It is made if it is missing; its directory
	// is not.
	Path string
	// BusyTimeout is how long to wait for another program that has locked the
	// file, a backup for instance, before ErrUnavailable. 0: five seconds.
	BusyTimeout time.Duration
	// Readers is how many reads run at a time. 0: twice the processors, and
	// at least four.
	Readers int
	// MaxSize bounds the file, in bytes; writes that need more fail with
	// ErrUnavailable. 0: the disk is the bound.
	MaxSize int64
	// Logger gets a line for each migration. Nil: none.
	Logger *slog.Logger
}

func (c Config) busyTimeout() time.Duration { return cmp.Or(c.BusyTimeout, 5*time.Second) }

// pageSize is SQLite's default.
const pageSize = 4096

// validate returns every problem at once.
func (c Config) validate() error {
	var errs []error
	if c.Path == "" {
		errs = append(errs, errors.New("sqlite: Config.Path is empty"))
	}
	if c.BusyTimeout < 0 {
		errs = append(errs, errors.New("sqlite: Config.BusyTimeout is negative"))
	}
	if c.Readers < 0 {
		errs = append(errs, errors.New("sqlite: Config.Readers is negative"))
	}
	if c.MaxSize < 0 {
		errs = append(errs, errors.New("sqlite: Config.MaxSize is negative"))
	}
	return errors.Join(errs...)
}

// Store is a store.Store in one SQLite file.
type Store struct {
	*writer
	*readers
	lock     *os.File
	instance string
	leases   leases

	closing sync.Once
	closed  error
}

var _ store.Store = (*Store)(nil)

// Open opens the database, makes it if it is missing, and brings its schema up
// to date. It fails if another Store has it open, in whatever process. The
// context bounds opening only.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	path, err := resolve(cfg.Path)
	if err != nil {
		return nil, err
	}
	lock, err := lockFile(path)
	if err != nil {
		return nil, err
	}
	s := &Store{lock: lock}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if err := makeFile(path); err != nil {
		return nil, err
	}

	// Not the connection for writing, which would change the mode of a database
	// that is not ours.
	plain, err := sqlitedriver.NewConnector(dsn(path, cfg.pragmas()))
	if err != nil {
		return nil, fmt.Errorf("sqlite: %w", err)
	}
	if err := claim(ctx, plain, path); err != nil {
		return nil, err
	}
	writing, err := sqlitedriver.NewConnector(dsn(path, cfg.writePragmas()))
	if err != nil {
		return nil, fmt.Errorf("sqlite: %w", err)
	}
	if err := migrate(ctx, writing, path, cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler))); err != nil {
		return nil, err
	}
	if err := s.connect(ctx, path, cfg); err != nil {
		return nil, fmt.Errorf("sqlite: cannot open database %s: %w", path, err)
	}
	return s, nil
}

// connect opens the connections for writing and for reading.
func (s *Store) connect(ctx context.Context, path string, cfg Config) error {
	c, err := connect(ctx, uri(path, "rw"), cfg.writePragmas())
	if err != nil {
		return err
	}
	if s.instance, err = writeAheadInstance(c); err != nil {
		return errors.Join(err, c.close())
	}
	remembered, err := loadNonces(c)
	if err != nil {
		return errors.Join(err, c.close())
	}
	s.writer = newWriter(c, remembered, cfg.busyTimeout())
	s.readers, err = openReaders(ctx, uri(path, "ro"), cmp.Or(cfg.Readers, max(4, 2*runtime.GOMAXPROCS(0))), cfg.pragmas("query_only(ON)"))
	return err
}

// pragmas are what every connection has in common, and more.
func (c Config) pragmas(more ...string) []string {
	return append([]string{"busy_timeout(" + milliseconds(c.busyTimeout()) + ")"}, more...)
}

// writePragmas are those of a connection for writing.
func (c Config) writePragmas() []string {
	return c.pragmas("journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(ON)", "secure_delete(ON)",
		"max_page_count("+strconv.FormatInt(maxPages(c.MaxSize), 10)+")")
}

// uri names the database at path to SQLite.
func uri(path, mode string) string {
	return (&url.URL{Scheme: "file", Path: path, RawQuery: url.Values{"mode": {mode}}.Encode(), OmitHost: true}).String()
}

// Close finishes the calls under way, folds the write-ahead log into the
// database file and gives the lock back. Later calls fail; Close itself
// returns the same again.
func (s *Store) Close() error {
	s.closing.Do(func() {
		var errs []error
		if s.readers != nil {
			errs = append(errs, s.readers.close())
		}
		if s.writer != nil { // last: closing the last connection empties the log
			errs = append(errs, s.writer.close())
		}
		s.closed = errors.Join(append(errs, s.lock.Close())...)
	})
	return s.closed
}

// dsn names the database at path to the driver, which sets the pragmas.
func dsn(path string, pragmas []string) string {
	return uri(path, "rw") + "&" + url.Values{"_error_rc": {"1"}, "_pragma": pragmas}.Encode()
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// maxPages is a size in bytes in pages, and what SQLite takes at most for 0.
func maxPages(size int64) int64 {
	if size == 0 {
		return 0xfffffffe // https://www.sqlite.org/limits.html, number 13
	}
	return max(1, size/pageSize)
}

// resolve returns the absolute path of the database without symbolic links,
// so that two names of one file have one lock.
func resolve(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("sqlite: %w", err)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err == nil {
		return resolved, nil
	}
	dir, base := filepath.Split(path)
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", fmt.Errorf("sqlite: cannot find the directory of database %s: %w", path, err)
	}
	return filepath.Join(dir, base), nil
}

// makeFile makes an empty file that nobody else can read, or takes the rights
// of others from one that is there. SQLite gives its other files the same mode.
// It must not run while SQLite has the file open: closing any descriptor of it
// drops the locks that POSIX gives to the process as a whole.
func makeFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("sqlite: cannot open the database for writing: %w", err)
	}
	err = f.Chmod(0o600)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("sqlite: cannot make database %s private: %w", path, err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("sqlite: %w", err)
	}
	if err := errors.Join(dir.Sync(), dir.Close()); err != nil {
		return fmt.Errorf("sqlite: cannot make database %s durable: %w", path, err)
	}
	return nil
}
