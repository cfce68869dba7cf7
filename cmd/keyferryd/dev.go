package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/softhsm"
)

func devCommand() *cobra.Command {
	var data, listen, module string
	cmd := &cobra.Command{
		Use:   "dev --data DIR",
		Short: "Serve on a SoftHSM2 token of its own, with nothing set up",
		Long: `Serves from a directory: at the first start a SoftHSM2 token, random PINs, a
database and one access key are made in it, and from then on it comes back with
everything. It must be a directory that no other user can write to.
DIR/credentials.json tells clients how to get in and DIR/token.json
where the token is; both are there before the port answers. DIR/keyferryd.yaml
is for the --config of doctor and receipt-key.

This is for development. Whoever can read DIR has every key in it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := newLogger(logConfig{}, cmd.ErrOrStderr())
			return serveDev(cmd.Context(), data, listen, module, cmd.OutOrStdout(), log)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "the directory of everything")
	cmd.Flags().StringVar(&listen, "listen", "127.0.0.1:0", "host:port; port 0 picks a free one")
	cmd.Flags().StringVar(&module, "module", "", "SoftHSM2's PKCS#11 library (default: where it is usually installed)")
	requireFlag(cmd, "data")
	return cmd
}

func serveDev(ctx context.Context, data, listen, module string, out io.Writer, log *slog.Logger) error {
	dir, err := openDevDir(data)
	if err != nil {
		return err
	}
	defer dir.close()
	cfg, err := dir.setUp(ctx, module)
	if err != nil {
		return err
	}
	// Whoever says --listen with another address than loopback has said so.
	cfg.Listen, cfg.AllowPlainHTTP = listen, true
	if err := cfg.validate(); err != nil {
		return fmt.Errorf("%s: %w", dir.file(devConfigFile), err)
	}
	return serve(ctx, &cfg, out, log, func(endpoint string) error {
		return errors.Join(dir.finished(), dir.announce(&cfg, endpoint, log))
	})
}

// credentials is DIR/credentials.json.
type credentials struct {
	Endpoint        string `json:"endpoint"` // host:port
	Region          string `json:"region"`
	AccessKeyID     string `json:"access_key_id"`
	AccessKeySecret string `json:"access_key_secret"`
}

// tokenFile is DIR/token.json, for other programs that use the token.
type tokenFile struct {
	Module       string `json:"module"`
	SoftHSM2Conf string `json:"softhsm2_conf"`
	TokenLabel   string `json:"token_label"`
	UserPINFile  string `json:"user_pin_file"`
}

// announce writes the files that users' scripts rely on.
func (d *devDir) announce(cfg *config, endpoint string, log *slog.Logger) error {
	key := cfg.AccessKeys[0]
	secret, err := readSecret(key.SecretFile, log)
	if err != nil {
		return err
	}
	for name, content := range map[string]any{
		devCredentials: credentials{Endpoint: endpoint, Region: cfg.regionOf(), AccessKeyID: key.ID, AccessKeySecret: string(secret)},
		devTokenFile: tokenFile{
			Module: cfg.Token.Module, SoftHSM2Conf: cfg.Token.Environment[softhsm.ConfEnv],
			TokenLabel: cfg.Token.Label, UserPINFile: cfg.Token.UserPINFile,
		},
	} {
		text, err := json.MarshalIndent(content, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(d.path, name), append(text, '\n'), 0o600); err != nil {
			return err
		}
	}
	return nil
}
