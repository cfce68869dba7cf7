package hsm_test

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm4"
	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

func sm4Request(b *bench, wrapped []byte) hsm.ImportRequest {
	req := b.request(wrapped)
	req.Spec = hsm.SM4
	return req
}

// On a token without SM everything that needs it is refused by name, and SM4
// material is imported and identified all the same.
func TestWithoutSM(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	if hasSM(b.soft) {
		t.Skip("the token has SM: there is nothing to refuse")
	}
	ctx := context.Background()
	require.ErrorIs(t, b.token.Usable(hsm.SM4), hsm.ErrUnsupported)
	require.ErrorContains(t, b.token.Usable(hsm.SM4), "SM4")
	err := b.token.Offers(hsm.ECSM2, hsm.SM2PKE)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "SM2")
	out, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, random(16))))
	require.NoError(t, err)
	require.Equal(t, b.soft.Pins.VaultAES, out.Material.Vault)
	_, err = b.token.OpenMaterial(ctx, out.Material)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "SM4")
}

func TestSM4Material(t *testing.T) {
	ctx := context.Background()
	for _, alg := range []hsm.Algorithm{hsm.OAEPSHA1, hsm.OAEPSHA256, hsm.SM2PKE} {
		t.Run(string(alg), func(t *testing.T) {
			needSM(t, softhsm.New(t, softhsm.WithKeys()))
			b := newBench(t, alg)
			require.NoError(t, b.token.Usable(hsm.SM4))
			material := random(16)
			out, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, material)))
			require.NoError(t, err)
			require.Equal(t, b.soft.Pins.VaultSM4, out.Material.Vault)
			key, err := b.token.OpenMaterial(ctx, out.Material)
			require.NoError(t, err)
			block, err := sm4.NewCipher(material)
			require.NoError(t, err)
			gcm, err := cipher.NewGCM(block)
			require.NoError(t, err)
			for range 200 {
				plain, aad := random(100), random(20)
				sealed, err := key.Encrypt(ctx, nil, plain, aad)
				require.NoError(t, err)
				opened, err := gcm.Open(nil, sealed[:12], sealed[12:], aad)
				require.NoError(t, err, "SM4-GCM as gmsm has it")
				require.Equal(t, plain, opened)
				theirs := gcm.Seal(sealed[:12:12], sealed[:12], plain, aad)
				back, err := key.Decrypt(ctx, nil, theirs, aad)
				require.NoError(t, err)
				require.Equal(t, plain, back)
				theirs[20] ^= 1
				_, err = key.Decrypt(ctx, nil, theirs, aad)
				require.ErrorIs(t, err, hsm.ErrAuthentication)
			}
			require.NoError(t, key.Close())
			// AES material does not open as SM4, nor the other way round.
			wrong := out.Material
			wrong.Spec = hsm.AES256
			_, err = b.token.OpenMaterial(ctx, wrong)
			require.ErrorIs(t, err, hsm.ErrUntrusted)
		})
	}
}

// The vector of RFC 8998 appendix A.1, imported and computed in the token.
func TestRFC8998(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	dec := func(s string) []byte {
		out, err := hex.DecodeString(s)
		require.NoError(t, err)
		return out
	}
	out, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, dec("0123456789abcdeffedcba9876543210"))))
	require.NoError(t, err)
	key, err := b.token.OpenMaterial(ctx, out.Material)
	require.NoError(t, err)
	plain, err := key.Decrypt(ctx, nil, dec("00001234567800000000abcd"+
		"17f399f08c67d5ee19d0dc9969c4bb7d5fd46fd3756489069157b282bb200735d82710ca5c22f0ccfa7cbf93d496ac15a56834cbcf98c397b4024a2691233b8d"+
		"83de3541e4c2b58177e065a9bf7b62ec"), dec("feedfacedeadbeeffeedfacedeadbeefabaddad2"))
	require.NoError(t, err)
	require.Equal(t, "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccddddddddddddddddeeeeeeeeeeeeeeeeffffffffffffffffeeeeeeeeeeeeeeeeaaaaaaaaaaaaaaaa", hex.EncodeToString(plain))
	require.Equal(t, "SM4-ECB", out.CheckValue.Algorithm)
	require.NoError(t, key.Close())
}

// Customers send SM2 ciphertexts raw, as Alibaba's samples do, or in ASN.1, as
// openssl does; both are taken.
func TestSM2Layouts(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	for range 100 {
		material := random(32)
		raw := b.wrap(t, material)
		asn1, err := sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
		require.NoError(t, err)
		first, err := b.token.Import(ctx, b.request(raw))
		require.NoError(t, err)
		second, err := b.token.Import(ctx, b.request(asn1))
		require.NoError(t, err)
		require.Equal(t, first, second)
		for _, blob := range [][]byte{raw, asn1} {
			i := int(random(1)[0]) % len(blob)
			blob[i] ^= 1 << (random(1)[0] % 8)
			_, err = b.token.Import(ctx, b.request(blob))
			require.Equal(t, hsm.ErrInvalidMaterial, err)
		}
	}
}

