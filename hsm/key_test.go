package hsm_test

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
)

// What the token encrypts is AES-GCM as everybody computes it.
func TestEncryptIsAESGCM(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	material := random(32)
	key := b.opened(t, material)
	block, err := aes.NewCipher(material)
	require.NoError(t, err)
	gcm, err := cipher.NewGCM(block)
	require.NoError(t, err)
	seen := map[string]bool{}
	for _, n := range []int{0, 1, 15, 16, 17, 64, 6 << 10, 64 << 10} {
		for _, a := range []int{0, 1, 100} {
			plain, aad := random(n), random(a)
			out, err := key.Encrypt(ctx, []byte("head"), plain, aad)
			require.NoError(t, err)
			require.Equal(t, "head", string(out[:4]))
			require.Len(t, out, 4+n+hsm.Overhead)
			iv := string(out[4:16])
			require.False(t, seen[iv], "IVs are random")
			seen[iv] = true
			opened, err := gcm.Open(nil, out[4:16], out[16:], aad)
			require.NoError(t, err)
			require.Equal(t, string(plain), string(opened))
			back, err := key.Decrypt(ctx, []byte("head"), out[4:], aad)
			require.NoError(t, err)
			require.Equal(t, "head"+string(plain), string(back))
		}
	}
	require.NoError(t, key.Close())
}

func TestDecryptRefuses(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	key, other := b.opened(t, random(32)), b.opened(t, random(32))
	good, err := key.Encrypt(ctx, nil, []byte("plaintext"), []byte("aad"))
	require.NoError(t, err)
	refuse := func(k *hsm.Key, ct []byte, aad string) {
		t.Helper()
		out, err := k.Decrypt(ctx, nil, ct, []byte(aad))
		require.ErrorIs(t, err, hsm.ErrAuthentication)
		require.Nil(t, out)
	}
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1
		refuse(key, bad, "aad")
		refuse(key, good[:i], "aad")
	}
	refuse(key, append(append([]byte(nil), good...), 0), "aad")
	refuse(key, good, "")
	refuse(key, good, "aae")
	refuse(key, nil, "aad")
	refuse(other, good, "aad")
	back, err := key.Decrypt(ctx, nil, good, []byte("aad"))
	require.NoError(t, err)
	require.Equal(t, "plaintext", string(back))
	require.NoError(t, key.Close())
	require.NoError(t, other.Close())
}

func TestClosedKey(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	key := b.opened(t, random(32))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				if _, err := key.Encrypt(ctx, nil, []byte("x"), nil); err != nil {
					if fmt.Sprint(err) != fmt.Sprint(hsm.ErrKeyLost) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	require.NoError(t, key.Close())
	wg.Wait()
	require.NoError(t, key.Close())
	_, err := key.Decrypt(ctx, nil, make([]byte, 40), nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)
}

func TestMAC(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	part := func(s ...string) (out [][]byte) {
		for _, p := range s {
			out = append(out, []byte(p))
		}
		return out
	}
	seen := map[[32]byte]string{}
	for _, c := range []struct {
		domain string
		parts  [][]byte
	}{
		{"d", nil},
		{"d", part("")},
		{"d", part("", "")},
		{"d", part("ab")},
		{"d", part("a", "b")},
		{"d", part("", "ab")},
		{"da", part("b")},
		{"", part("dab")},
		{"dab", nil},
		{"e", part("ab")},
	} {
		mac, err := b.token.MAC(ctx, c.domain, c.parts...)
		require.NoError(t, err)
		name := fmt.Sprintf("%q %q", c.domain, c.parts)
		require.Empty(t, seen[mac], name)
		seen[mac] = name
		require.NoError(t, b.token.VerifyMAC(ctx, mac[:], c.domain, c.parts...))
		for _, wrong := range [][]byte{nil, mac[:31], append(mac[:], 0), make([]byte, 32)} {
			require.ErrorIs(t, b.token.VerifyMAC(ctx, wrong, c.domain, c.parts...), hsm.ErrUntrusted)
		}
	}
	one, err := b.token.Random(ctx, 32)
	require.NoError(t, err)
	two, err := b.token.Random(ctx, 32)
	require.NoError(t, err)
	require.NotEqual(t, one, two)
}
