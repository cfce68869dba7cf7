package kmsapi_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
	"github.com/keyferry/keyferry/engine/store"
)

// BenchmarkEncrypt is what the handler adds to an encryption: signature,
// parameters, answer and access log, without engine, store and network.
func BenchmarkEncrypt(b *testing.B) {
	secret := []byte("a secret of the benchmark")
	now := time.Date(2026, 11, 25, 9, 0, 0, 0, time.UTC)
	h, err := kmsapi.New(kmsapi.Config{
		Engine: &quietEngine{}, Nonces: quietNonces{}, Now: func() time.Time { return now },
		Secret: func(string) ([]byte, bool) { return secret, true },
		Logger: slog.New(slog.NewTextHandler(io.Discard, nil)), //nolint:sloglint // to write a line is part of it
	})
	require.NoError(b, err)
	params := url.Values{"KeyId": {keyID}, "Plaintext": {strings.Repeat("a2V5", 21) + "ZQ=="}}
	r, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:8080/?"+params.Encode(), http.NoBody)
	require.NoError(b, err)
	r.Header.Set("x-acs-action", "Encrypt")
	r.Header.Set("x-acs-version", kmsapi.Version)
	cred := acs.Credential{AccessKeyID: "benchmark", Secret: acs.NewSecret(secret)}
	require.NoError(b, acs.SignV3(r, nil, cred, now, "5b0b3b9ed3a14c0f8f0d7c5b2f5e1a77"))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	require.Equal(b, http.StatusOK, w.Code, w.Body)
	b.ReportAllocs()
	for b.Loop() {
		w.Body.Reset()
		h.ServeHTTP(w, r)
	}
}

// quietEngine encrypts nothing, at once.
type quietEngine struct{ stubEngine }

// Encrypt implements kmsapi.Engine.
func (*quietEngine) Encrypt(context.Context, string, []byte, map[string]string) (engine.Ciphertext, error) {
	return engine.Ciphertext{KeyID: keyID, KeyVersionID: versionID, Blob: make([]byte, 128)}, nil
}

// quietNonces has never seen one.
type quietNonces struct{}

// AddNonce implements kmsapi.Nonces.
func (quietNonces) AddNonce(context.Context, store.Nonce, time.Time) (bool, error) { return true, nil }
