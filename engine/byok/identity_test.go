package byok

import (
	"crypto/aes"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/cbcmac"
	"github.com/stretchr/testify/require"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	require.NoError(t, err)
	return b
}

// The examples of NIST SP 800-38B (appendix D in the edition of 2016) and, for
// 40 bytes, of RFC 4493 and the edition of 2005.
func TestCMACVectors(t *testing.T) {
	const message = "6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51" +
		"30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710"
	const key128 = "2b7e151628aed2a6abf7158809cf4f3c"
	const key256 = "603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4"
	for _, tc := range []struct {
		key  string
		size int
		want string
	}{
		{key128, 0, "bb1d6929e95937287fa37d129b756746"},
		{key128, 16, "070a16b46b4d4144f79bdd9dd04a287c"},
		{key128, 20, "7d85449ea6ea19c823a7bf78837dfade"},
		{key128, 40, "dfa66747de9ae63030ca32611497c827"},
		{key128, 64, "51f0bebf7e3b9d92fc49741779363cfe"},
		{key256, 0, "028962f61b7bf89efc6b551f4667d983"},
		{key256, 16, "28a7023f452e8f82bd4bf28d8c37c35c"},
		{key256, 20, "156727dc0878944a023c1fe03bad6d93"},
		{key256, 40, "aaf3d8f1de5640c232f5b169b9c911e6"},
		{key256, 64, "e1992190549f6ed5696a2c056c315410"},
	} {
		block, err := aes.NewCipher(unhex(t, tc.key))
		require.NoError(t, err)
		mac := cmac(block, unhex(t, message)[:tc.size])
		require.Equal(t, tc.want, hex.EncodeToString(mac[:]))
	}
}

// A second implementation agrees on every length of the last block.
func FuzzCMAC(f *testing.F) {
	for size := range 50 {
		f.Add(make([]byte, 32), make([]byte, size))
	}
	f.Fuzz(func(t *testing.T, key, message []byte) {
		block, err := aes.NewCipher(key)
		if err != nil {
			return
		}
		mac := cmac(block, message)
		require.Equal(t, cbcmac.NewCMAC(block, aes.BlockSize).MAC(message), mac[:])
	})
}

func TestMaterialIDVectors(t *testing.T) {
	data, err := os.ReadFile("../../testdata/material-id.json")
	require.NoError(t, err)
	var vectors []struct {
		Key        string `json:"key_hex"`
		KeyID      string `json:"key_id"`
		MaterialID string `json:"material_id_hex"`
	}
	require.NoError(t, json.Unmarshal(data, &vectors))
	require.NotEmpty(t, vectors)
	for _, v := range vectors {
		id, err := MaterialID(v.KeyID, unhex(t, v.Key))
		require.NoError(t, err)
		require.Equal(t, v.MaterialID, hex.EncodeToString(id[:]))
	}
}

func TestMaterialIDRefuses(t *testing.T) {
	for _, size := range []int{0, 15, 17, 24, 31, 33} {
		_, err := MaterialID("k", make([]byte, size))
		require.ErrorIs(t, err, ErrMaterial)
	}
	for _, size := range []int{0, 1 << 16} {
		_, err := MaterialID(strings.Repeat("k", size), make([]byte, 32))
		require.ErrorIs(t, err, ErrKeyID)
	}
	_, err := MaterialID(strings.Repeat("k", 1<<16-1), make([]byte, 32))
	require.NoError(t, err)
}

func TestKCV(t *testing.T) {
	for _, tc := range []struct {
		spec, material, want, origin string
	}{
		{AES256, strings.Repeat("00", 32), "dc95c0", "zero key: NIST AES Known Answer Test, ECBVarTxt256"},
		{AES256, "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "f29000", "openssl enc -aes-256-ecb"},
		{SM4, strings.Repeat("00", 16), "9f1f7b", "openssl enc -sm4-ecb"},
		{SM4, "0123456789abcdeffedcba9876543210", "2677f4", "openssl enc -sm4-ecb"},
	} {
		kcv, err := KCV(tc.spec, unhex(t, tc.material))
		require.NoError(t, err)
		require.Equal(t, tc.want, hex.EncodeToString(kcv[:]), tc.origin)
	}
}

func TestKCVRefuses(t *testing.T) {
	for _, tc := range []struct {
		spec string
		size int
		want error
	}{
		{AES256, 0, ErrMaterial},
		{AES256, 16, ErrMaterial},
		{AES256, 33, ErrMaterial},
		{SM4, 32, ErrMaterial},
		{SM4, 15, ErrMaterial},
		{"AES_256", 32, ErrKeySpec},
		{"", 32, ErrKeySpec},
	} {
		_, err := KCV(tc.spec, make([]byte, tc.size))
		require.ErrorIs(t, err, tc.want)
	}
}
