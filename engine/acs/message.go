package acs

import (
	"errors"
	"net/http"
	"strings"
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

// read tells the schemes apart. The v1 SDK sends x-acs-action as a header of
// RPC requests too, so only the place of the signature decides.
func read(r *http.Request, body []byte) (*message, error) {
	// RPC signatures cover no path, so only the one that they assume is good.
	if r.URL.EscapedPath() != "/" && r.URL.EscapedPath() != "" {
		return nil, fail(ErrPath, "")
	}
	authorization := r.Header.Values("Authorization")
	if len(authorization) > 1 {
		return nil, fail(ErrDuplicate, "Authorization")
	}
	if len(authorization) == 1 {
		scheme, fields, _ := strings.Cut(authorization[0], " ")
		switch Scheme(scheme) {
		case ACS3, ACS4:
			return readHeader(r, body, Scheme(scheme), fields)
		}
		// Any other authorization may be meant for a proxy on the way here.
	}
	m, err := readRPC(r, body)
	if len(authorization) == 1 && errors.Is(err, ErrMissingSignature) {
		return nil, fail(ErrUnsupportedScheme, "Authorization is neither ACS3-HMAC-SHA256 nor ACS4-HMAC-SHA256")
	}
	return m, err
}
