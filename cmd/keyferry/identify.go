package main

import (
	"context"
	"encoding/hex"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

func newKCV(std *streams) *cobra.Command {
	var source materialSource
	var keySpec string
	cmd := &cobra.Command{
		Use:   "kcv [--in FILE]",
		Short: "Compute the key check value of key material",
		Long: `Compute the key check value: the first three bytes, in hexadecimal digits, of a
zero block encrypted under the material by the cipher of its key spec. It is for
people to compare. It is no proof: the material id is.`,
		Example: "  keyferry kcv --in key.bin",
		Args:    noArguments,
		RunE: failing(func(context.Context) error {
			material, err := source.readChecked(std, keySpec)
			if err != nil {
				return err
			}
			defer wipe(material)
			kcv, err := byok.KCV(keySpec, material)
			if err != nil {
				return err
			}
			text := hex.EncodeToString(kcv[:])
			return std.report(struct {
				KeySpec string `json:"key_spec"`
				KCV     string `json:"kcv"`
			}{keySpec, text}, row{"", text})
		}),
	}
	source.register(cmd)
	registerKeySpec(cmd, &keySpec)
	return cmd
}

func newMaterialID(std *streams) *cobra.Command {
	var source materialSource
	var keySpec, keyID string
	cmd := &cobra.Command{
		Use:   "material-id --key-id ID [--in FILE]",
		Short: "Compute the material id of key material within a key",
		Long: `Compute the 32 bytes, in hexadecimal digits, that identify the material within
one key of the KMS. keyferryd measures them inside its token: the same value
there proves that it holds this material.`,
		Example: "  keyferry material-id --key-id 2f9c8b1e-6d0a-4c55-9a43-1b7e5d3c0f21 --in key.bin",
		Args:    noArguments,
		RunE: failing(func(context.Context) error {
			material, err := source.readChecked(std, keySpec)
			if err != nil {
				return err
			}
			defer wipe(material)
			id, err := byok.MaterialID(keyID, material)
			if err != nil {
				return err
			}
			text := hex.EncodeToString(id[:])
			return std.report(struct {
				KeyID      string `json:"key_id"`
				MaterialID string `json:"material_id"`
			}{keyID, text}, row{"", text})
		}),
	}
	source.register(cmd)
	registerKeySpec(cmd, &keySpec)
	cmd.Flags().StringVar(&keyID, "key-id", "", "`KeyId` that the KMS gave the key")
	markRequired(cmd, "key-id")
	return cmd
}
