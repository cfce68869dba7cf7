package hsm

import (
	"slices"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Labels of the keys that Init makes.
const (
	labelVaultAES = "keyferry vault AES-256 v1"
	labelVaultSM4 = "keyferry vault SM4 v1"
	labelMAC      = "keyferry mac HMAC-SHA-256 v1"
	labelReceipt  = "keyferry receipt P-256 v1"
	labelPair     = "keyferry pair "     // see pairLabel
	labelResident = "keyferry material " // see residentLabel
)

// The usage booleans of each class. A template names every one of them:
// tokens default those left out to true.
var (
	secretUsages  = []p11.Attribute{p11.Encrypt, p11.Decrypt, p11.Sign, p11.Verify, p11.Wrap, p11.Unwrap, p11.Derive}
	privateUsages = []p11.Attribute{p11.Decrypt, p11.Sign, p11.SignRecover, p11.Unwrap, p11.Derive}
	publicUsages  = []p11.Attribute{p11.Encrypt, p11.Verify, p11.VerifyRecover, p11.Wrap, p11.Derive}
)

// usage names every usage of a class, true only for those allowed.
func usage(all []p11.Attribute, allowed ...p11.Attribute) []p11.Attr {
	var out []p11.Attr
	for _, u := range all {
		out = append(out, p11.Bool(u, slices.Contains(allowed, u)))
	}
	return out
}

// frozen closes a template: SoftHSM2 sets attributes in their order and
// answers CKR_ATTRIBUTE_READ_ONLY to whatever follows these two.
func frozen() []p11.Attr {
	return []p11.Attr{p11.Bool(p11.Copyable, false), p11.Bool(p11.Modifiable, false)}
}

func join(lists ...[]p11.Attr) []p11.Attr { return slices.Concat(lists...) }

// cipherNumbers are those of the block cipher that material is used with.
type cipherNumbers struct {
	keyType        uint64
	ecb, gcm, cmac p11.Mechanism
}

var aesNumbers = cipherNumbers{p11.KeyAES, p11.AESECB, p11.AESGCM, p11.AESCMAC}

func (n SM4Numbers) cipher() cipherNumbers {
	return cipherNumbers{uint64(n.KeyType), p11.Mechanism(n.ECB), p11.Mechanism(n.GCM), p11.Mechanism(n.CMAC)}
}

// mechanisms is what material answers to, in this order in every template:
// tokens compare the list byte for byte, and SoftHSM2 reports it in ascending
// order.
func (n cipherNumbers) mechanisms() p11.Attr {
	list := []p11.Mechanism{n.ecb, n.gcm}
	if n.cmac != 0 {
		list = append(list, n.cmac)
	}
	slices.Sort(list)
	return p11.Mechanisms(list...)
}

// material is the template, pinned and explicit alike, of key material as a
// session object. Pins stand in CKA_UNWRAP_TEMPLATE; SoftHSM2 compares the two
// instead of merging them, so every C_UnwrapKey repeats them all.
func material(n cipherNumbers, extractable bool, usages ...p11.Attribute) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassSecretKey),
			p11.ULong(p11.KeyType, n.keyType),
			p11.Bool(p11.OnToken, false),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, extractable),
			p11.Bool(p11.WrapWithTrusted, true),
			n.mechanisms(),
		},
		usage(secretUsages, usages...),
		frozen(),
	)
}

// measured is material as it comes out of the customer's unwrap, always as an
// AES key: extractable, because it is sealed next, under a trusted key only.
func measured() []p11.Attr { return material(aesNumbers, true, p11.Encrypt, p11.Sign) }

// resident is material that stays, as it comes out of the customer's unwrap:
// it never was extractable, and cannot be changed but only destroyed.
func resident() []p11.Attr {
	attrs := material(aesNumbers, false, p11.Encrypt, p11.Decrypt, p11.Sign)
	i := slices.IndexFunc(attrs, func(a p11.Attr) bool { return a.Type == p11.OnToken })
	attrs[i] = p11.Bool(p11.OnToken, true)
	return attrs
}

