package engine_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// residentKeys is over how many CMKs BenchmarkCustody goes: what a small HSM
// holds beside its other objects.
const residentKeys = 200

// BenchmarkCustody measures, of CMKs in each custody, a durable import, which is
// one of the same material again, and the encryption of 64 bytes. What the bare
// calls of the token cost is in BenchmarkEngine.
func BenchmarkCustody(b *testing.B) {
	for _, custody := range []hsm.Custody{hsm.Sealed, hsm.Resident} {
		if err := plainToken().Keeps(custody, hsm.AES256); err != nil {
			b.Logf("not measured: %v", err)
			continue
		}
		h := newHouse(b, with(func(c *engine.Config) { c.Custody, c.Now, c.ManualSweep = custody, time.Now, false }))
		imports := make([]engine.ImportInput, residentKeys)
		for i := range imports {
			imports[i] = input(b, h.parameters(b, h.newKey(b, engine.AliyunAES256)), randomBytes(32))
			_, err := h.ImportKeyMaterial(b.Context(), imports[i])
			require.NoError(b, err)
		}
		var next atomic.Int64
		for name, work := range map[string]func(in *engine.ImportInput) error{
			"import": func(in *engine.ImportInput) error {
				_, err := h.ImportKeyMaterial(b.Context(), *in)
				return err
			},
			"encrypt-64B": func(in *engine.ImportInput) error {
				_, err := h.Encrypt(b.Context(), in.KeyID, make([]byte, 64), nil)
				return err
			},
		} {
			for _, callers := range []int{1, 8} {
				b.Run(fmt.Sprintf("%s/%s/%d", name, custody, callers), func(b *testing.B) {
					b.SetParallelism(callers)
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							if err := work(&imports[next.Add(1)%residentKeys]); err != nil {
								b.Error(err)
							}
						}
					})
				})
			}
		}
	}
}
