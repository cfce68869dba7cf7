package acs_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// BenchmarkVerify is what the server does for a request before it acts on it.
func BenchmarkVerify(b *testing.B) {
	cred := acs.Credential{AccessKeyID: "KFI2VNBULYAZZQDDK5ZXZK26TJEE", Secret: acs.NewSecret([]byte("a secret of the benchmark"))}
	params := url.Values{"KeyId": {"3b1a6f0e-3a0b-4e57-9d3b-0b2d5f8a1c11"}, "Plaintext": {strings.Repeat("a2V5", 21) + "ZQ=="}}
	now := time.Date(2026, 11, 25, 9, 0, 0, 0, time.UTC)
	secret := func(string) ([]byte, bool) { return cred.Secret.Bytes(), true }
	for name, sign := range map[string]func(*http.Request) error{
		"ACS3": func(r *http.Request) error {
			r.Header.Set("x-acs-action", "Encrypt")
			r.Header.Set("x-acs-version", "2016-01-20")
			return acs.SignV3(r, nil, cred, now, "5b0b3b9ed3a14c0f8f0d7c5b2f5e1a77")
		},
		"RPC": func(r *http.Request) error {
			r.URL.RawQuery += "&Action=Encrypt&Version=2016-01-20&Format=JSON"
			return acs.SignRPC(r, nil, cred, now, "5b0b3b9ed3a14c0f8f0d7c5b2f5e1a77")
		},
	} {
		b.Run(name, func(b *testing.B) {
			r, err := http.NewRequest(http.MethodPost, "http://127.0.0.1:8080/?"+params.Encode(), http.NoBody)
			require.NoError(b, err)
			require.NoError(b, sign(r))
			b.ReportAllocs()
			for b.Loop() {
				_, _, err := acs.Verify(r, nil, secret, now)
				require.NoError(b, err)
			}
		})
	}
}
