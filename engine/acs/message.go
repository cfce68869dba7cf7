package acs

import (
	"errors"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// message is a request taken apart by its scheme, before anything is verified.
type message struct {
	scheme    Scheme
	keyID     string
	timestamp string
	nonce     string
	action    string
	version   string
	params    map[string]string // all of them, those of the protocol included

	// check verifies the signature in constant time. ErrMismatch.
	check func(secret []byte) error
}

// protocolParams are the parameters of RPC requests that are not the action's.
var protocolParams = map[string]bool{
	"AcceptLanguage":   true,
	"AccessKeyId":      true,
	"Action":           true,
	"Format":           true,
	"SecureTransport":  true,
	"SecurityToken":    true,
	"Signature":        true,
	"SignatureMethod":  true,
	"SignatureNonce":   true,
	"SignatureType":    true,
	"SignatureVersion": true,
	"SourceIp":         true,
	"Timestamp":        true,
	"Version":          true,
}

// schemeOf tells the schemes apart, and answers what Authorization says after
// the name of its scheme, if it names one of ours. The v1 SDK sends
// x-acs-action as a header of RPC requests too, so only the place of the
// signature decides. Any other authorization may be meant for a proxy on the
// way here.
func schemeOf(r *http.Request) (scheme Scheme, fields string, err error) {
	// RPC signatures cover no path, so only the one that they assume is good.
	if r.URL.EscapedPath() != "/" && r.URL.EscapedPath() != "" {
		return "", "", fail(ErrPath, "")
	}
	authorization, err := one(r.Header, headerAuthorization)
	if err != nil {
		return "", "", err
	}
	name, fields, _ := strings.Cut(authorization, " ")
	switch scheme := Scheme(name); scheme {
	case ACS3, ACS4:
		return scheme, fields, nil
	}
	return RPC, "", nil
}

// read takes a request apart.
func read(r *http.Request, body []byte) (*message, error) {
	scheme, fields, err := schemeOf(r)
	if err != nil {
		return nil, err
	}
	if scheme != RPC {
		return readHeader(r, body, scheme, fields)
	}
	m, err := readRPC(r, body)
	if r.Header.Get(headerAuthorization) != "" && errors.Is(err, ErrMissingSignature) {
		return nil, fail(ErrUnsupportedScheme, "Authorization is neither ACS3-HMAC-SHA256 nor ACS4-HMAC-SHA256")
	}
	return m, err
}

// verify does what Verify says, after the message was read.
func (m *message) verify(lookup func(accessKeyID string) ([]byte, bool), now time.Time) (Identity, error) {
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

// request is the message without what belongs to the protocol.
func (m *message) request() Request {
	req := Request{
		Scheme:  m.scheme,
		Action:  m.action,
		Version: m.version,
		Format:  m.params["Format"],
		Params:  make(url.Values, len(m.params)),
	}
	values := make([]string, 0, len(m.params)) // of all, in one piece
	for name, value := range m.params {
		if !protocolParams[name] {
			values = append(values, value)
			req.Params[name] = values[len(values)-1 : len(values) : len(values)]
		}
	}
	return req
}
