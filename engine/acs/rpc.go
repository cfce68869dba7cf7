package acs

import (
	"crypto/hmac"
	"crypto/sha1" //nolint:gosec // the scheme is HMAC-SHA1; HMAC needs no collision resistance
	"encoding/base64"
	"maps"
	"net/http"
	"net/url"
	"time"
)

// SignRPC signs req by the RPC scheme. Action, Version and the parameters of
// the action must be in the query of req; parameters may also be in body,
// which is what req will send, if its Content-Type is
// application/x-www-form-urlencoded. What the scheme needs is added to the
// query. nonce must be 1 to MaxNonceLen bytes never used before with cred.
//
// Errors are an *Error of the kinds ErrDuplicate or ErrParameters, and leave
// req as it was.
func SignRPC(req *http.Request, body []byte, cred Credential, now time.Time, nonce string) error {
	all, query, err := requestParams(req, body, typeForm)
	if err != nil {
		return err
	}
	query = maps.Clone(query) // which all may be
	for name, value := range map[string]string{
		"AccessKeyId":      cred.AccessKeyID,
		"SignatureMethod":  string(RPC),
		"SignatureNonce":   nonce,
		"SignatureVersion": rpcVersion,
		"Timestamp":        now.UTC().Format(timestampLayout),
	} {
		if _, ok := all[name]; ok {
			return fail(ErrDuplicate, name)
		}
		all[name], query[name] = value, value
	}
	if _, ok := all["Signature"]; ok {
		return fail(ErrDuplicate, "Signature")
	}
	query["Signature"] = rpcSignature(req.Method, all, cred.Secret.Bytes())
	values := make(url.Values, len(query))
	for name, value := range query {
		values.Set(name, value)
	}
	req.URL.RawQuery = values.Encode()
	return nil
}

const rpcVersion = "1.0"

// readRPC takes a request apart that carries its signature as a parameter, in
// the query or in a form body.
func readRPC(r *http.Request, body []byte) (*message, error) {
	all, _, err := requestParams(r, body, typeForm)
	if err != nil {
		return nil, err
	}
	signature, ok := all["Signature"]
	if !ok {
		return nil, fail(ErrMissingSignature, "")
	}
	// SignatureType is empty from the v1 SDK; BEARERTOKEN needs no secret.
	if all["SignatureMethod"] != string(RPC) || all["SignatureVersion"] != rpcVersion || all["SignatureType"] != "" {
		return nil, fail(ErrUnsupportedScheme, "want SignatureMethod HMAC-SHA1, SignatureVersion 1.0 and no SignatureType")
	}
	return &message{
		scheme:    RPC,
		keyID:     all["AccessKeyId"],
		timestamp: all["Timestamp"],
		nonce:     all["SignatureNonce"],
		action:    all["Action"],
		version:   all["Version"],
		params:    all,
		check: func(secret []byte) error {
			if !hmac.Equal([]byte(signature), []byte(rpcSignature(r.Method, all, secret))) {
				return fail(ErrMismatch, "")
			}
			return nil
		},
	}, nil
}

// rpcSignature signs all parameters but Signature. The path is always /.
func rpcSignature(method string, params map[string]string, secret []byte) string {
	names := make([]string, 0, 32)
	for name := range params {
		if name != "Signature" {
			names = append(names, name)
		}
	}
	query := appendQuery(make([]byte, 0, 1024), params, names, false)
	key := append(append(make([]byte, 0, len(secret)+1), secret...), '&')
	defer clear(key)
	mac := hmac.New(sha1.New, key)
	b := append(append(make([]byte, 0, 2048), method...), "&%2F&"...)
	mac.Write(appendPercent(b, query))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}
