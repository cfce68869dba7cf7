package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/receipt"
)

// The entry of a deletion has the material id of the import, and shows no
// import.
func TestDeletionIsNoImport(t *testing.T) {
	o := verifyOptions{materialID: "01" + strings.Repeat("00", 31)}
	checks, err := o.expectations(nil)
	require.NoError(t, err)
	for kind, want := range map[receipt.Kind]error{receipt.Import: nil, receipt.Deletion: errOther} {
		var got error
		for _, check := range checks {
			got = errors.Join(got, check(receipt.Entry{Kind: kind, MaterialID: [32]byte{1}}))
		}
		require.ErrorIs(t, got, want, kind)
	}
}
