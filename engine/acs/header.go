package acs

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"iter"
	"net/http"
	"slices"
	"strings"
	"time"
)

// The headers of the protocol, spelt as they are signed.
const (
	headerAuthorization = "authorization"

	headerHost      = "host"
	headerType      = "content-type"
	headerPrefix    = "x-acs-"
	headerAction    = "x-acs-action"
	headerVersion   = "x-acs-version"
	headerDate      = "x-acs-date"
	headerNonce     = "x-acs-signature-nonce"
	headerHash      = "x-acs-content-sha256"
	headerAccessKey = "x-acs-accesskey-id" // the access key id again, with a security token
)

// SignV3 signs req by ACS3-HMAC-SHA256. The action and the version must be in
// its headers x-acs-action and x-acs-version, the parameters in the query or
// in body, which is what req will send. Host, Content-Type and every x-acs-
// header are signed; date, nonce, hash and Authorization are set, and replaced
// if they are there. nonce must be 1 to MaxNonceLen bytes never used before
// with cred.
//
// Errors are an *Error of the kinds ErrDuplicate or ErrParameters.
func SignV3(req *http.Request, body []byte, cred Credential, now time.Time, nonce string) error {
	_, query, err := requestParams(req, body, typeForm, typeJSON)
	if err != nil {
		return err
	}
	req.Header.Set(headerDate, now.UTC().Format(timestampLayout))
	req.Header.Set(headerNonce, nonce)
	req.Header.Set(headerHash, hexSHA256(body))
	c := canonical{
		scheme:  ACS3,
		method:  req.Method,
		query:   query,
		headers: slices.Sorted(headersToSign(req.Header, req.Header.Get(headerType) != "")),
		body:    body,
	}
	if c.values, err = headerValues(req, c.headers); err != nil {
		return err
	}
	req.Header.Set(headerAuthorization, string(ACS3)+" Credential="+cred.AccessKeyID+
		",SignedHeaders="+strings.Join(c.headers, ";")+",Signature="+c.sign(cred.Secret.Bytes()))
	return nil
}

// readHeader takes a request apart that carries its signature in the fields of
// the header Authorization.
func readHeader(r *http.Request, body []byte, scheme Scheme, fields string) (*message, error) {
	auth, err := parseAuthorization(fields)
	if err != nil {
		return nil, err
	}
	all, query, err := requestParams(r, body, typeForm, typeJSON)
	if err != nil {
		return nil, err
	}
	if _, ok := all["Signature"]; ok {
		return nil, fail(ErrMalformed, "signed both by Authorization and by Signature")
	}
	c := canonical{scheme: scheme, method: r.Method, query: query, headers: auth.signedHeaders, body: body}
	if c.values, err = headerValues(r, c.headers); err != nil {
		return nil, err
	}
	for name := range headersToSign(r.Header, len(body) > 0) {
		if _, ok := slices.BinarySearch(c.headers, name); !ok {
			return nil, fail(ErrMalformed, "Host, every x-acs- header and the Content-Type of a body must be signed")
		}
	}
	m := &message{
		scheme:    scheme,
		timestamp: c.header(headerDate),
		nonce:     c.header(headerNonce),
		action:    c.header(headerAction),
		version:   c.header(headerVersion),
		params:    all,
	}
	scope, err := parseCredential(scheme, auth.credential)
	if err != nil {
		return nil, err
	}
	m.keyID = scope.keyID
	if id := c.header(headerAccessKey); id != "" && id != m.keyID {
		return nil, fail(ErrMalformed, headerAccessKey+" is not the one of Credential")
	}
	m.check = func(secret []byte) error {
		if c.header(headerHash) != c.hash() {
			return fail(ErrMismatch, headerHash+" is not the hash of the body")
		}
		key, err := scope.key(secret, m.timestamp)
		if err != nil {
			return err
		}
		if !hmac.Equal([]byte(auth.signature), []byte(c.sign(key))) {
			return fail(ErrMismatch, "")
		}
		return nil
	}
	return m, nil
}

// authorization is what the header of that name says after the scheme.
type authorization struct {
	credential    string
	signedHeaders []string // in ascending order, none twice
	signature     string
}

