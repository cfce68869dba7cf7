package engine

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Kind is a kind of error, and itself an error, so that callers decide with
// errors.Is(err, engine.KeyNotFound). Its text is for logs; protocols have
// words of their own.
type Kind string

// Error makes a Kind usable as an error.
func (k Kind) Error() string { return "engine: " + string(k) }

// The kinds of errors. Everything the engine returns that is not wrapped in
// one of these is an internal failure.
const (
	MissingParameter   Kind = "a required parameter is missing"
	InvalidParameter   Kind = "a parameter is not valid"
	KeyNotFound        Kind = "no such key"
	AliasNotFound      Kind = "no such alias"
	ReceiptNotFound    Kind = "no such receipt"
	UnsupportedOrigin  Kind = "the key's origin does not allow it"
	UnsupportedAlias   Kind = "an alias is not allowed here"
	UnsupportedOp      Kind = "operation is not supported"
	InvalidKeyMaterial Kind = "key material is invalid"
	InvalidImportToken Kind = "import token is invalid"
	ExpiredImportToken Kind = "import token is expired"
	InvalidCiphertext  Kind = "ciphertext is invalid"
	StateModified      Kind = "the key's state does not allow it"
	KeyDisabled        Kind = "key is disabled"
	KeyPendingDeletion Kind = "key is pending deletion"
	KeyPendingImport   Kind = "key is pending import"
	MaterialLost       Kind = "key material is not in the token any more"
	LimitExceeded      Kind = "a limit is exceeded"
	Unavailable        Kind = "service is unavailable"
	Internal           Kind = "internal failure"
)

// Error is what every method of Engine returns when it fails.
type Error struct {
	Kind      Kind
	Parameter string // for MissingParameter and InvalidParameter: which one
	Hint      string // safe to show to the caller, "" if there is nothing to say
	cause     error  // for logs only; nil for every refused key material
}

// Error is for logs. It never holds key material, a PIN or a plaintext.
func (e *Error) Error() string {
	s := e.Kind.Error()
	if e.Parameter != "" {
		s += ": " + e.Parameter
	}
	if e.Hint != "" {
		s += ": " + e.Hint
	}
	if e.cause != nil {
		s += fmt.Sprintf(": %v", e.cause)
	}
	return s
}

// Is reports whether target is the kind of e.
func (e *Error) Is(target error) bool { return target == e.Kind }

// Unwrap returns the cause, if it may be known.
func (e *Error) Unwrap() error { return e.cause }

func invalid(parameter, hint string) error {
	return &Error{Kind: InvalidParameter, Parameter: parameter, Hint: hint}
}

// tokenError says what a failure of the token means to a caller. Refused key
// material and failed authentication are no failures of the token: whoever
// asks for them looks for them first.
func tokenError(err error) error {
	switch {
	case errors.Is(err, hsm.ErrUnavailable), errors.Is(err, hsm.ErrKeyLost), errors.Is(err, hsm.ErrPIN),
		errors.Is(err, hsm.ErrClosed), interrupted(err):
		return &Error{Kind: Unavailable, cause: err}
	case errors.Is(err, hsm.ErrUnsupported):
		return &Error{Kind: UnsupportedOp, Hint: err.Error()}
	}
	return &Error{Kind: Internal, cause: err}
}

// storeError says what a failure of the store means to a caller.
func storeError(err error) error {
	if errors.Is(err, store.ErrUnavailable) || errors.Is(err, errClosed) || interrupted(err) {
		return &Error{Kind: Unavailable, cause: err}
	}
	return &Error{Kind: Internal, cause: err}
}

// keyError is storeError where the row of a CMK was asked for.
func keyError(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return &Error{Kind: KeyNotFound}
	}
	return storeError(err)
}

// interrupted reports whether a context ended. The caller may look for that
// itself: Error unwraps to it.
func interrupted(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
