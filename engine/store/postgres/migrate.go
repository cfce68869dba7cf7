package postgres

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

//go:embed migrations/*.sql
var migrations embed.FS

// The tables of goose, named so that those of another program that uses it are
// not taken for ours.
const (
	versionTable = "keyferry_schema"
	lockTable    = "keyferry_schema_lock"
)

// SchemaError is the answer of a database that is not of the schema of this
// program.
type SchemaError struct {
	Have, Want int64 // versions; Have is 0 where there is no schema at all
}

// Error says what is to be done.
func (e *SchemaError) Error() string {
	switch {
	case e.Have == 0:
		return "postgres: the database is empty: make its tables with Migrate"
	case e.Have < e.Want:
		return fmt.Sprintf("postgres: the database has schema version %d and this program needs version %d: bring it there with Migrate", e.Have, e.Want)
	}
	return fmt.Sprintf("postgres: the database has schema version %d and this program knows versions up to %d: "+
		"a newer Keyferry has migrated it, run that one or restore the backup made before", e.Have, e.Want)
}

// wanted is the schema version of this program: the number of its last
// migration.
func wanted() int64 {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil || len(names) == 0 {
		panic("no migrations are built in")
	}
	number, _, _ := strings.Cut(path.Base(names[len(names)-1]), "_") // in order of their names
	version, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		panic(err)
	}
	return version
}

// checkSchema returns a *SchemaError if the database is not as this program
// needs it. It changes nothing.
func (s *Store) checkSchema(ctx context.Context) error {
	have := int64(0)
	err := s.read(ctx, func(ctx context.Context, c *pgxpool.Conn) error {
		err := c.QueryRow(ctx, `SELECT COALESCE(max(version_id), 0) FROM `+versionTable+` WHERE is_applied`).Scan(&have)
		if sqlState(err) == undefinedTable {
			return nil
		}
		return err
	})
	if err != nil {
		return err
	}
	if want := wanted(); have != want {
		return &SchemaError{Have: have, Want: want}
	}
	return nil
}

// Migrate brings the database to the schema of this program and returns the
// versions that it had and has. Schemas move forwards only, each migration in a
// transaction of its own. Of several that are called at once, one does it and
// the others wait. It refuses, with a *SchemaError, a database that a newer
// Keyferry has migrated.
func Migrate(ctx context.Context, cfg Config) (from, to int64, err error) {
	poolConfig, err := cfg.connConfig()
	if err != nil {
		return 0, 0, err
	}
	// Without prepareSession: a migration of a large table takes its time, and
	// only ctx bounds it.
	db := stdlib.OpenDB(*poolConfig.ConnConfig)
	defer func() { err = errors.Join(err, db.Close()) }()
	var version string
	if err := db.QueryRowContext(ctx, `SELECT version()`).Scan(&version); err != nil {
		return 0, 0, outcome(ctx, err)
	}
	p, err := newProvider(db, &cfg, strings.HasPrefix(version, "CockroachDB"))
	if err != nil {
		return 0, 0, err
	}
	from, want, err := p.GetVersions(ctx)
	if err != nil {
		return 0, 0, fmt.Errorf("postgres: cannot read the schema version of the database: %w", outcome(ctx, err))
	}
	if from > want {
		return from, from, &SchemaError{Have: from, Want: want}
	}
	if _, err := p.Up(ctx); err != nil {
		return from, from, fmt.Errorf("postgres: cannot migrate the database from schema version %d to %d: %w", from, want, outcome(ctx, err))
	}
	return from, want, nil
}

// newProvider prepares the migrations, for a server with columns of the
// collation "C" or without.
func newProvider(db *sql.DB, cfg *Config, uncollated bool) (*goose.Provider, error) {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	if uncollated {
		dir = bytewise{dir}
	}
	// A row of a table, and no advisory lock: not every cluster has those.
	locker, err := lock.NewPostgresTableLocker(lock.WithTableName(lockTable),
		lock.WithTableLockTimeout(200*time.Millisecond, 1500), lock.WithTableLogger(cfg.logger()))
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectPostgres, db, dir, goose.WithDisableGlobalRegistry(true),
		goose.WithTableName(versionTable), goose.WithLocker(locker), goose.WithSlog(cfg.logger()))
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	return p, nil
}

// bytewise is migrations for a server that compares text by its bytes anyway,
// and has no columns of the collation "C": CockroachDB.
type bytewise struct{ fs.FS }

// Open implements fs.FS.
func (b bytewise) Open(name string) (fs.File, error) {
	f, err := b.FS.Open(name)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || info.IsDir() {
		return f, err
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &bytewiseFile{f, strings.NewReader(strings.ReplaceAll(string(text), ` COLLATE "C"`, ""))}, nil
}

type bytewiseFile struct {
	fs.File
	text *strings.Reader
}

// Read implements fs.File.
func (f *bytewiseFile) Read(p []byte) (int, error) { return f.text.Read(p) }
