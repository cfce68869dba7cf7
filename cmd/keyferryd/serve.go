package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func serveCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Serve the API as the configuration says",
		Long: `Serves the API from what "keyferryd init" made: the keys of the token and the
database. It makes neither itself: a database that is missing was lost or is
elsewhere, and an empty one in its place would hide that.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if err := cfg.validate(); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			if !cfg.hasDatabase() {
				return cfg.noDatabase()
			}
			log := newLogger(cfg.Log, cmd.ErrOrStderr())
			return serve(cmd.Context(), &cfg, cmd.OutOrStdout(), log, nil)
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the configuration file")
	requireFlag(cmd, "config")
	return cmd
}

func requireFlag(cmd *cobra.Command, name string) {
	if err := cmd.MarkFlagRequired(name); err != nil {
		panic(err) // there is no such flag
	}
}