func TestSM2PairLifecycle(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	require.Equal(t, hsm.ECSM2, b.pair.Spec)
	require.NoError(t, b.token.Close())
	token := open(t, b.soft.Config())
	again, err := token.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
	require.Equal(t, b.pair, again)
	require.NoError(t, token.DestroyPair(ctx, b.pair.ID))
	p, s := user(t, b.soft)
	require.Empty(t, find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_ID, b.pair.ID[:])), "neither half is left")
}

// A public half that a thief puts in the place of ours is found out by the
// round trip.
func TestSubstitutedSM2PublicHalf(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	other, _ := newSM2Pair(t, b.token)
	p, s := user(t, b.soft)
	at := pkcs11.NewAttribute
	genuine := find(t, p, s, at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_ID, b.pair.ID[:]))
	theirs := find(t, p, s, at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_ID, other.ID[:]))
	require.Len(t, genuine, 1)
	attrs, err := p.GetAttributeValue(s, theirs[0], []*pkcs11.Attribute{at(pkcs11.CKA_EC_PARAMS, nil), at(pkcs11.CKA_EC_POINT, nil)})
	require.NoError(t, err)
	_, err = p.CreateObject(s, append(attrs,
		at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_EC), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_ID, b.pair.ID[:])))
	require.NoError(t, err)
	require.NoError(t, b.token.Close())
	token := open(t, b.soft.Config())
	info, err := token.Pair(ctx, b.pair.ID)
	require.NoError(t, err)
	require.Equal(t, b.pair, info, "beside ours it is passed over")
	require.NoError(t, token.Close())

	p, s = user(t, b.soft)
	require.NoError(t, p.DestroyObject(s, find(t, p, s, at(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), at(pkcs11.CKA_ID, b.pair.ID[:]), at(pkcs11.CKA_PRIVATE, true))[0]))
	token = open(t, b.soft.Config())
	_, err = token.Pair(ctx, b.pair.ID)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

func TestProfiles(t *testing.T) {
	ctx := context.Background()
	soft := softhsm.New(t, softhsm.WithKeys())
	needSM(t, soft)
	builtin := hsm.BuiltinProfiles()
	for _, p := range builtin {
		require.NoError(t, p.Validate())
	}
	ours := builtin[0]

	// Named, it is the only one tried.
	cfg := soft.Config()
	cfg.Profile = "softhsm"
	require.NoError(t, open(t, cfg).Close())
	cfg.Profile = "nobody"
	_, err := hsm.Open(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "nobody")
	cfg.Profile = "luna"
	_, err = hsm.Open(ctx, cfg)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, `profile "luna"`)

	// The same numbers by another name are no clash; other numbers that prove
	// as much are.
	alias := ours
	alias.Name = "alias"
	cfg = soft.Config()
	cfg.Profiles = []hsm.Profile{alias}
	token := open(t, cfg)
	require.NoError(t, token.Usable(hsm.SM4))
	require.NoError(t, token.Close())
	half := ours
	half.Name, half.SM2.DER = "half", 0
	cfg.Profiles = []hsm.Profile{half}
	_, err = hsm.Open(ctx, cfg)
	require.ErrorContains(t, err, "name one")
	cfg.Profile = "half"
	token = open(t, cfg)
	b := &bench{soft: soft, token: token}
	b.pair, b.sm2 = newSM2Pair(t, token)
	asn1, err := sm2.PlainCiphertext2ASN1(b.wrap(t, random(32)), sm2.C1C3C2)
	require.NoError(t, err)
	_, err = token.Import(ctx, b.request(asn1))
	require.NoError(t, err, "ASN.1 is written raw for a token that has only that")
	require.NoError(t, token.Close())

	// A layout that is not the token's is found out by the known answer.
	other := ours
	other.Name, other.SM2.RawOrder = "other", hsm.C1C2C3
	cfg.Profiles, cfg.Profile = []hsm.Profile{other}, "other"
	token = open(t, cfg)
	require.NoError(t, token.Usable(hsm.SM4))
	err = token.Offers(hsm.ECSM2, hsm.SM2PKE)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, `SM2PKE of profile "other"`)
	require.NoError(t, token.Close())

	require.Error(t, hsm.Profile{Name: "x", SM2: hsm.SM2Numbers{KeyPairGen: 1, RawOrder: "C3C2C1"}}.Validate())
	require.Error(t, hsm.Profile{}.Validate())
	require.Error(t, hsm.Profile{Name: "x", SM4: hsm.SM4Numbers{KeyType: 1}}.Validate())
	require.Error(t, hsm.Profile{Name: "x", SM2: hsm.SM2Numbers{KeyType: 1}}.Validate())
}

