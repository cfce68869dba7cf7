package engine

import (
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/google/uuid"

	"github.com/keyferry/keyferry/hsm"
)

// A ciphertext is
//
//	key version (36, ASCII) ‖ IV (12) ‖ AES-GCM ciphertext ‖ tag (16)
//
// as Alibaba's own.
const (
	versionLen = 36
	sealLen    = 12 + 16 // IV and tag
)

// aadLabel begins the associated data of everything the data plane encrypts.
const aadLabel = "keyferry/aad/v1"

// aadHead is how the associated data of one CMK begins: a record of the label,
// KeyID and KeyVersionID, to which the names and values of the encryption
// context are added in the order of their names. So no ciphertext, nor any
// part of one, means anything under another CMK with the same material, under
// another version or with another context.
func aadHead(keyID, versionID string) []byte {
	b := appendField(nil, aadLabel)
	b = appendField(b, keyID)
	b = appendField(b, versionID)
	return slices.Clip(b) // appending to it copies
}

func (k *openKey) associatedData(encryptionContext map[string]string) []byte {
	if len(encryptionContext) == 0 {
		return k.aad
	}
	b := k.aad
	for _, name := range slices.Sorted(maps.Keys(encryptionContext)) {
		b = appendField(b, name)
		b = appendField(b, encryptionContext[name])
	}
	return b
}

func checkContext(parameter string, encryptionContext map[string]string) error {
	total := 0
	for name, value := range encryptionContext {
		total += len(name) + len(value)
	}
	if total > MaxEncryptionContext {
		return invalid(parameter, "at most 8192 bytes of names and values")
	}
	return nil
}

// Encrypt encrypts 1 to MaxPlaintext bytes under a CMK, in the token. The
// encryption context is not in the ciphertext; Decrypt needs an equal one.
func (e *Engine) Encrypt(
	ctx context.Context, keyID string, plaintext []byte, encryptionContext map[string]string,
) (Ciphertext, error) {
	switch {
	case len(plaintext) == 0:
		return Ciphertext{}, &Error{Kind: MissingParameter, Parameter: "Plaintext"}
	case len(plaintext) > MaxPlaintext:
		return Ciphertext{}, invalid("Plaintext", "at most 6144 bytes; encrypt more under a data key")
	}
	if err := checkKeyID(keyID); err != nil {
		return Ciphertext{}, err
	}
	if err := checkContext("EncryptionContext", encryptionContext); err != nil {
		return Ciphertext{}, err
	}
	var out Ciphertext
	err := e.use(ctx, keyRef{id: keyID}, func(k *openKey) error {
		if err := k.uses.count(ctx); err != nil {
			return err
		}
		blob := append(make([]byte, 0, versionLen+sealLen+len(plaintext)), k.versionID...)
		blob, err := k.key.Encrypt(ctx, blob, plaintext, k.associatedData(encryptionContext))
		out = Ciphertext{KeyID: k.keyID, KeyVersionID: k.versionID, Blob: blob}
		return err
	})
	if err != nil {
		return Ciphertext{}, err
	}
	return out, nil
}

// Decrypt decrypts what Encrypt and GenerateDataKey made. A blob that is
// damaged, of an unknown key version or under another encryption context is
// InvalidCiphertext and nothing more.
func (e *Engine) Decrypt(ctx context.Context, blob []byte, encryptionContext map[string]string) (Plaintext, error) {
	if err := checkContext("EncryptionContext", encryptionContext); err != nil {
		return Plaintext{}, err
	}
	if len(blob) <= versionLen+sealLen || len(blob) > versionLen+sealLen+MaxPlaintext {
		return Plaintext{}, &Error{Kind: InvalidCiphertext}
	}
	version, sealed := string(blob[:versionLen]), blob[versionLen:]
	if uuid.Validate(version) != nil {
		return Plaintext{}, &Error{Kind: InvalidCiphertext}
	}
	var out Plaintext
	err := e.use(ctx, keyRef{id: version, version: true}, func(k *openKey) error {
		plaintext, err := k.key.Decrypt(ctx, nil, sealed, k.associatedData(encryptionContext))
		out = Plaintext{KeyID: k.keyID, KeyVersionID: k.versionID, Plaintext: plaintext}
		return err
	})
	switch {
	case errors.Is(err, KeyNotFound):
		return Plaintext{}, &Error{Kind: InvalidCiphertext}
	case err != nil:
		clear(out.Plaintext) // decrypted, and expired meanwhile
		return Plaintext{}, err
	}
	return out, nil
}

