package engine_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"log"
	"path/filepath"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
)

// A customer's key goes into a token and is used there.
func Example() {
	ctx := context.Background()
	token, err := hsm.Open(ctx, tokenConfig()) // module, label, pins and PIN of a token that hsm.Init has seen
	check(err)
	defer func() { check(token.Close()) }()
	store, err := sqlite.Open(ctx, sqlite.Config{Path: filepath.Join(dataDir(), "keyferry.db")})
	check(err)
	defer func() { check(store.Close()) }()
	kms, err := engine.New(ctx, engine.Config{Token: token, Store: store})
	check(err)
	defer func() { check(kms.Close()) }()

	key, err := kms.CreateKey(ctx, engine.CreateKeyInput{Spec: engine.AliyunAES256})
	check(err)
	params, err := kms.GetParametersForImport(ctx, key.KeyID, hsm.RSA2048, hsm.OAEPSHA1)
	check(err)

	// What the customer does, somewhere else.
	material := make([]byte, 32)
	rand.Read(material)
	wrapped, err := byok.Wrap(byok.OAEPSHA1, params.PublicKey, material)
	check(err)

	key, err = kms.ImportKeyMaterial(ctx, engine.ImportInput{
		KeyID: key.KeyID, EncryptedKeyMaterial: wrapped, ImportToken: params.ImportToken,
	})
	check(err)
	sealed, err := kms.Encrypt(ctx, key.KeyID, []byte("attack at dawn"), map[string]string{"for": "the general"})
	check(err)
	opened, err := kms.Decrypt(ctx, sealed.Blob, map[string]string{"for": "the general"})
	check(err)
	fmt.Println(key.State, string(opened.Plaintext))
	// Output: Enabled attack at dawn
}

func check(err error) {
	if err != nil {
		log.Panic(err)
	}
}
