// Package acs signs and verifies requests the way Alibaba Cloud's clients do:
//
//   - RPC signatures 1.0 (HMAC-SHA1 over the parameters), what the v1 SDK, the
//     command line tool and Terraform send;
//   - ACS3-HMAC-SHA256 (an Authorization header over a canonical request), what
//     the present SDKs send;
//   - ACS4-HMAC-SHA256 (the same with a key derived for a day, a region and a
//     product), what the present SDKs send when asked to.
//
// A server reads the body, calls [Verify] and then [Parse]. A client fills in
// a request and calls [SignV3] or [SignRPC]. All functions are pure and safe
// for concurrent use.
//
// When Verify succeeds, everything that Parse answers was signed, except that
// a scheme leaves the choice among equal spellings of one value to the sender.
// What is not signed is never read as a parameter: Verify refuses a parameter
// that is given twice, a body that its hash does not cover, and any x-acs-
// header outside the signed ones. What Verify does not do is remember: the
// server must refuse a nonce it has seen, see [Identity].
//
// The schemes are described in "Request signatures" of the Alibaba Cloud SDK
// documentation (RPC: request structure and signature; V3: request syntax and
// signature method V3). Where that is silent, the official SDKs decide.
package acs

import (
	"net/http"
	"net/url"
	"time"
)

// Window is how far the timestamp of a request may be from the server's
// clock, in either direction.
const Window = 15 * time.Minute

// MaxNonceLen is the length in bytes of the longest nonce that is accepted.
const MaxNonceLen = 128

// Scheme names a way to sign.
type Scheme string

// The schemes that Verify knows.
const (
	RPC  Scheme = "HMAC-SHA1"        // signature version 1.0
	ACS3 Scheme = "ACS3-HMAC-SHA256" // signature version 3
	ACS4 Scheme = "ACS4-HMAC-SHA256" // signature version 4
)

// Request is what a request asks for, whatever its scheme.
type Request struct {
	Scheme  Scheme
	Action  string // "" if absent
	Version string // of the API, such as 2016-01-20; "" if absent
	Format  string // as sent, in any case; "" if absent, which means JSON

	// Params are the parameters of the action, and RegionId; the parameters
	// that belong to the protocol are not among them. Each has one value.
	// They come from the query and a form body; under ACS3 and ACS4 from a
	// JSON body as well, where a number or a boolean is its literal and an
	// object or an array its compact text.
	Params url.Values
}

// Identity is who signed a request, and when.
type Identity struct {
	AccessKeyID string
	Scheme      Scheme
	Timestamp   time.Time // whole seconds, UTC

	// Nonce is 1 to MaxNonceLen bytes. The server MUST refuse a request whose
	// AccessKeyID and Nonce it accepted before, and remember them until
	// Timestamp plus Window has passed.
	Nonce string
}

// Parse reads a request whose body was read before. It verifies nothing: use
// the answer only after Verify has succeeded, except for Format, which is
// answered as far as it can be read even with an error, so that an error can
// be reported in the form that the client reads.
//
// Errors are an *Error of the kinds ErrMissingSignature, ErrUnsupportedScheme,
// ErrMalformed, ErrDuplicate, ErrParameters or ErrPath.
func Parse(r *http.Request, body []byte) (Request, error) {
	m, err := read(r, body)
	if err != nil {
		return Request{Format: r.URL.Query().Get("Format")}, err
	}
	req := Request{
		Scheme:  m.scheme,
		Action:  m.action,
		Version: m.version,
		Format:  m.params["Format"],
		Params:  make(url.Values, len(m.params)),
	}
	for name, value := range m.params {
		if !protocolParams[name] {
			req.Params.Set(name, value)
		}
	}
	return req, nil
}

// Verify decides whether a request was signed, within Window of now, by who
// knows the secret of its access key. It asks lookup for that secret and keeps
// no reference to it; an unknown access key and an empty secret are the same.
// The body must have been read whole.
//
// Errors are an *Error. First come the kinds of Parse and ErrMissingKeyID,
// then ErrUnknownKey, then ErrMissingTimestamp, ErrTimestampFormat and
// ErrExpired, then ErrMissingNonce, and only then, in constant time,
// ErrMismatch.
func Verify(r *http.Request, body []byte, lookup func(accessKeyID string) (secret []byte, ok bool), now time.Time) (Identity, error) {
	m, err := read(r, body)
	if err != nil {
		return Identity{}, err
	}
	if m.keyID == "" {
		return Identity{}, fail(ErrMissingKeyID, "")
	}
	secret, ok := lookup(m.keyID)
	if !ok || len(secret) == 0 {
		return Identity{}, fail(ErrUnknownKey, "")
	}
	at, err := parseTimestamp(m.timestamp)
	if err != nil {
		return Identity{}, err
	}
	if age := now.Sub(at); age > Window || age < -Window {
		return Identity{}, fail(ErrExpired, "")
	}
	if m.nonce == "" {
		return Identity{}, fail(ErrMissingNonce, "")
	}
	if len(m.nonce) > MaxNonceLen {
		return Identity{}, fail(ErrMalformed, "the nonce is too long")
	}
	if err := m.check(secret); err != nil {
		return Identity{}, err
	}
	return Identity{AccessKeyID: m.keyID, Scheme: m.scheme, Timestamp: at, Nonce: m.nonce}, nil
}

// timestampLayout is ISO 8601 in UTC to the second.
const timestampLayout = "2006-01-02T15:04:05Z"

func parseTimestamp(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, fail(ErrMissingTimestamp, "")
	}
	at, err := time.Parse(timestampLayout, s)
	if err != nil || len(s) != len(timestampLayout) { // Parse lets fractions pass
		return time.Time{}, fail(ErrTimestampFormat, "want YYYY-MM-DDThh:mm:ssZ")
	}
	return at, nil
}
