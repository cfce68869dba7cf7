package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/receipt"
)

func receiptKeyCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "receipt-key --config FILE",
		Short: "Print the public key that customers verify receipts with",
		Long: `Prints the public half of the key of the token that signs receipts, in PEM, and
its fingerprint. Publish it where customers trust it more than this server: with
it, "keyferry receipt verify" needs no word of the server. The fingerprint is
receipt_key of token.pins. The server may be running meanwhile.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if err := cfg.validateToken(); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return printReceiptKey(cmd.Context(), &cfg, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the configuration file")
	requireFlag(cmd, "config")
	return cmd
}

func printReceiptKey(ctx context.Context, cfg *config, out, log io.Writer) (err error) {
	token, err := openToken(ctx, cfg, newLogger(cfg.Log, log))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, token.Close()) }()
	spki, err := token.ReceiptKey(ctx)
	if err != nil {
		return err
	}
	key, err := receipt.ParsePublicKey(spki)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "Fingerprint (SHA-256): %s\n\n%s", key.Fingerprint(), key.PEM())
	return err
}