// ReEncrypt decrypts as Decrypt does and encrypts as Encrypt does, both in the
// token, so that its caller never has the plaintext. The CMKs may be of
// different specs, or the same one. All of the input is checked before anything
// is decrypted; errors of a CMK's state are those of the first CMK that has one.
func (e *Engine) ReEncrypt(ctx context.Context, in ReEncryptInput) (Ciphertext, error) {
	if err := checkKeyID(in.KeyID); err != nil {
		return Ciphertext{}, renamed(err, "DestinationKeyId")
	}
	if err := checkContext("SourceEncryptionContext", in.SourceContext); err != nil {
		return Ciphertext{}, err
	}
	if err := checkContext("DestinationEncryptionContext", in.Context); err != nil {
		return Ciphertext{}, err
	}
	opened, err := e.Decrypt(ctx, in.Blob, in.SourceContext)
	if err != nil {
		return Ciphertext{}, err
	}
	defer clear(opened.Plaintext)
	return e.Encrypt(ctx, in.KeyID, opened.Plaintext, in.Context)
}

// renamed gives the parameter that an error is about the name by which it was
// asked for.
func renamed(err error, parameter string) error {
	var ours *Error
	if !errors.As(err, &ours) || ours.Parameter == "" {
		return err
	}
	as := *ours
	as.Parameter = parameter
	return &as
}

// GenerateDataKey makes a random key in the token and encrypts it under a CMK
// as Encrypt does.
func (e *Engine) GenerateDataKey(ctx context.Context, in DataKeyInput) (Ciphertext, Plaintext, error) {
	n, err := in.length()
	if err != nil {
		return Ciphertext{}, Plaintext{}, err
	}
	dataKey, err := e.token.Random(ctx, n)
	if err != nil {
		return Ciphertext{}, Plaintext{}, tokenError(err)
	}
	sealed, err := e.Encrypt(ctx, in.KeyID, dataKey, in.Context)
	if err != nil {
		clear(dataKey)
		return Ciphertext{}, Plaintext{}, err
	}
	return sealed, Plaintext{KeyID: sealed.KeyID, KeyVersionID: sealed.KeyVersionID, Plaintext: dataKey}, nil
}

// GenerateDataKeyWithoutPlaintext is GenerateDataKey for one who needs the key
// only later.
func (e *Engine) GenerateDataKeyWithoutPlaintext(ctx context.Context, in DataKeyInput) (Ciphertext, error) {
	sealed, dataKey, err := e.GenerateDataKey(ctx, in)
	clear(dataKey.Plaintext)
	return sealed, err
}

// length is how many bytes a data key has.
func (in *DataKeyInput) length() (int, error) {
	switch {
	case in.NumberOfBytes < 0, in.NumberOfBytes > MaxDataKey:
		return 0, invalid("NumberOfBytes", "from 1 to 1024")
	case in.NumberOfBytes > 0:
		return in.NumberOfBytes, nil
	}
	switch in.Spec {
	case "", "AES_256":
		return 32, nil
	case "AES_128":
		return 16, nil
	}
	return 0, invalid("KeySpec", "AES_256 or AES_128")
}

// maxLosses is how often one use starts over because its handle is gone: closed
// by a change of the CMK at the same time, or lost with its session.
const maxLosses = 3

// use lends an open key to fn, and opens it again if its handle turns out to
// be gone. What fn did counts only if the material had not expired when it was
// done: fn may have waited for a session.
func (e *Engine) use(ctx context.Context, ref keyRef, fn func(*openKey) error) error {
	var err error
	for range maxLosses {
		if err = e.lend(ctx, ref, fn); !errors.Is(err, hsm.ErrKeyLost) {
			break
		}
	}
	return dataError(err)
}

func (e *Engine) lend(ctx context.Context, ref keyRef, fn func(*openKey) error) error {
	k, err := e.cache.get(ctx, ref)
	if err != nil {
		return err
	}
	defer e.cache.release(k)
	if err := e.freshen(ctx, k); err != nil {
		return err
	}
	if !e.expired(k) {
		err = fn(k)
	}
	if e.expired(k) {
		err = hsm.ErrKeyLost // unless another node has imported it again, it is not opened any more
	}
	if errors.Is(err, hsm.ErrKeyLost) {
		e.cache.dropOpen(k, roomWait)
	}
	return err
}

func (e *Engine) expired(k *openKey) bool { return e.now().Unix() >= k.expireAt }

// dataError gives an error of the token its meaning for the data plane. Errors
// of the engine stay as they are.
func dataError(err error) error {
	var ours *Error
	switch {
	case err == nil, errors.As(err, &ours):
		return err
	case errors.Is(err, hsm.ErrAuthentication):
		return &Error{Kind: InvalidCiphertext}
	}
	return tokenError(err)
}
