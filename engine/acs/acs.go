// Package acs signs and verifies requests the way Alibaba Cloud's clients do:
//
//   - RPC signatures 1.0 (HMAC-SHA1 over the parameters), what the v1 SDK, the
//     command line tool and Terraform send;
//   - ACS3-HMAC-SHA256 (an Authorization header over a canonical request), what
//     the present SDKs send;
//   - ACS4-HMAC-SHA256 (the same with a key derived for a day, a region and a
//     product), what the present SDKs send when asked to.
//
// A server asks [AccessKeyID] whether the body is worth reading, reads it and
// calls [Verify]. A client fills in a request and calls [SignV3] or [SignRPC].
// All functions are pure and safe for concurrent use.
//
// When Verify succeeds, everything that it answers was signed, except that
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

// AccessKeyID answers which access key a request says it is signed with, as far
// as its headers and its query tell: a server need not read the body of a
// request that it could not verify. "" if they do not, as an RPC signature may
// be in a form body. It verifies nothing.
//
// Errors are an *Error of the kinds ErrPath, ErrDuplicate, ErrMalformed,
// ErrMissingKeyID or ErrParameters; Verify would answer them too.
func AccessKeyID(r *http.Request) (string, error) {
	scheme, fields, err := schemeOf(r)
	if err != nil {
		return "", err
	}
	if scheme == RPC {
		query, err := parseForm(r.URL.RawQuery)
		return query["AccessKeyId"], err
	}
	auth, err := parseAuthorization(fields)
	if err != nil {
		return "", err
	}
	scope, err := parseCredential(scheme, auth.credential)
	if err == nil && scope.keyID == "" {
		err = fail(ErrMissingKeyID, "")
	}
	return scope.keyID, err
}

// Verify decides whether a request was signed, within Window of now, by who
// knows the secret of its access key, and answers what it asks for. It asks
// lookup for that secret and keeps no reference to it; an unknown access key
// and an empty secret are the same. The body must have been read whole.
//
// With an error the Identity is zero and the Request holds no more than its
// Format, as far as that can be read, so that the error can be reported in the
// form that the client reads.
//
// Errors are an *Error. First come the kinds ErrPath, ErrDuplicate,
// ErrMissingSignature, ErrUnsupportedScheme, ErrMalformed and ErrParameters of
// a request that cannot be read, and ErrMissingKeyID, then ErrUnknownKey, then
// ErrMissingTimestamp, ErrTimestampFormat and ErrExpired, then
// ErrMissingNonce, and only then, in constant time, ErrMismatch.
func Verify(
	r *http.Request, body []byte, lookup func(accessKeyID string) (secret []byte, ok bool), now time.Time,
) (Request, Identity, error) {
	m, err := read(r, body)
	if err != nil {
		return Request{Format: r.URL.Query().Get("Format")}, Identity{}, err
	}
	id, err := m.verify(lookup, now)
	if err != nil {
		return Request{Format: m.params["Format"]}, Identity{}, err
	}
	return m.request(), id, nil
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
