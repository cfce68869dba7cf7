package hsm_test

import (
	"context"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
)

// What is compared with the operations of a Token must be the very calls that
// they make.
func TestBareMakesTheSameCalls(t *testing.T) {
	x := newBench(t, hsm.OAEPSHA1)
	ctx := context.Background()
	req := x.request(x.wrap(t, random(32)))
	material := x.imported(t, random(32)).Material
	key, err := x.token.OpenMaterial(ctx, material)
	require.NoError(t, err)
	bare, err := x.token.Bare(ctx)
	require.NoError(t, err)
	var iv [12]byte
	aad := random(100)
	sealed, err := key.Encrypt(ctx, nil, random(64), aad)
	require.NoError(t, err)

	tap := hsmtest.On(t, x.soft.Module)
	calls := func(do func() error) []string {
		tap.Reset()
		require.NoError(t, do())
		return slices.DeleteFunc(tap.Sequence(), func(call string) bool { return call == "C_OpenSession" }) // of the pool
	}
	for name, pair := range map[string]struct{ bare, ours func() error }{
		"import": {
			func() error { return bare.Import(x.pair.ID, req.Wrapped, req.Context) },
			func() error { _, err := x.token.Import(ctx, req); return err },
		},
		"MAC": {
			func() error { return bare.MAC(aad) },
			func() error { _, err := x.token.MAC(ctx, "test", aad); return err },
		},
		"open": {
			func() error { return bare.Open(material) },
			func() error {
				k, err := x.token.OpenMaterial(ctx, material)
				if err == nil {
					err = k.Close()
				}
				return err
			},
		},
		"encrypt": {
			func() error { return bare.Encrypt(key, &iv, aad, aad) },
			func() error { _, err := key.Encrypt(ctx, nil, aad, aad); return err },
		},
		"decrypt": {
			func() error { return bare.Decrypt(key, sealed, aad) },
			func() error { _, err := key.Decrypt(ctx, nil, sealed, aad); return err },
		},
	} {
		require.Equal(t, calls(pair.ours), calls(pair.bare), name)
	}
	require.Equal(t, []string{"C_UnwrapKey", "C_DestroyObject"}, calls(func() error { return bare.Unwrap(x.pair.ID, req.Wrapped) }))
	require.NoError(t, bare.Close())
	require.NoError(t, key.Close())
}
