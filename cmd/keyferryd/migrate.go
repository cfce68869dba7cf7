package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/store/postgres"
)

func migrateCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "migrate --config FILE",
		Short: "Bring the database to the schema of this program",
		Long: `Makes the tables of a new PostgreSQL database, or changes those that an older
Keyferry has made. Schemas move forwards only: back the database up before.
Servers of the older version that still run may fail from then on; stop them
first. It can be run again at any time, and by several nodes at once.

A SQLite database needs none of it: it is brought up to date when it is opened.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if err := cfg.Store.validate(); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return migrate(cmd.Context(), &cfg, cmd.OutOrStdout(), newLogger(cfg.Log, cmd.ErrOrStderr()))
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the configuration file")
	requireFlag(cmd, "config")
	return cmd
}

func migrate(ctx context.Context, cfg *config, out io.Writer, log *slog.Logger) error {
	if cfg.Store.Postgres == nil {
		if !cfg.hasDatabase() {
			return cfg.noDatabase()
		}
		s, err := openStore(ctx, &cfg.Store, log)
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintln(out, "The database is up to date.")
		return s.Close()
	}
	pg, err := cfg.Store.Postgres.config(log)
	if err != nil {
		return err
	}
	from, to, err := postgres.Migrate(ctx, pg)
	switch {
	case err != nil:
		return storeAdvice(err)
	case from == to:
		_, _ = fmt.Fprintf(out, "The database has schema version %d already. Nothing was changed.\n", to)
	case from == 0:
		_, _ = fmt.Fprintf(out, "Made the tables, schema version %d. The database is empty: if there was one before, put that in its place.\n", to)
	default:
		_, _ = fmt.Fprintf(out, "The database had schema version %d and has version %d now.\n", from, to)
	}
	return nil
}
