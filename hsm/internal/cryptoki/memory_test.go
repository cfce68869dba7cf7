package cryptoki

import (
	"math"
	"testing"
)

// What is no number of bytes is nothing, and never a token that is full.
func TestMemory(t *testing.T) {
	for _, c := range []struct{ free, total, wantFree, wantTotal uint64 }{
		{math.MaxUint64, math.MaxUint64, 0, 0}, // CK_UNAVAILABLE_INFORMATION
		{math.MaxUint32, math.MaxUint32, 0, 0},
		{math.MaxUint64, 1 << 20, 0, 0},
		{1 << 10, math.MaxUint32, 0, 0},
		{0, 0, 0, 0},
		{1, 1, 0, 0},
		{1 << 21, 1 << 20, 0, 0},
		{0, 1 << 20, 0, 1 << 20},
		{3 << 19, 1 << 21, 3 << 19, 1 << 21},
	} {
		if free, total := memory(c.free, c.total); free != c.wantFree || total != c.wantTotal {
			t.Errorf("memory(%d, %d) = %d, %d, not %d, %d", c.free, c.total, free, total, c.wantFree, c.wantTotal)
		}
	}
}
