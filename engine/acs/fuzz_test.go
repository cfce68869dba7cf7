package acs_test

import (
	"net/http"
	"net/url"
	"slices"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/acs"
)

// FuzzVerify looks for a panic and for a forgery: nothing but what one of the
// recorded requests says may verify, however it is spelt.
func FuzzVerify(f *testing.F) {
	var known []acs.Request
	for _, rec := range recordings() {
		known = append(known, rec.want)
		f.Add(rec.raw)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		r, body, err := tryReceive(raw)
		if err != nil {
			return
		}
		got, id, err := acs.Verify(r, body, lookup, at)
		if err != nil {
			var e *acs.Error
			require.ErrorAs(t, err, &e)
			require.Zero(t, id)
			return
		}
		require.True(t, slices.ContainsFunc(known, func(want acs.Request) bool {
			return assert.ObjectsAreEqual(want, got)
		}), "a forgery: %+v", got)
	})
}

// FuzzSign signs whatever can be signed and expects the server to read it.
func FuzzSign(f *testing.F) {
	// What signing adds by itself cannot be a parameter.
	added := []string{"AccessKeyId", "Signature", "SignatureMethod", "SignatureNonce", "SignatureVersion", "Timestamp"}
	f.Add("KeyId", "key 1+~*é", true, false)
	f.Add("", "", false, true)
	f.Add("Tag.1.Key", "\x00%2B", true, true)
	f.Fuzz(func(t *testing.T, name, value string, inBody, rpc bool) {
		params := url.Values{name: {value}}
		target, body := "http://kms.example/?"+params.Encode(), ""
		if inBody {
			target, body = "http://kms.example/", params.Encode()
		}
		r, err := http.NewRequest(http.MethodPost, target, nil)
		require.NoError(t, err)
		r.Header.Set("Content-Type", form)
		sign := acs.SignV3
		if rpc {
			sign = acs.SignRPC
		}
		if err := sign(r, []byte(body), credential(), at, "nonce-1"); err != nil {
			require.True(t, !utf8.ValidString(name+value) || rpc && slices.Contains(added, name), "%v", err)
			return
		}
		if name == "Signature" || name == "SignatureType" {
			return // they would name another scheme
		}
		got, _, err := acs.Verify(r, []byte(body), lookup, at)
		require.NoError(t, err)
		if got.Params.Has(name) {
			require.Equal(t, []string{value}, got.Params[name])
		}
	})
}
