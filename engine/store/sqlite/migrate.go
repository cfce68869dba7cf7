package sqlite

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"github.com/pressly/goose/v3"
	result "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var migrations embed.FS

// applicationID marks a file as Keyferry's ("KFRY"), so that no other
// program's database is taken for one.
const applicationID = 0x4b465259

// migrate brings the database to the schema of this program. Schemas move
// forwards only, each migration in a transaction of its own. It refuses a
// database that a newer Keyferry has migrated.
func migrate(ctx context.Context, connector driver.Connector, path string, log *slog.Logger) (err error) {
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(1)
	defer func() { err = errors.Join(err, db.Close()) }()

	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("sqlite: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir, goose.WithDisableGlobalRegistry(true), goose.WithSlog(log))
	if err != nil {
		return fmt.Errorf("sqlite: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("sqlite: cannot read the schema version of %s: %w", path, classify(err))
	}
	if have > want {
		return fmt.Errorf("sqlite: database %s has schema version %d and this program knows versions up to %d: "+
			"a newer Keyferry has used it, run that one or restore the backup made before", path, have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("sqlite: cannot migrate database %s from schema version %d to %d: %w", path, have, want, classify(err))
	}
	return nil
}

// claim refuses a file that is no database, or another program's, and leaves
// it as it is. It marks one that is empty, before there is any table: so a file
// is known even if its first migration was cut short.
func claim(ctx context.Context, connector driver.Connector, path string) (err error) {
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(1)
	defer func() { err = errors.Join(err, db.Close()) }()

	var id, tables int
	err = db.QueryRowContext(ctx, `PRAGMA application_id`).Scan(&id)
	if err == nil {
		err = db.QueryRowContext(ctx, `SELECT count(*) FROM sqlite_schema`).Scan(&tables)
	}
	switch {
	case resultCode(err)&0xff == result.SQLITE_NOTADB:
		return fmt.Errorf("sqlite: %s is not a database: %w", path, err)
	case err != nil:
		return fmt.Errorf("sqlite: cannot open database %s: %w", path, classify(err))
	case tables > 0 && id != applicationID:
		return fmt.Errorf("sqlite: database %s belongs to another program (application id %#x): choose another path", path, id)
	case id == applicationID:
		return nil
	}
	if _, err := db.ExecContext(ctx, fmt.Sprintf(`PRAGMA application_id = %d`, applicationID)); err != nil {
		return fmt.Errorf("sqlite: cannot write to database %s: %w", path, classify(err))
	}
	return nil
}
