package hsm_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

func TestMemory(t *testing.T) {
	token := softhsm.New(t, softhsm.WithKeys()).Open(t)
	m, err := token.Memory(t.Context())
	require.NoError(t, err)
	require.Zero(t, m, "SoftHSM2 says CK_UNAVAILABLE_INFORMATION")
	require.False(t, m.Low())
	require.NoError(t, token.Close())
	_, err = token.Memory(t.Context())
	require.ErrorIs(t, err, hsm.ErrClosed)

	require.True(t, hsm.Memory{Free: 19, Total: 100}.Low())
	require.False(t, hsm.Memory{Free: 20, Total: 100}.Low())
}
