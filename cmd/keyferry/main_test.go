package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestExitStatus(t *testing.T) {
	dir := t.TempDir()
	key := filepath.Join(dir, "key.bin")
	require.NoError(t, os.WriteFile(key, make([]byte, 32), 0o600))
	for _, tc := range []struct {
		want int
		args []string
	}{
		{0, []string{"kcv", "--in", key}},
		{0, []string{"--help"}},
		{0, []string{"help", "import"}},
		{exitFailure, []string{"kcv", "--in", filepath.Join(dir, "none")}},
		{exitFailure, []string{"generate", "--out", key}},
		{exitFailure, []string{"kcv", "--in", key, "--key-spec", "Aliyun_SM4"}},
		{exitFailure, []string{"wrap", "--in", key, "--public-key", key}},
		{exitUsage, nil},
		{exitUsage, []string{"kvc"}},
		{exitUsage, []string{"kcv", key}},
		{exitUsage, []string{"kcv", "--out", key}},
		{exitUsage, []string{"kcv", "--in", key, "--key-spec", "AES"}},
		{exitUsage, []string{"material-id", "--in", key}},
		{exitUsage, []string{"status", "--key-id", "k"}},
		{exitUsage, []string{"import", "--in", key, "--expire", "soon"}},
		{exitUsage, []string{"import", "--in", key, "--algorithm", "none"}},
		{exitUsage, []string{"import", "--in", key, "--wrapping-key-spec", "RSA_1024"}},
		{exitUsage, []string{"import", "--in", key, "--algorithm", "SM2PKE", "--wrapping-key-spec", "RSA_2048"}},
	} {
		t.Setenv(credentialsVariable, "")
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		require.NoError(t, err)
		var stderr bytes.Buffer
		require.Equal(t, tc.want, run(t.Context(), tc.args, &streams{in: null, out: null, err: &stderr}), "%v: %s", tc.args, stderr.String())
		require.NoError(t, null.Close())
		if tc.want == 0 {
			require.Empty(t, stderr.String())
			continue
		}
		require.Regexp(t, `^keyferry: [^\n]+\n`, stderr.String())
	}
}

func TestParseExpire(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 999, time.UTC)
	for s, want := range map[string]time.Time{
		"":                          {},
		"90d":                       now.Add(90 * 24 * time.Hour).Truncate(time.Second),
		"12h":                       now.Add(12 * time.Hour).Truncate(time.Second),
		"1h30m":                     now.Add(90 * time.Minute).Truncate(time.Second),
		"2027-01-31T00:00:00Z":      time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC),
		"2027-01-31T08:00:00+08:00": time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC),
	} {
		got, err := parseExpire(s, now)
		require.NoError(t, err, s)
		require.Equal(t, want, got, s)
	}
	for _, s := range []string{
		"0s", "0d", "-1h", "-1d", "d", "1.5d", "200000d", "9223372036854775808d", "90", "tomorrow",
		"2026-11-23T12:00:00Z", "2020-01-01T00:00:00Z", "2027-01-31", "2027-01-31 00:00:00",
	} {
		_, err := parseExpire(s, now)
		var e *usageError
		require.ErrorAs(t, err, &e, s)
		require.NotEmpty(t, e.Error())
	}
}

func TestIsLoopback(t *testing.T) {
	for _, s := range []string{"127.0.0.1:8443", "127.9.9.9", "[::1]:80", "[::1]", "::1", "localhost", "localhost:80"} {
		require.True(t, isLoopback(s), s)
	}
	for _, s := range []string{
		"kms.cn-hangzhou.aliyuncs.com", "127.0.0.1.example.com:80", "localhost.example.com", "10.0.0.1:80", "[::2]:80", "0.0.0.0:80", "",
	} {
		require.False(t, isLoopback(s), s)
	}
}

// The region alone is enough for Alibaba Cloud, and never without TLS.
func TestEndpointOfARegion(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, []byte("secret-of-the-test\n"), 0o600))
	t.Setenv(credentialsVariable, "")
	conn := connection{region: "cn-hangzhou", accessKeyID: "id", secretFile: secret}
	var stderr bytes.Buffer
	c, err := conn.client(&streams{err: &stderr})
	require.NoError(t, err)
	require.Equal(t, "https://kms.cn-hangzhou.aliyuncs.com/", c.url)
	require.Equal(t, "secret-of-the-test", string(c.cred.Secret.Bytes()))
	require.Empty(t, stderr.String())

	plain := true
	conn.plainHTTP = &plain
	c, err = conn.client(&streams{err: &stderr})
	require.NoError(t, err)
	require.Equal(t, "http://kms.cn-hangzhou.aliyuncs.com/", c.url)
	require.Contains(t, stderr.String(), "keyferry: warning: without TLS")
}

// No byte of the material stays behind in the buffer it was read into.
func TestWipeClearsWhatWasReadAround(t *testing.T) {
	name := filepath.Join(t.TempDir(), "key.bin")
	require.NoError(t, os.WriteFile(name, bytes.Repeat([]byte{0xa5}, 40), 0o600))
	source := materialSource{file: name}
	material, err := source.read(&streams{})
	require.NoError(t, err)
	require.Len(t, material, 40)
	all := material[:cap(material)]
	wipe(material[:32])
	require.NotContains(t, all, byte(0xa5))
}

// A server with TLS answers one without in several ways, by its make and by luck.
func TestMayBeTLS(t *testing.T) {
	for _, err := range []error{
		&net.OpError{Op: "read", Err: os.NewSyscallError("read", syscall.ECONNRESET)},
		io.EOF,
		io.ErrUnexpectedEOF,
		errors.New(`net/http: HTTP/1.x transport connection broken: malformed HTTP response "\x15\x03\x01"`),
		&foreignError{status: 400, line: "400 Bad Request"},
	} {
		err = fmt.Errorf("DescribeKey: %w", err)
		var hinted *hintedError
		require.ErrorAs(t, (&client{plain: true}).explain(err), &hinted)
		require.Equal(t, "the server may speak TLS: give --ca-file FILE (or --plain-http=false)", hinted.hint)
		require.Equal(t, err, (&client{}).explain(err), "TLS was spoken")
	}
	require.False(t, mayBeTLS(&foreignError{status: 307}))
	require.False(t, mayBeTLS(&apiError{Status: 400}))
}

func TestQuote(t *testing.T) {
	for s, want := range map[string]string{
		"key-1_a.b/c:+": "key-1_a.b/c:+",
		"":              "''",
		"my key":        "'my key'",
		"a'b":           `'a'\''b'`,
		"$(x)":          "'$(x)'",
		"~":             "'~'",
	} {
		require.Equal(t, want, quote(s))
	}
}
