package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

type wrapOptions struct {
	source    materialSource
	publicKey string
	algorithm string
	keySpec   string
	out       string
	raw       bool
}

func newWrap(std *streams) *cobra.Command {
	var o wrapOptions
	cmd := &cobra.Command{
		Use:   "wrap --public-key FILE [--in FILE] [--out FILE]",
		Short: "Encrypt key material under a public key of the KMS",
		Long: `Encrypt key material under the public key that GetParametersForImport answers,
and write what ImportKeyMaterial takes as EncryptedKeyMaterial. The algorithm must
be the one that the public key was asked for.`,
		Example: "  keyferry wrap --public-key public-key.txt --in key.bin --out wrapped.txt",
		Args:    noArguments,
		RunE:    failing(func(context.Context) error { return o.wrap(std) }),
	}
	o.source.register(cmd)
	registerKeySpec(cmd, &o.keySpec)
	registerAlgorithm(cmd, &o.algorithm)
	cmd.Flags().StringVar(&o.publicKey, "public-key", "", "`FILE` with the public key: Base64 as answered, DER or PEM")
	cmd.Flags().StringVar(&o.out, "out", stdio, "new `FILE` for the wrapped material, - for standard output")
	cmd.Flags().BoolVar(&o.raw, "raw", false, "write bytes instead of Base64")
	markRequired(cmd, "public-key")
	return cmd
}

// algorithms that can be asked for; the first is the default.
var algorithms = []string{byok.OAEPSHA256, byok.OAEPSHA1, byok.PKCS1v15, byok.SM2PKE}

func registerAlgorithm(cmd *cobra.Command, algorithm *string) {
	cmd.Flags().StringVar(algorithm, "algorithm", algorithms[0], "wrapping `NAME`: "+strings.Join(algorithms, ", "))
}

func (o *wrapOptions) wrap(std *streams) error {
	if o.raw && std.json {
		return usage("--raw and --json exclude each other")
	}
	if o.raw && o.out == stdio && isatty.IsTerminal(std.out.Fd()) {
		return withHint(usage("raw bytes are not written to a terminal"), "give --out FILE, or leave --raw out")
	}
	spki, err := readPublicKey(o.publicKey)
	if err != nil {
		return err
	}
	material, err := o.source.readChecked(std, o.keySpec)
	if err != nil {
		return err
	}
	defer wipe(material)
	wrapped, err := byok.Wrap(o.algorithm, spki, material)
	if err != nil {
		return explainWrap(err)
	}
	text := base64.StdEncoding.EncodeToString(wrapped)
	if o.out != stdio {
		data := wrapped
		if !o.raw {
			data = []byte(text + "\n")
		}
		if err := createFile(o.out, data); err != nil {
			return err
		}
	}
	switch {
	case std.json:
		return std.report(struct {
			Algorithm string `json:"algorithm"`
			Wrapped   string `json:"encrypted_key_material"`
		}{o.algorithm, text})
	case o.out != stdio:
		return nil
	case o.raw:
		_, err = std.out.Write(wrapped)
		return err
	default:
		return std.report(nil, row{"", text})
	}
}

// explainWrap says what to do about an error of byok.Wrap.
func explainWrap(err error) error {
	switch {
	case errors.Is(err, byok.ErrAlgorithm):
		return withHint(&usageError{err}, "give --algorithm as one of %s", strings.Join(algorithms, ", "))
	case errors.Is(err, byok.ErrPublicKey):
		return withHint(err, "take PublicKey from GetParametersForImport for the same algorithm; SM2PKE needs an SM2 key, all others an RSA key")
	}
	return err
}

// readPublicKey reads a SubjectPublicKeyInfo as DER, whatever it is spelt as.
func readPublicKey(name string) ([]byte, error) {
	data, err := readSmall(name)
	if err != nil {
		return nil, fmt.Errorf("reading the public key: %w", err)
	}
	text := bytes.TrimSpace(data)
	switch {
	case bytes.HasPrefix(text, []byte("-----BEGIN")):
		return fromPEM(name, text)
	case bytes.HasPrefix(data, []byte{0x30}): // a SEQUENCE; Base64 of one begins with M
		return data, nil
	default:
		return fromBase64(name, text)
	}
}

func fromPEM(name string, text []byte) ([]byte, error) {
	block, rest := pem.Decode(text)
	switch {
	case block == nil || len(bytes.TrimSpace(rest)) > 0:
		return nil, withHint(fmt.Errorf("%s is not one block of PEM", name), "is it complete?")
	case strings.Contains(block.Type, "PRIVATE"):
		clear(block.Bytes)
		return nil, withHint(fmt.Errorf("%s holds a private key", name), "give the public key that GetParametersForImport answered")
	case block.Type != "PUBLIC KEY":
		return nil, withHint(fmt.Errorf("%s holds PEM of type %q, not PUBLIC KEY", name, block.Type),
			"openssl makes a PUBLIC KEY of an RSA PUBLIC KEY with: openssl rsa -RSAPublicKey_in -pubout; of a CERTIFICATE with: openssl x509 -noout -pubkey")
	}
	return block.Bytes, nil
}

func fromBase64(name string, text []byte) ([]byte, error) {
	der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil || !bytes.HasPrefix(der, []byte{0x30}) {
		return nil, withHint(fmt.Errorf("%s is no public key in Base64, DER or PEM", name),
			"give PublicKey as GetParametersForImport answered it")
	}
	return der, nil
}
