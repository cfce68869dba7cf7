package acs

import "strings"

// scope is the Credential field of Authorization. ACS3 has a bare access key
// id there and signs with the secret itself; ACS4 has
//
//	access key id / yyyymmdd / region / product / aliyun_v4_request
//
// and signs with a key derived from the secret for just that.
type scope struct {
	keyID                 string
	derived               bool   // ACS4
	date, region, product string // "" in ACS3
}

const (
	scopePrefix  = "aliyun_v4"
	scopeEnd     = "aliyun_v4_request"
	scopeProduct = "Kms"
)

func parseCredential(scheme Scheme, s string) (scope, error) {
	if scheme == ACS3 {
		return scope{keyID: s}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) != 5 || parts[4] != scopeEnd {
		return scope{}, fail(ErrMalformed, "Credential must be <id>/<yyyymmdd>/<region>/Kms/"+scopeEnd)
	}
	return scope{keyID: parts[0], derived: true, date: parts[1], region: parts[2], product: parts[3]}, nil
}

// key is the key that signs a request of that timestamp, which must be in the
// right format. A key derived for another day or another product is no good.
func (s scope) key(secret []byte, timestamp string) ([]byte, error) {
	if !s.derived {
		return secret, nil
	}
	if s.product != scopeProduct || s.date != strings.ReplaceAll(timestamp[:len("2006-01-02")], "-", "") {
		return nil, fail(ErrMismatch, "Credential is for another day or product")
	}
	key := append([]byte(scopePrefix), secret...)
	for _, part := range []string{s.date, s.region, s.product, scopeEnd} {
		next := hmacSHA256(key, part)
		clear(key)
		key = next
	}
	return key, nil
}
