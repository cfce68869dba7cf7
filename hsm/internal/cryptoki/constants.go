package cryptoki

// Attribute is a CKA_ constant, a type of its own like Mechanism and RV:
// untyped constants of one kind compile where another is meant.
type Attribute uint32

// The attributes that Keyferry names; PKCS#11 v2.40 section 4.
const (
	Class             Attribute = 0x000
	OnToken           Attribute = 0x001 // CKA_TOKEN
	Private           Attribute = 0x002
	Label             Attribute = 0x003
	Value             Attribute = 0x011
	Trusted           Attribute = 0x086
	CheckValue        Attribute = 0x090
	KeyType           Attribute = 0x100
	ID                Attribute = 0x102
	Sensitive         Attribute = 0x103
	Encrypt           Attribute = 0x104
	Decrypt           Attribute = 0x105
	Wrap              Attribute = 0x106
	Unwrap            Attribute = 0x107
	Sign              Attribute = 0x108
	SignRecover       Attribute = 0x109
	Verify            Attribute = 0x10a
	VerifyRecover     Attribute = 0x10b
	Derive            Attribute = 0x10c
	Modulus           Attribute = 0x120
	ModulusBits       Attribute = 0x121
	PublicExponent    Attribute = 0x122
	ValueLen          Attribute = 0x161
	Extractable       Attribute = 0x162
	Local             Attribute = 0x163
	NeverExtractable  Attribute = 0x164
	AlwaysSensitive   Attribute = 0x165
	Modifiable        Attribute = 0x170
	Copyable          Attribute = 0x171
	Destroyable       Attribute = 0x172
	ECParams          Attribute = 0x180
	ECPoint           Attribute = 0x181
	WrapWithTrusted   Attribute = 0x210
	WrapTemplate      Attribute = 0x40000211
	UnwrapTemplate    Attribute = 0x40000212
	AllowedMechanisms Attribute = 0x40000600
)

// Object classes (CKO_) and key types (CKK_), as values of Class and KeyType.
const (
	ClassPublicKey  = 2
	ClassPrivateKey = 3
	ClassSecretKey  = 4

	KeyRSA           = 0x00
	KeyEC            = 0x03
	KeyGenericSecret = 0x10
	KeyAES           = 0x1f
)

// Mechanism is a CKM_ constant.
type Mechanism uint32

// The mechanisms that Keyferry names; PKCS#11 v2.40 section 2 of the current
// mechanisms specification.
const (
	RSAKeyPairGen Mechanism = 0x0000
	RSAPKCS       Mechanism = 0x0001
	RSAOAEP       Mechanism = 0x0009
	SHA1          Mechanism = 0x0220
	SHA256        Mechanism = 0x0250
	SHA256HMAC    Mechanism = 0x0251
	GenericKeyGen Mechanism = 0x0350
	ECKeyPairGen  Mechanism = 0x1040
	ECDSA         Mechanism = 0x1041
	AESKeyGen     Mechanism = 0x1080
	AESECB        Mechanism = 0x1081
	AESCBC        Mechanism = 0x1082
	AESCTR        Mechanism = 0x1086
	AESGCM        Mechanism = 0x1087
	AESCMAC       Mechanism = 0x108a
	AESKeyWrap    Mechanism = 0x2109 // RFC 3394
	AESKeyWrapPad Mechanism = 0x210a // CKM_AES_KEY_WRAP_PAD: no two tokens do the same
	AESKeyWrapKWP Mechanism = 0x210b // RFC 5649
	mgf1SHA1                = 1      // CKG_MGF1_SHA1
	mgf1SHA256              = 2
)
