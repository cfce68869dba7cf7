package engine

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestAuthorityRemembers(t *testing.T) {
	a := newAuthority(nil, 3)
	record := func(i int) [32]byte { return digest("domain", fmt.Append(nil, i), []byte("mac")) }
	for i := range 3 {
		a.remember(record(i))
	}
	for i := 3; i < 6; i++ {
		a.remember(record(i))
		require.True(t, a.knows(record(0)), "it is asked for all the time")
	}
	require.False(t, a.knows(record(1)))
	require.LessOrEqual(t, len(a.young)+len(a.old), 2*a.size)
}

// What is remembered is the whole of domain, record and MAC.
func TestDigests(t *testing.T) {
	seen := make(map[[32]byte]string)
	for _, parts := range [][3]string{
		{"a", "b", "c"},
		{"ab", "", "c"},
		{"", "ab", "c"},
		{"a", "bc", ""},
		{"a", "", "bc"},
		{"a", "b", ""},
		{"a", "b", "d"},
	} {
		d := digest(parts[0], []byte(parts[1]), []byte(parts[2]))
		require.Empty(t, seen[d])
		seen[d] = fmt.Sprint(parts)
	}
}
