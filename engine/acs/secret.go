package acs

import (
	"bytes"
	"fmt"
	"log/slog"
)

// Credential is an access key with its secret.
type Credential struct {
	AccessKeyID string
	Secret      Secret
}

// Secret holds the secret of an access key so that no fmt verb, slog handler
// or encoder prints it, not even as an unexported field of another struct:
// the bytes are behind a closure, where reflection does not reach. The zero
// Secret is empty.
type Secret struct {
	reveal func() []byte
}

// NewSecret copies b.
func NewSecret(b []byte) Secret {
	b = bytes.Clone(b)
	return Secret{reveal: func() []byte { return b }}
}

// Bytes returns the secret, which the caller must not change.
func (s Secret) Bytes() []byte {
	if s.reveal == nil {
		return nil
	}
	return s.reveal()
}

const redacted = "[secret]"

// Format writes a placeholder for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue is a placeholder.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText is a placeholder, for JSON as well.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }
