package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/receipt"
)

// walk is the customer of the demo, who owns a key and has the KMS use it.
type walk struct {
	out  io.Writer
	step int
	kms  *client

	keySpec    string
	keyID      string
	algorithm  string
	publicKey  []byte // SubjectPublicKeyInfo
	token      string // of import
	material   []byte // the customer's own; the KMS never sees it in the clear
	ciphertext string
}

func (w *walk) title(text string) {
	w.step++
	_, _ = fmt.Fprintf(w.out, "\n%2d. %s\n", w.step, text)
}

func (w *walk) say(format string, args ...any) {
	_, _ = fmt.Fprintf(w.out, "    "+format+"\n", args...)
}

// stage is a step of the walk.
type stage struct {
	title string
	do    func(context.Context) error
}

// life is every step after the server's start.
func (w *walk) life(ctx context.Context) error {
	return w.goThrough(ctx, []stage{
		{"Create a key whose material comes from outside: CreateKey, Origin EXTERNAL", w.create},
		{"Ask for what an import needs: GetParametersForImport", w.parameters},
		{"Make key material, on the customer's side only", w.generate},
		{"Wrap it under the public key and import it: ImportKeyMaterial", w.importOwn},
		{"Compare what both sides computed of the material", w.compare},
		{"Fetch the receipt of the import, signed by the token, and verify it: GetImportReceipt", w.receipt},
		{"Encrypt under the key, in the token: Encrypt", w.encrypt},
		{"Take the material away: DeleteKeyMaterial", w.delete},
		{"Try to decrypt without it: must be refused", w.useRefused},
		{"Try to import other material: must be refused", w.otherRefused},
		{"Import the same material again", w.importAgain},
		{"Decrypt what was encrypted at first: Decrypt", w.decrypt},
	})
}

// lifeOfSM4 is the shorter one of an SM4 key that travels under SM2, on a
// token that has both.
func (w *walk) lifeOfSM4(ctx context.Context) error {
	w.keySpec = byok.SM4
	return w.goThrough(ctx, []stage{
		{"And now SM4: CreateKey, KeySpec Aliyun_SM4", w.create},
		{"Ask for an SM2 public key: GetParametersForImport", w.sm2Parameters},
		{"Make key material, on the customer's side only", w.generate},
		{"Wrap it under the public key and import it: ImportKeyMaterial", w.importOwn},
		{"Compare what both sides computed of the material", w.compare},
		{"Encrypt under the key, in the token: Encrypt", w.encrypt},
		{"Decrypt it: Decrypt", w.decrypt},
	})
}

// goThrough ends at the first step that does not do what it says.
func (w *walk) goThrough(ctx context.Context, stages []stage) error {
	for _, s := range stages {
		w.title(s.title)
		if err := s.do(ctx); err != nil {
			return err
		}
	}
	return nil
}

const (
	demoPlaintext = "carried over, and back again"
	demoContext   = `{"purpose":"demo"}`
)

func (w *walk) create(ctx context.Context) error {
	var answer struct{ KeyMetadata keyState }
	err := w.kms.call(ctx, "CreateKey", map[string]string{"Origin": "EXTERNAL", "KeySpec": w.keySpec, "Description": "of the demo"}, &answer)
	if err != nil {
		return err
	}
	w.keyID = answer.KeyMetadata.KeyID
	w.say("KeyId     %s", w.keyID)
	return w.expectState(ctx, "PendingImport")
}

// parameters prefers SHA-256, which SoftHSM2 does not do as it is published.
func (w *walk) parameters(ctx context.Context) error {
	for _, w.algorithm = range []string{byok.OAEPSHA256, byok.OAEPSHA1} {
		err := w.ask(ctx, "RSA_2048")
		var refused *apiError
		if errors.As(err, &refused) && refused.Code == "InvalidParameter" && w.algorithm != byok.OAEPSHA1 {
			w.say("This token does not do %s; %s then.", w.algorithm, byok.OAEPSHA1)
			continue
		}
		return err
	}
	return nil
}

