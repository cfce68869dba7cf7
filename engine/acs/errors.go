package acs

// Kind is a kind of error, and itself an error, so that callers decide with
// errors.Is(err, acs.ErrExpired). Protocols have words of their own for them.
type Kind string

// Error makes a Kind usable as an error.
func (k Kind) Error() string { return "acs: " + string(k) }

// The kinds of errors.
const (
	ErrMissingSignature  Kind = "request is not signed"
	ErrUnsupportedScheme Kind = "signature scheme is not supported"
	ErrMalformed         Kind = "signature is incomplete or malformed"
	ErrMissingKeyID      Kind = "access key id is missing"
	ErrUnknownKey        Kind = "no such access key"
	ErrMissingTimestamp  Kind = "timestamp is missing"
	ErrTimestampFormat   Kind = "timestamp is not in the right format"
	ErrExpired           Kind = "timestamp is too far from the server's time"
	ErrMissingNonce      Kind = "signature nonce is missing"
	ErrMismatch          Kind = "signature does not match"
	ErrDuplicate         Kind = "a parameter is given twice"
	ErrParameters        Kind = "parameters cannot be read"
	ErrPath              Kind = "path is not /"
)

// Error is what every function of this package returns when it fails.
type Error struct {
	Kind Kind
	// Detail names the header or parameter that is at fault, or what was
	// expected of it. It never holds a value from the request or a secret and
	// may be shown to the caller. "" if there is nothing to say.
	Detail string
}

// Error is the kind and the detail.
func (e *Error) Error() string {
	if e.Detail == "" {
		return e.Kind.Error()
	}
	return e.Kind.Error() + ": " + e.Detail
}

// Is reports whether target is the kind of e.
func (e *Error) Is(target error) bool { return target == e.Kind }

func fail(kind Kind, detail string) error { return &Error{Kind: kind, Detail: detail} }