// residentObject is the template of one resident material: what its pair pins,
// and its names.
func residentObject(id ObjectID, label residentLabel) []p11.Attr {
	return join(
		[]p11.Attr{p11.Bytes(p11.ID, id[:]), p11.Bytes(p11.Label, []byte(label.String())), p11.Bool(p11.Destroyable, true)},
		resident(),
	)
}

// opened is material as it comes out of its blob, to be used. Not extractable
// unless the vault was made for re-sealing.
func opened(n cipherNumbers, reseal bool) []p11.Attr {
	return material(n, reseal, p11.Encrypt, p11.Decrypt)
}

// vaultWrapTemplate is what a key must be for the vault to seal it.
func vaultWrapTemplate() []p11.Attr {
	return []p11.Attr{
		p11.Bool(p11.Sensitive, true),
		p11.Bool(p11.WrapWithTrusted, true),
		p11.ULong(p11.KeyType, p11.KeyAES),
	}
}

// vaultKind is what a vault key is for: one vault opens one type of key.
// Unpinned, SoftHSM2 opens a sealed 32-byte AES key as a DES key.
type vaultKind struct {
	label  string
	cipher cipherNumbers
}

// vaultKey is a vault key in its final form, on the token.
func (v vaultKind) vaultKey(reseal bool) []p11.Attr {
	return join(v.common(reseal), vaultPlacement(), []p11.Attr{p11.Bool(p11.Trusted, true)})
}

func (v vaultKind) common(reseal bool) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassSecretKey),
			p11.ULong(p11.KeyType, p11.KeyAES),
			p11.Bytes(p11.Label, []byte(v.label)),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, false),
			p11.Mechanisms(p11.AESKeyWrap),
			p11.Nested(p11.WrapTemplate, vaultWrapTemplate()),
			p11.Nested(p11.UnwrapTemplate, opened(v.cipher, reseal)),
		},
		usage(secretUsages, p11.Wrap, p11.Unwrap),
	)
}

// vaultPlacement is what C_CopyObject changes when it puts the SO's session
// object on the token.
func vaultPlacement() []p11.Attr {
	return []p11.Attr{
		p11.Bool(p11.OnToken, true),
		p11.Bool(p11.Private, true),
		p11.Bool(p11.Destroyable, false),
		p11.Bool(p11.Modifiable, false),
	}
}

// birth is the session object that the SO generates: only the SO may set
// CKA_TRUSTED, and only a public object is the SO's to make. It never touches
// the disk.
func (v vaultKind) birth(reseal bool) []p11.Attr {
	return join(v.common(reseal), []p11.Attr{
		p11.ULong(p11.ValueLen, 32),
		p11.Bool(p11.OnToken, false),
		p11.Bool(p11.Private, false),
		p11.Bool(p11.Trusted, true),
	})
}

// knownAES is a session object of a public constant that a vault wraps, to
// tell which vault it is.
func knownAES(value []byte) []p11.Attr {
	return known(aesNumbers, value, p11.Encrypt, p11.Sign)
}

// knownSM4 is a session object of a public constant, to prove SM4 with.
func knownSM4(n SM4Numbers, value []byte) []p11.Attr {
	return known(n.cipher(), value, p11.Encrypt, p11.Decrypt)
}

func known(n cipherNumbers, value []byte, usages ...p11.Attribute) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassSecretKey),
			p11.ULong(p11.KeyType, n.keyType),
			p11.Bytes(p11.Value, value),
			p11.Bool(p11.OnToken, false),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, true),
			p11.Bool(p11.WrapWithTrusted, true),
			n.mechanisms(),
		},
		usage(secretUsages, usages...),
		frozen(),
	)
}

