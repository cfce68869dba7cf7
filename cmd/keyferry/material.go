package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"unicode"

	"github.com/mattn/go-isatty"
	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/byok"
)

// stdio is the name of standard input or output in place of a file's.
const stdio = "-"

// maxInput is more than any key material in any spelling has, and little
// enough to be read at once into a buffer that is never moved and wiped.
const maxInput = 4096

// materialSource is where key material comes from.
type materialSource struct {
	file string
}

func (s *materialSource) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.file, "in", stdio, "`FILE` with the key material as raw bytes, - for standard input")
}

// registerKeySpec defines --key-spec.
func registerKeySpec(cmd *cobra.Command, keySpec *string) {
	cmd.Flags().StringVar(keySpec, "key-spec", byok.AES256, "what the material is for: Aliyun_AES_256 (32 bytes) or Aliyun_SM4 (16 bytes)")
}

// read takes the bytes as they are; check decides whether they are material.
// The caller must clear them, up to their capacity.
func (s *materialSource) read(std *streams) ([]byte, error) {
	file := std.in
	if s.file != stdio {
		var err error
		if file, err = os.Open(s.file); err != nil {
			return nil, fmt.Errorf("reading key material: %w", err)
		}
		defer file.Close() //nolint:errcheck // nothing was written
	}
	if isatty.IsTerminal(file.Fd()) {
		return nil, withHint(errors.New("key material is not read from a terminal"),
			"give a file with --in FILE, or a pipe; to make new material: keyferry generate --out FILE")
	}
	buf := make([]byte, maxInput+1)
	n, err := io.ReadFull(file, buf)
	switch {
	case err == nil:
		clear(buf)
		return nil, withHint(fmt.Errorf("more than %d bytes of key material", maxInput), "key material is 32 or 16 raw bytes")
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		clear(buf)
		return nil, fmt.Errorf("reading key material: %w", err)
	}
	return buf[:n], nil
}

// wipe clears material with what was read around it.
func wipe(material []byte) { clear(material[:cap(material)]) }

// readChecked is read and check for a command that knows the key spec at once.
func (s *materialSource) readChecked(std *streams, keySpec string) ([]byte, error) {
	if byok.MaterialLen(keySpec) == 0 {
		return nil, unknownKeySpec(keySpec)
	}
	material, err := s.read(std)
	if err != nil {
		return nil, err
	}
	if err := check(std, material, keySpec); err != nil {
		wipe(material)
		return nil, err
	}
	return material, nil
}

func unknownKeySpec(keySpec string) error {
	return withHint(usage("key spec %q is not one that material can be imported for", keySpec),
		"give --key-spec %s or %s", byok.AES256, byok.SM4)
}

// check refuses material that is not exactly as long as its key spec wants,
// and says what it seems to be instead.
func check(std *streams, material []byte, keySpec string) error {
	want := byok.MaterialLen(keySpec)
	if len(material) == want {
		if isText(material) {
			fmt.Fprintf(std.err, "keyferry: warning: all %d bytes of the key material are printable text\n", want)
			fmt.Fprintf(std.err, "hint: if that is a password or the text form of a shorter key, it is easier to guess than %d random bytes\n", want)
		}
		return nil
	}
	err := fmt.Errorf("key material has %d bytes, but %s has exactly %d", len(material), keySpec, want)
	// Lines of xxd -p are shorter than a key.
	text := slices.DeleteFunc(slices.Clone(material), func(c byte) bool { return c < 0x80 && unicode.IsSpace(rune(c)) })
	defer wipe(text)
	switch {
	case len(material) == 0:
		return withHint(err, "the file or pipe is empty")
	case hex.DecodedLen(len(text)) == want && isHex(text):
		return withHint(err, "it is hexadecimal text; decode it first, as in: xxd -r -p FILE | keyferry ...")
	case len(material) > len(text) && isOtherHex(text):
		return withHint(err, "it is hexadecimal text of %d bytes; decode it first, as in: xxd -r -p FILE | keyferry ..., and give the --key-spec of that length",
			hex.DecodedLen(len(text)))
	case isBase64(text, want):
		return withHint(err, "it is Base64 text; decode it first, as in: base64 -d FILE | keyferry ...")
	case len(material) > want && len(bytes.TrimRight(material, "\r\n")) == want:
		return withHint(err, "it ends in a newline, which an editor or echo adds; to leave it out: head -c %d FILE | keyferry ...", want)
	case len(material) == byok.MaterialLen(byok.SM4):
		return withHint(err, "if it is SM4 material, give --key-spec %s", byok.SM4)
	case len(material) == byok.MaterialLen(byok.AES256):
		return withHint(err, "if it is AES-256 material, give --key-spec %s", byok.AES256)
	}
	return withHint(err, "give the raw bytes, neither encoded nor encrypted")
}

func isText(b []byte) bool {
	for _, c := range b {
		if c < ' ' || c > '~' {
			return false
		}
	}
	return true
}

// isHex and isBase64 decode into buffers that they wipe, as it may be a key.
func isHex(text []byte) bool {
	b := make([]byte, hex.DecodedLen(len(text)))
	defer clear(b)
	_, err := hex.Decode(b, text)
	return err == nil
}

// isOtherHex reports whether text spells material of any key spec.
func isOtherHex(text []byte) bool {
	n := hex.DecodedLen(len(text))
	return (n == byok.MaterialLen(byok.AES256) || n == byok.MaterialLen(byok.SM4)) && isHex(text)
}

func isBase64(text []byte, want int) bool {
	b := make([]byte, base64.StdEncoding.DecodedLen(len(text)))
	defer clear(b)
	n, err := base64.StdEncoding.Decode(b, text)
	return err == nil && n == want
}
