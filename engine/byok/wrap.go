package byok

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // RSAES_OAEP_SHA_1 names it; OAEP needs no collision resistance
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"github.com/emmansun/gmsm/sm2"
)

// minModulusBits is the length of the shortest RSA modulus that Wrap takes;
// NIST SP 800-131A has disallowed shorter ones since 2014.
const minModulusBits = 2048

// Wrap encrypts material under a public key, given as DER of a
// SubjectPublicKeyInfo, as answered by GetParametersForImport. The answer is
// the raw ciphertext: as long as the modulus for RSA; for SM2 the
// uncompressed point, hash and ciphertext 04 ‖ x ‖ y ‖ C3 ‖ C2, 97 bytes
// longer than the material. Wrapping the same material again gives another
// ciphertext.
//
// Errors wrap ErrAlgorithm, ErrPublicKey or ErrMaterial.
func Wrap(algorithm string, spki, material []byte) ([]byte, error) {
	if len(material) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrMaterial)
	}
	switch algorithm {
	case OAEPSHA1, OAEPSHA256, PKCS1v15:
		return wrapRSA(algorithm, spki, material)
	case SM2PKE:
		return wrapSM2(spki, material)
	}
	return nil, fmt.Errorf("%w %q", ErrAlgorithm, algorithm)
}

func wrapRSA(algorithm string, spki, material []byte) ([]byte, error) {
	parsed, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("%w: not a SubjectPublicKeyInfo in DER that %s can use: %w", ErrPublicKey, algorithm, err)
	}
	pub, ok := parsed.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%w: %s needs an RSA key", ErrPublicKey, algorithm)
	}
	if bits := pub.N.BitLen(); bits < minModulusBits {
		return nil, fmt.Errorf("%w: RSA modulus has %d bits, fewer than %d", ErrPublicKey, bits, minModulusBits)
	}
	room := pub.Size()
	switch algorithm {
	case OAEPSHA1:
		room -= 2*sha1.Size + 2
	case OAEPSHA256:
		room -= 2*sha256.Size + 2
	case PKCS1v15:
		room -= 11
	}
	if len(material) > room {
		return nil, fmt.Errorf("%w: %d bytes, more than the %d that %s can hold under this key", ErrMaterial, len(material), room, algorithm)
	}
	var wrapped []byte
	switch algorithm {
	case OAEPSHA1:
		wrapped, err = rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, material, nil) //nolint:gosec // as above
	case OAEPSHA256:
		wrapped, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, material, nil)
	case PKCS1v15:
		// Deprecated for the dangers of decrypting it, which is not done here.
		wrapped, err = rsa.EncryptPKCS1v15(rand.Reader, pub, material)
	}
	if err != nil { // the exponent is no good
		return nil, fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	return wrapped, nil
}

// The object identifiers of an SM2 key: RFC 5480 section 2.1.1 and GM/T 0006.
var (
	oidPublicKey = asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}
	oidSM2       = asn1.ObjectIdentifier{1, 2, 156, 10197, 1, 301}
)

func wrapSM2(spki, material []byte) ([]byte, error) {
	pub, err := parseSM2(spki)
	if err != nil {
		return nil, err
	}
	opts := sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2)
	wrapped, err := sm2.Encrypt(rand.Reader, pub, material, opts)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	return wrapped, nil
}

// parseSM2 reads what crypto/x509 does not know.
func parseSM2(spki []byte) (*ecdsa.PublicKey, error) {
	var info struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}
	if rest, err := asn1.Unmarshal(spki, &info); err != nil || len(rest) > 0 {
		return nil, fmt.Errorf("%w: not a SubjectPublicKeyInfo in DER", ErrPublicKey)
	}
	var curve asn1.ObjectIdentifier
	rest, err := asn1.Unmarshal(info.Algorithm.Parameters.FullBytes, &curve)
	if err != nil || len(rest) > 0 || !info.Algorithm.Algorithm.Equal(oidPublicKey) || !curve.Equal(oidSM2) {
		return nil, fmt.Errorf("%w: %s needs an SM2 key", ErrPublicKey, SM2PKE)
	}
	pub, err := sm2.NewPublicKey(info.PublicKey.RightAlign())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPublicKey, err)
	}
	return pub, nil
}