// A customer's ciphertext, raw or in ASN.1, reaches every token in a layout
// that it takes, and decrypts to the same.
func TestSM2LayoutsOfTokens(t *testing.T) {
	key, err := sm2.GenerateKey(rand.Reader)
	require.NoError(t, err)
	material := random(32)
	raw, err := sm2.Encrypt(rand.Reader, &key.PublicKey, material, sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2))
	require.NoError(t, err)
	asn1, err := sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
	require.NoError(t, err)
	const byRaw, byDER = 1, 2
	plain, old, der := sm2.NewPlainDecrypterOpts(sm2.C1C3C2), sm2.NewPlainDecrypterOpts(sm2.C1C2C3), sm2.ASN1DecrypterOpts
	for name, c := range map[string]struct {
		numbers          hsm.SM2Numbers
		fromRaw, fromDER *sm2.DecrypterOpts
	}{
		"both":        {hsm.SM2Numbers{Raw: byRaw, DER: byDER}, plain, der},
		"raw":         {hsm.SM2Numbers{Raw: byRaw}, plain, plain},
		"raw, named":  {hsm.SM2Numbers{Raw: byRaw, RawOrder: hsm.C1C3C2}, plain, plain},
		"raw, of old": {hsm.SM2Numbers{Raw: byRaw, RawOrder: hsm.C1C2C3}, old, old},
		"old and DER": {hsm.SM2Numbers{Raw: byRaw, DER: byDER, RawOrder: hsm.C1C2C3}, old, der},
		"DER":         {hsm.SM2Numbers{DER: byDER}, der, der},
	} {
		t.Run(name, func(t *testing.T) {
			for blob, opts := range map[string]*sm2.DecrypterOpts{string(raw): c.fromRaw, string(asn1): c.fromDER} {
				mechanism, out, err := hsm.SM2BlobForTest(c.numbers, []byte(blob))
				require.NoError(t, err)
				require.Equal(t, opts == der, mechanism == byDER)
				got, err := key.Decrypt(nil, out, opts)
				require.NoError(t, err)
				require.Equal(t, material, got)
			}
		})
	}
}

// A token whose SM4 has no GCM: its material is imported and identified, and
// its use refused by name. When GCM comes, by an update of the token or of the
// profile, init adds the SM4 vault to what is there, and a re-import of the
// same material makes it usable.
func TestSM4ComesLater(t *testing.T) {
	ctx := context.Background()
	needSM(t, softhsm.New(t, softhsm.WithKeys()))
	soft := softhsm.New(t)
	without := hsm.BuiltinProfiles()[0]
	without.Name, without.SM4.GCM = "CBC and CMAC", 0
	cfg := initConfig(soft)
	cfg.Profile, cfg.Profiles = without.Name, []hsm.Profile{without}
	pins, err := hsm.Init(ctx, cfg)
	require.NoError(t, err)
	require.Zero(t, pins.VaultSM4)
	files := objectFiles(t, soft)
	soft.Pins = pins

	old := soft.Config()
	old.Profile, old.Profiles = cfg.Profile, cfg.Profiles
	b := &bench{soft: soft, token: open(t, old)}
	require.ErrorIs(t, b.token.Usable(hsm.SM4), hsm.ErrUnsupported)
	require.ErrorContains(t, b.token.Usable(hsm.SM4), "SM4-GCM")
	b.pair, b.sm2 = newSM2Pair(t, b.token) // which this profile has
	material := random(16)
	first, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, material)))
	require.NoError(t, err)
	require.Equal(t, pins.VaultAES, first.Material.Vault)
	require.Equal(t, hsm.CheckValueAES, first.CheckValue.Algorithm)
	_, err = b.token.OpenMaterial(ctx, first.Material)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.NoError(t, b.token.Close())

	// The token can, and nobody has made the vault.
	b.token = open(t, soft.Config())
	require.ErrorIs(t, b.token.Usable(hsm.SM4), hsm.ErrUnsupported)
	require.ErrorContains(t, b.token.Usable(hsm.SM4), "run init")
	require.NoError(t, b.token.Close())

	cfg = initConfig(soft)
	cfg.Pins = pins
	added, err := hsm.Init(ctx, cfg)
	require.NoError(t, err)
	require.NotZero(t, added.VaultSM4)
	require.Subset(t, objectFiles(t, soft), files)
	require.Len(t, objectFiles(t, soft), len(files)+3, "the vault, and both halves of the pair")
	soft.Pins = added
	pins.VaultSM4 = added.VaultSM4
	require.Equal(t, pins, added)

	b.token = open(t, soft.Config())
	_, err = b.token.OpenMaterial(ctx, first.Material)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "import it again")
	second, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, material)))
	require.NoError(t, err)
	require.Equal(t, first.Identity, second.Identity, "the same material, as is proven")
	require.Equal(t, added.VaultSM4, second.Material.Vault)
	require.Equal(t, hsm.CheckValueSM4, second.CheckValue.Algorithm)
	key, err := b.token.OpenMaterial(ctx, second.Material)
	require.NoError(t, err)
	_, err = key.Encrypt(ctx, nil, []byte("used"), nil)
	require.NoError(t, err)
	require.NoError(t, key.Close())
}