func (w *walk) sm2Parameters(ctx context.Context) error {
	w.algorithm = byok.SM2PKE
	return w.ask(ctx, "EC_SM2")
}

// ask asks for the parameters of an import by w.algorithm.
func (w *walk) ask(ctx context.Context, pairSpec string) error {
	var answer struct{ PublicKey, ImportToken, TokenExpireTime string }
	err := w.kms.call(ctx, "GetParametersForImport", map[string]string{
		"KeyId": w.keyID, "WrappingAlgorithm": w.algorithm, "WrappingKeySpec": pairSpec,
	}, &answer)
	if err != nil {
		return err
	}
	spki, err := base64.StdEncoding.DecodeString(answer.PublicKey)
	if err != nil {
		return fmt.Errorf("the public key is not Base64: %w", err)
	}
	w.publicKey, w.token = spki, answer.ImportToken
	w.say("Algorithm %s", w.algorithm)
	w.say("PublicKey %s... (%d bytes; its private half never leaves the token)", answer.PublicKey[:32], len(spki))
	w.say("Token     good until %s, for this key alone", answer.TokenExpireTime)
	return nil
}

func (w *walk) generate(context.Context) error {
	w.material = make([]byte, byok.MaterialLen(w.keySpec))
	_, err := rand.Read(w.material)
	w.say("%d random bytes. They leave this program wrapped, or not at all.", len(w.material))
	return err
}

func (w *walk) importOwn(ctx context.Context) error {
	if err := w.importMaterial(ctx, w.material); err != nil {
		return err
	}
	return w.expectState(ctx, "Enabled")
}

func (w *walk) importMaterial(ctx context.Context, material []byte) error {
	wrapped, err := byok.Wrap(w.algorithm, w.publicKey, material)
	if err != nil {
		return err
	}
	text := base64.StdEncoding.EncodeToString(wrapped)
	w.say("Wrapped   %s... (%d bytes)", text[:32], len(wrapped))
	return w.kms.call(ctx, "ImportKeyMaterial", map[string]string{
		"KeyId": w.keyID, "EncryptedKeyMaterial": text, "ImportToken": w.token,
	}, nil)
}

// compare computes the check value and the material id from the material, and
// has the KMS say what it measured in the token.
func (w *walk) compare(ctx context.Context) error {
	kcv, err := byok.KCV(w.keySpec, w.material)
	if err != nil {
		return err
	}
	id, err := byok.MaterialID(w.keyID, w.material)
	if err != nil {
		return err
	}
	there, err := w.describe(ctx)
	if err != nil {
		return err
	}
	w.say("Check value  here  %x", kcv)
	w.say("             there %s", there.KeyCheckValue)
	w.say("Material id  here  %x", id)
	w.say("             there %s", there.KeyMaterialID)
	if there.KeyCheckValue != hex.EncodeToString(kcv[:]) || there.KeyMaterialID != hex.EncodeToString(id[:]) {
		return errors.New("the two sides differ")
	}
	w.say("The token holds the customer's key, and no other.")
	return nil
}

// receipt takes the public key from the receipt itself. A customer has it from
// the operator, who prints it with keyferryd receipt-key.
func (w *walk) receipt(ctx context.Context) error {
	var answer struct {
		Index       int64
		Entry, Head string
		EntryHash   receipt.Hash
		PublicKey   []byte
		Proof       struct{ Hash []receipt.Hash }
	}
	if err := w.kms.call(ctx, "GetImportReceipt", map[string]string{"KeyId": w.keyID}, &answer); err != nil {
		return err
	}
	key, err := receipt.ParsePublicKey(answer.PublicKey)
	if err != nil {
		return err
	}
	r := receipt.Receipt{
		Index: answer.Index, Entry: []byte(answer.Entry), EntryHash: answer.EntryHash, Proof: answer.Proof.Hash,
		Head: []byte(answer.Head), PublicKey: answer.PublicKey,
	}
	entry, head, err := r.Verify(key)
	if err != nil {
		return err
	}
	id, err := byok.MaterialID(w.keyID, w.material)
	if err != nil {
		return err
	}
	if entry.MaterialID != id {
		return errors.New("it is the receipt of other material")
	}
	w.say("Entry     %d of a log of %d: %s of material %x... at %s", r.Index, head.Size, entry.Kind, entry.MaterialID[:8], entry.Time.Format("15:04:05Z"))
	w.say("Key       %s", key.Fingerprint())
	w.say("The log cannot lose it unnoticed: keyferry receipt get, log and verify.")
	return nil
}