// macKey is the token's HMAC key. VERIFY is not allowed: MACs are recomputed
// and compared here, so that no token compares them in variable time.
func macKey() []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassSecretKey),
			p11.ULong(p11.KeyType, p11.KeyGenericSecret),
			p11.Bytes(p11.Label, []byte(labelMAC)),
			p11.ULong(p11.ValueLen, 32),
			p11.Bool(p11.OnToken, true),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, false),
			p11.Mechanisms(p11.SHA256HMAC),
			p11.Bool(p11.Destroyable, false),
		},
		usage(secretUsages, p11.Sign),
		frozen(),
	)
}

// oidP256 is prime256v1, 1.2.840.10045.3.1.7, in DER.
var oidP256 = []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}

// receiptKey is the pair that signs receipts. The public half is on the token
// too, private so that no one without the PIN replaces it: PKCS#11 clients
// look for it there.
func receiptKey(id []byte) (public, private []p11.Attr) {
	public = join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassPublicKey),
			p11.ULong(p11.KeyType, p11.KeyEC),
			p11.Bytes(p11.ECParams, oidP256),
			p11.Bytes(p11.Label, []byte(labelReceipt)),
			p11.Bytes(p11.ID, id),
			p11.Bool(p11.OnToken, true),
			p11.Bool(p11.Private, true),
			p11.Mechanisms(p11.ECDSA),
			p11.Bool(p11.Destroyable, false),
		},
		usage(publicUsages, p11.Verify),
		frozen(),
	)
	private = join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassPrivateKey),
			p11.ULong(p11.KeyType, p11.KeyEC),
			p11.Bytes(p11.Label, []byte(labelReceipt)),
			p11.Bytes(p11.ID, id),
			p11.Bool(p11.OnToken, true),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, false),
			p11.Mechanisms(p11.ECDSA),
			p11.Bool(p11.Destroyable, false),
		},
		usage(privateUsages, p11.Sign),
		frozen(),
	)
	return public, private
}

// rsaPublic is the public half of a wrapping pair: a session object that is
// never used. What customers get is read from the private half.
func rsaPublic(bits int) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassPublicKey),
			p11.ULong(p11.KeyType, p11.KeyRSA),
			p11.ULong(p11.ModulusBits, uint64(bits)),
			p11.Bytes(p11.PublicExponent, []byte{1, 0, 1}),
			p11.Bool(p11.OnToken, false),
			p11.Bool(p11.Private, true),
		},
		usage(publicUsages),
		frozen(),
	)
}

// wrappingPrivate is the private half of a wrapping pair as a session object, to
// probe with: it unwraps, by the mechanisms of its algorithm, into what measured
// says, and nothing else.
func wrappingPrivate(keyType uint64, id []byte, label string, mechanisms ...p11.Mechanism) []p11.Attr {
	return wrappingInto(measured(), keyType, false, id, label, mechanisms...)
}

// wrappingInto is wrappingPrivate for any template of what is unwrapped, on the
// token or not.
func wrappingInto(unwrapped []p11.Attr, keyType uint64, onToken bool, id []byte, label string, mechanisms ...p11.Mechanism) []p11.Attr {
	return join(
		[]p11.Attr{
			p11.ULong(p11.Class, p11.ClassPrivateKey),
			p11.ULong(p11.KeyType, keyType),
			p11.Bytes(p11.Label, []byte(label)),
			p11.Bytes(p11.ID, id),
			p11.Bool(p11.OnToken, onToken),
			p11.Bool(p11.Private, true),
			p11.Bool(p11.Sensitive, true),
			p11.Bool(p11.Extractable, false),
			p11.Mechanisms(mechanisms...),
			p11.Nested(p11.UnwrapTemplate, unwrapped),
		},
		usage(privateUsages, p11.Unwrap),
		frozen(),
	)
}

// provenance is what the token itself attests of a key that was made in it and
// never was outside.
func provenance() []p11.Attr {
	return []p11.Attr{
		p11.Bool(p11.Local, true),
		p11.Bool(p11.AlwaysSensitive, true),
		p11.Bool(p11.NeverExtractable, true),
	}
}