func parseAuthorization(fields string) (authorization, error) {
	var a authorization
	var signed string
	seen := make([]string, 0, 3)
	for field := range strings.SplitSeq(fields, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(field), "=")
		if slices.Contains(seen, name) {
			return authorization{}, fail(ErrDuplicate, "a field of Authorization")
		}
		seen = append(seen, name)
		switch name {
		case "Credential":
			a.credential = value
		case "SignedHeaders":
			signed = value
		case "Signature":
			a.signature = value
		}
	}
	if len(seen) != 3 || a.credential == "" || a.signature == "" || signed == "" {
		return authorization{}, fail(ErrMalformed, "Authorization needs Credential, SignedHeaders and Signature")
	}
	a.signedHeaders = strings.Split(signed, ";")
	for i, name := range a.signedHeaders {
		if name == "" || name != strings.ToLower(name) || i > 0 && name <= a.signedHeaders[i-1] {
			return authorization{}, fail(ErrMalformed, "SignedHeaders must be in lower case and ascending order")
		}
	}
	return a, nil
}

// headersToSign are the names that leave no part of the protocol unsigned: Host,
// every x-acs- header, and Content-Type if it matters.
func headersToSign(h http.Header, contentType bool) iter.Seq[string] {
	return func(yield func(string) bool) {
		if !yield(headerHost) || contentType && !yield(headerType) {
			return
		}
		for name := range h {
			if len(name) < len(headerPrefix) || !strings.EqualFold(name[:len(headerPrefix)], headerPrefix) {
				continue
			}
			lower, known := lowers[name]
			if !known {
				lower = strings.ToLower(name)
			}
			if !yield(lower) {
				return
			}
		}
	}
}

// headerValues are the values of the named headers, each of which must be
// there once.
func headerValues(r *http.Request, names []string) ([]string, error) {
	values := make([]string, len(names))
	for i, name := range names {
		if name == headerHost {
			values[i] = r.Host
			if r.Host == "" {
				values[i] = r.URL.Host // of a client's request that is yet to be sent
			}
			continue
		}
		if len(valuesOf(r.Header, name)) == 0 {
			return nil, fail(ErrMalformed, "a signed header is missing")
		}
		value, err := one(r.Header, name)
		if err != nil {
			return nil, err
		}
		values[i] = value
	}
	return values, nil
}

// canonical is a request reduced to what ACS3 and ACS4 sign.
type canonical struct {
	scheme  Scheme
	method  string
	query   map[string]string
	headers []string // names in order
	values  []string // of headers
	body    []byte
}

// header is the value of a signed header, "" if it is not signed.
func (c *canonical) header(name string) string {
	if i, ok := slices.BinarySearch(c.headers, name); ok {
		return c.values[i]
	}
	return ""
}

// sign answers the signature in lower-case hexadecimal digits. The official
// SDK leaves out the = of an empty parameter in ACS4, and only there.
func (c *canonical) sign(key []byte) string {
	b := make([]byte, 0, 1024)
	b = append(append(b, c.method...), "\n/\n"...)
	names := make([]string, 0, 32)
	for name := range c.query {
		names = append(names, name)
	}
	b = append(appendQuery(b, c.query, names, c.scheme == ACS4), '\n')
	for i, name := range c.headers {
		b = append(append(append(append(b, name...), ':'), c.values[i]...), '\n')
	}
	for i, name := range c.headers {
		b = append(append(b, "\n;"[min(i, 1)]), name...)
	}
	b = append(append(b, '\n'), c.hash()...)
	sum := sha256.Sum256(b)
	b = append(append(b[:0], c.scheme...), '\n')
	mac := hmac.New(sha256.New, key)
	mac.Write(hex.AppendEncode(b, sum[:]))
	return hex.EncodeToString(mac.Sum(sum[:0]))
}

// hash is that of the body.
func (c *canonical) hash() string {
	if len(c.body) == 0 {
		return emptySHA256
	}
	return hexSHA256(c.body)
}

// emptySHA256 is the SHA-256 of nothing.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(key []byte, message string) []byte {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(message))
	return mac.Sum(nil)
}