func (w *walk) encrypt(ctx context.Context) error {
	var answer struct{ CiphertextBlob string }
	err := w.kms.call(ctx, "Encrypt", map[string]string{
		"KeyId": w.keyID, "Plaintext": base64.StdEncoding.EncodeToString([]byte(demoPlaintext)), "EncryptionContext": demoContext,
	}, &answer)
	if err != nil {
		return err
	}
	w.ciphertext = answer.CiphertextBlob
	w.say("Plaintext  %q", demoPlaintext)
	w.say("Ciphertext %.44s...", w.ciphertext)
	return nil
}

func (w *walk) delete(ctx context.Context) error {
	if err := w.kms.call(ctx, "DeleteKeyMaterial", map[string]string{"KeyId": w.keyID}, nil); err != nil {
		return err
	}
	return w.expectState(ctx, "PendingImport")
}

func (w *walk) useRefused(ctx context.Context) error {
	return w.expectRefusal("Rejected.PendingImport", w.decryptInto(ctx, nil))
}

func (w *walk) otherRefused(ctx context.Context) error {
	other := make([]byte, len(w.material))
	if _, err := rand.Read(other); err != nil {
		return err
	}
	if err := w.expectRefusal("InvalidKeyMaterial", w.importMaterial(ctx, other)); err != nil {
		return err
	}
	return w.expectState(ctx, "PendingImport")
}

func (w *walk) importAgain(ctx context.Context) error { return w.importOwn(ctx) }

func (w *walk) decrypt(ctx context.Context) error {
	var answer struct{ Plaintext string }
	if err := w.decryptInto(ctx, &answer); err != nil {
		return err
	}
	plaintext, err := base64.StdEncoding.DecodeString(answer.Plaintext)
	if err != nil {
		return err
	}
	w.say("Plaintext  %q", plaintext)
	if string(plaintext) != demoPlaintext {
		return errors.New("that is not what was encrypted")
	}
	return nil
}

func (w *walk) decryptInto(ctx context.Context, answer any) error {
	return w.kms.call(ctx, "Decrypt", map[string]string{"CiphertextBlob": w.ciphertext, "EncryptionContext": demoContext}, answer)
}

// keyState is what the demo reads of KeyMetadata.
type keyState struct {
	KeyID         string `json:"KeyId"`
	KeyState      string
	KeyMaterialID string `json:"KeyMaterialId"`
	KeyCheckValue string
}

func (w *walk) describe(ctx context.Context) (keyState, error) {
	var answer struct{ KeyMetadata keyState }
	err := w.kms.call(ctx, "DescribeKey", map[string]string{"KeyId": w.keyID}, &answer)
	return answer.KeyMetadata, err
}

func (w *walk) expectState(ctx context.Context, want string) error {
	there, err := w.describe(ctx)
	if err != nil {
		return err
	}
	w.say("State     %s", there.KeyState)
	if there.KeyState != want {
		return fmt.Errorf("the state is not %s", want)
	}
	return nil
}

// expectRefusal requires an error of that code.
func (w *walk) expectRefusal(code string, err error) error {
	var refused *apiError
	if !errors.As(err, &refused) {
		return errors.Join(errors.New("it was not refused"), err)
	}
	w.say("Refused   %s: %s", refused.Code, refused.Message)
	if refused.Code != code {
		return fmt.Errorf("the code is not %s", code)
	}
	return nil
}
