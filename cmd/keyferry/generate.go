package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

func newGenerate(std *streams) *cobra.Command {
	var out, keySpec string
	cmd := &cobra.Command{
		Use:   "generate --out FILE",
		Short: "Make new key material in a file",
		Long: `Write random key material, 32 bytes or 16 for SM4, to a new file that only you
can read. Keep a copy in a safe place: a KMS never gives material back, and only
the same material can be imported into a key again.`,
		Example: "  keyferry generate --out key.bin",
		Args:    noArguments,
		RunE:    failing(func(context.Context) error { return generate(std, out, keySpec) }),
	}
	cmd.Flags().StringVar(&out, "out", "", "new `FILE` for the key material, - for standard output, which is no terminal")
	registerKeySpec(cmd, &keySpec)
	markRequired(cmd, "out")
	return cmd
}

func generate(std *streams, out, keySpec string) error {
	switch {
	case byok.MaterialLen(keySpec) == 0:
		return unknownKeySpec(keySpec)
	case out == stdio && isatty.IsTerminal(std.out.Fd()):
		return withHint(usage("key material is not written to a terminal"), "give --out FILE, or a pipe")
	}
	material := make([]byte, byok.MaterialLen(keySpec))
	defer wipe(material)
	if _, err := rand.Read(material); err != nil {
		return fmt.Errorf("drawing random bytes: %w", err)
	}
	kcv, err := byok.KCV(keySpec, material)
	if err != nil {
		return err
	}
	if err := std.writeOut(out, material); err != nil {
		return err
	}
	return std.reportBeside(
		out,
		struct {
			File    string `json:"file"`
			KeySpec string `json:"key_spec"`
			Bytes   int    `json:"bytes"`
			KCV     string `json:"kcv"`
		}{out, keySpec, len(material), hex.EncodeToString(kcv[:])},
		row{"File", out}, row{"Key spec", keySpec}, row{"Bytes", fmt.Sprint(len(material))},
		row{"Key check value", hex.EncodeToString(kcv[:])},
	)
}

// markRequired makes flags required. Naming one that does not exist is a mistake
// of the program.
func markRequired(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err)
		}
	}
}
