package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/keyferry/keyferry/engine/acs"
)

// apiVersion is the version of the Alibaba Cloud KMS API that is spoken.
const apiVersion = "2016-01-20"

// client calls a KMS. It never retries: an import that may have happened is
// looked at with status, and one by a manifest tries again (see bulk).
type client struct {
	url    string
	plain  bool   // without TLS
	caFile string // trusted instead of the system's certificates, if not empty
	cred   acs.Credential
	http   *http.Client
}

// call does one action. The answer is decoded into answer, if there is one.
func (c *client) call(ctx context.Context, action string, params url.Values, answer any) error {
	nonce := make([]byte, 16)
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	return c.callAs(ctx, action, params, hex.EncodeToString(nonce), answer)
}

// callAs is call with a nonce for the signature. The KMS accepts each once.
func (c *client) callAs(ctx context.Context, action string, params url.Values, nonce string, answer any) error {
	err := c.do(ctx, action, params, nonce, answer)
	if err == nil {
		return nil
	}
	return c.explain(fmt.Errorf("%s: %w", action, err))
}

func (c *client) do(ctx context.Context, action string, params url.Values, nonce string, answer any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"?"+params.Encode(), http.NoBody)
	if err != nil {
		return err
	}
	r.Header.Set("Accept", "application/json")
	r.Header.Set("X-Acs-Action", action)
	r.Header.Set("X-Acs-Version", apiVersion)
	if err := acs.SignV3(r, nil, c.cred, time.Now(), nonce); err != nil {
		return err
	}
	response, err := c.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) { // it would repeat the whole query
			err = fmt.Errorf("%s: %w", r.URL.Host, u.Err)
		}
		return err
	}
	defer response.Body.Close() //nolint:errcheck // nothing was written
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if response.StatusCode/100 != 2 {
		e := &apiError{Status: response.StatusCode}
		if json.Unmarshal(body, e) != nil || e.Code == "" {
			return &foreignError{status: response.StatusCode, line: response.Status}
		}
		return e
	}
	if answer != nil && json.Unmarshal(body, answer) != nil {
		return errors.New("the answer is not what a KMS answers")
	}
	return nil
}

// foreignError is an answer that is no KMS's.
type foreignError struct {
	status int
	line   string
}

func (e *foreignError) Error() string {
	return fmt.Sprintf("HTTP status %s, which no KMS answers like this", e.line)
}

// apiError is an error that a KMS answered.
type apiError struct {
	Status    int `json:"-"`
	Code      string
	Message   string
	RequestID string `json:"RequestId"`
	Recommend string // a hint from keyferryd, a link from Alibaba Cloud
}

func (e *apiError) Error() string {
	return oneLine(fmt.Sprintf("%s: %s (HTTP status %d, RequestId %s)", e.Code, strings.TrimSuffix(e.Message, "."), e.Status, e.RequestID))
}

// hints say what to do about the codes of errors.
var hints = map[string]string{
	"Forbidden.KeyNotFound":        "check --key-id, --region and --endpoint",
	"Forbidden.NoPermission":       "the access key may not do this: ask who manages it",
	"ExpiredImportToken":           "import parameters are good for 24 hours: run the command again",
	"Forbidden.ReceiptNotFound":    "nothing was imported into this key since its KMS keeps receipts, or not by that request",
	"InvalidAction.NotFound":       "only keyferryd has receipts",
	"InvalidAccessKeyId.NotFound":  "check the access key id, and that it is for this KMS",
	"InvalidAccessKeySecret":       "check the access key secret",
	"InvalidKeyMaterial":           "once material was imported into a key, only the same can be imported again: compare with keyferry status; for other material, make another key",
	"InvalidTimeStamp.Expired":     "check the clock of this machine: it may be at most 15 minutes off",
	"Rejected.StateModifiedFailed": "look at the state with keyferry status; deletion must be cancelled first",
	"SignatureDoesNotMatch":        "check the access key secret",
	"Unsupported.Origin":           "material can only be imported into a key of origin EXTERNAL",
	"Unsupported.Alias":            "give the KeyId instead of an alias",
}

// explain says what to do about an error of a call: what the KMS says, or else
// what the code of its error or of the network means.
func (c *client) explain(err error) error {
	var e *apiError
	switch {
	case errors.As(err, &e):
		hint := hints[e.Code]
		if e.Recommend != "" && !strings.Contains(e.Recommend, "://") {
			hint = oneLine(e.Recommend)
		}
		if hint != "" {
			return withHint(err, "%s", hint)
		}
	case errors.Is(err, syscall.ECONNREFUSED):
		return withHint(err, "nothing listens there: check --endpoint, and that the KMS is running")
	case c.plain && mayBeTLS(err):
		return withHint(err, "the server may speak TLS: give --ca-file FILE (or --plain-http=false)")
	case c.caFile != "" && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return withHint(err, "if the KMS is meant to speak without TLS, give --plain-http instead of --ca-file")
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return withHint(err, "if the KMS is meant to speak without TLS, give --plain-http")
	case isNameError(err):
		return withHint(err, "give --endpoint with a name that the server's certificate is for")
	case isCertificateError(err) && c.caFile != "":
		return withHint(err, "check that %s holds the certificate of the authority that signed the server's, and that neither has expired", c.caFile)
	case isCertificateError(err):
		return withHint(err, "if the certificate is signed by an authority of your own, give --ca-file FILE")
	}
	return err
}

// mayBeTLS reports whether an error is what a client without TLS gets from a
// server with it: an alert that is no HTTP, a closed connection, or the status
// 400 that servers answer who recognise HTTP.
func mayBeTLS(err error) bool {
	var foreign *foreignError
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		strings.Contains(err.Error(), "malformed HTTP") ||
		errors.As(err, &foreign) && foreign.status == http.StatusBadRequest
}
