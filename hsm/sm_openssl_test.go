package hsm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/emmansun/gmsm/sm2"
	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

// needOpenSSL skips a test where the openssl command, from 3.0 on, does not
// have what the arguments ask for.
func needOpenSSL(t testing.TB, args ...string) {
	t.Helper()
	version, err := exec.Command("openssl", "version").Output()
	if err != nil {
		t.Skipf("no openssl command to agree with: %v", err)
	}
	if err := exec.Command("openssl", args...).Run(); err != nil {
		t.Skipf("%s cannot do %v", bytes.TrimSpace(version), args)
	}
}

// openssl runs the openssl command on stdin. The keys among its arguments are
// throw-away ones.
func openssl(t testing.TB, stdin []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("openssl", args...)
	var problem bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(stdin), &problem
	out, err := cmd.Output()
	require.NoError(t, err, problem.String())
	return out
}

// identity is what a customer computes of his material.
func identity(t testing.TB, spec hsm.MaterialSpec, keyID string, material []byte) (hsm.Identity, hsm.CheckValue) {
	t.Helper()
	id, err := byok.MaterialID(keyID, material)
	require.NoError(t, err)
	aes := [3]byte(zeroBlock(t, material))
	check := hsm.CheckValue{Algorithm: hsm.CheckValueAES, Value: aes}
	if spec == hsm.SM4 {
		check.Algorithm = hsm.CheckValueSM4
		check.Value, err = byok.KCV("Aliyun_SM4", material)
		require.NoError(t, err)
	}
	return hsm.Identity{KCV: aes, MaterialID: id}, check
}

// What others encrypt by SM2 is what the token measures, in both layouts.
func TestSM2AgreesWithOthers(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	spki := filepath.Join(t.TempDir(), "spki.der")
	require.NoError(t, os.WriteFile(spki, b.pair.SPKI, 0o600))
	byCommand := 50
	if slow() {
		byCommand = 300
	}
	for name, c := range map[string]struct {
		cases   int
		encrypt func(t testing.TB, material []byte) (raw, asn1 []byte)
	}{
		"openssl": {byCommand, func(t testing.TB, material []byte) (raw, asn1 []byte) {
			asn1 = openssl(t, material, "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey", spki)
			raw, err := sm2.ASN1Ciphertext2Plain(asn1, sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2))
			require.NoError(t, err)
			return raw, asn1
		}},
		"gmsm": {300, func(t testing.TB, material []byte) (raw, asn1 []byte) {
			raw = b.wrap(t, material)
			asn1, err := sm2.PlainCiphertext2ASN1(raw, sm2.C1C3C2)
			require.NoError(t, err)
			return raw, asn1
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "openssl" {
				needOpenSSL(t, "pkey", "-pubin", "-inform", "DER", "-in", spki, "-noout")
			}
			for i := range c.cases {
				spec := []hsm.MaterialSpec{hsm.AES256, hsm.SM4}[i%2]
				material := random(spec.Len())
				id, check := identity(t, spec, "key-1", material)
				raw, asn1 := c.encrypt(t, material)
				for _, blob := range [][]byte{raw, asn1} {
					req := b.request(blob)
					req.Spec = spec
					out, err := b.token.Import(ctx, req)
					require.NoError(t, err, "%x", blob)
					require.Equal(t, id, out.Identity)
					require.Equal(t, check, out.CheckValue)
				}
			}
		})
	}
}

// The token's SM4 is that of the openssl command, in both directions. The
// command has no SM4-GCM: the text is compared by the counter mode in it, and
// the tag with gmsm in TestSM4Material.
func TestSM4AgreesWithOpenSSL(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	needOpenSSL(t, "enc", "-sm4-ctr", "-K", "00000000000000000000000000000000", "-iv", "00000000000000000000000000000000", "-in", os.DevNull)
	p, s := user(t, b.soft)
	ecb := []*pkcs11.Mechanism{pkcs11.NewMechanism(uint(hsm.BuiltinProfiles()[0].SM4.ECB), nil)}
	times := 25
	if slow() {
		times = 200
	}
	for range times {
		material := random(16)
		k := hex.EncodeToString(material)
		out, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, material)))
		require.NoError(t, err)
		require.Equal(t, openssl(t, make([]byte, 16), "enc", "-sm4-ecb", "-nopad", "-K", k)[:3], out.CheckValue.Value[:])
		key, err := b.token.OpenMaterial(ctx, out.Material)
		require.NoError(t, err)

		plain := random(16 * (1 + int(random(1)[0])))
		sealed, err := key.Encrypt(ctx, nil, plain, nil)
		require.NoError(t, err)
		counter := hex.EncodeToString(binary.BigEndian.AppendUint32(slices.Clone(sealed[:12]), 2)) // NIST SP 800-38D section 7.1
		require.Equal(t, plain, openssl(t, sealed[12:len(sealed)-16], "enc", "-d", "-sm4-ctr", "-K", k, "-iv", counter))

		theirs := openssl(t, plain, "enc", "-sm4-ecb", "-nopad", "-K", k)
		h := hsm.HandleForTest(key)
		require.NoError(t, p.EncryptInit(s, ecb, h))
		ours, err := p.Encrypt(s, plain)
		require.NoError(t, err)
		require.Equal(t, theirs, ours)
		require.NoError(t, p.DecryptInit(s, ecb, h))
		back, err := p.Decrypt(s, theirs)
		require.NoError(t, err)
		require.Equal(t, plain, back)
		require.NoError(t, key.Close())
	}
}

// The vectors of GB/T 32907 appendix A, with a key that was imported. The
// second encrypts a million times.
func TestGBT32907(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.SM2PKE)
	vector := "0123456789abcdeffedcba9876543210" // key and plaintext
	material, err := hex.DecodeString(vector)
	require.NoError(t, err)
	out, err := b.token.Import(ctx, sm4Request(b, b.wrap(t, material)))
	require.NoError(t, err)
	key, err := b.token.OpenMaterial(ctx, out.Material)
	require.NoError(t, err)
	p, s := user(t, b.soft)
	ecb := []*pkcs11.Mechanism{pkcs11.NewMechanism(uint(hsm.BuiltinProfiles()[0].SM4.ECB), nil)}
	block, times := material, 1
	if slow() {
		times = 1_000_000
	}
	for i := range times {
		require.NoError(t, p.EncryptInit(s, ecb, hsm.HandleForTest(key)))
		block, err = p.Encrypt(s, block)
		require.NoError(t, err)
		if i == 0 {
			require.Equal(t, "681edf34d206965e86b3e94f536e4246", hex.EncodeToString(block))
		}
	}
	if times > 1 {
		require.Equal(t, "595298c7c6fd271f0402f804c33d3f66", hex.EncodeToString(block))
	}
	require.NoError(t, key.Close())
}
