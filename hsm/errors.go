package hsm

import (
	"errors"
	"fmt"
)

// Kinds of errors. Every error of this package wraps at most one of them, so
// that a caller decides with errors.Is and never by text.
var (
	// ErrInvalidMaterial is the one answer to wrapped material that does not
	// decrypt, has the wrong length or was made for another pair. It wraps
	// nothing and says nothing more: more would be a padding oracle.
	ErrInvalidMaterial = errors.New("hsm: key material is invalid")

	// ErrUnavailable: the token is gone, sick or being reopened, and the
	// context ended before it came back. The same call may succeed later.
	ErrUnavailable = errors.New("hsm: token is unavailable")

	// ErrPIN: a PIN was refused, by the token or, if it is guessed too easily,
	// before it was tried. It was tried once at the most; nothing is tried
	// again until a person has acted and the Token is opened anew.
	ErrPIN = errors.New("hsm: PIN refused")

	// ErrShortPIN is within an ErrPIN that is about a PIN of fewer than MinPINLen
	// bytes, which the token was not shown.
	ErrShortPIN = fmt.Errorf("it has fewer than %d bytes, so it can be guessed; take 24 random bytes in base64", MinPINLen)

	// ErrSOPIN is the ErrPIN that is about the security officer's.
	ErrSOPIN = fmt.Errorf("%w: the security officer's", ErrPIN)

	// ErrMark: Init has made a vault key that the vendor's own tool has to mark
	// as trusted. Init is run again when that is done.
	ErrMark = errors.New("hsm: a key waits to be marked as trusted by the vendor's tool")

	// ErrUnsupported: this token cannot do it, and nothing else will do it
	// in its place. The message names what is missing.
	ErrUnsupported = errors.New("hsm: not supported by this token")

	// ErrPairNotFound: the token has no such wrapping pair.
	ErrPairNotFound = errors.New("hsm: no such wrapping pair")

	// ErrUntrusted: an object of the token, or a stored record, is not what
	// Keyferry made. The message names the attribute or the fingerprint.
	ErrUntrusted = errors.New("hsm: refused as not ours")

	// ErrKeyLost: the session object behind a Key died with its session. The
	// material is not lost: open it again.
	ErrKeyLost = errors.New("hsm: key handle is gone")

	// ErrMaterialGone: the token has no object of that resident material.
	ErrMaterialGone = errors.New("hsm: resident key material is not on the token")

	// ErrFull: the token has no memory left for another object.
	ErrFull = errors.New("hsm: token is full")

	// ErrAuthentication: a ciphertext, its nonce, its tag or its associated
	// data is not what was encrypted.
	ErrAuthentication = errors.New("hsm: message authentication failed")

	// ErrClosed: the Token was closed.
	ErrClosed = errors.New("hsm: token is closed")
)

// PinnedKeyError is within the error of a token that is there and has not a key
// that is pinned.
type PinnedKeyError struct {
	Key string // what it is for, as messages have it
	Pin Fingerprint
}

func (e *PinnedKeyError) Error() string {
	return fmt.Sprintf("the pinned key %s (%s) is not on the token", e.Pin, e.Key)
}
