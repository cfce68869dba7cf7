package engine_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
)

// Of several first imports of different materials at once exactly one wins,
// and the others are told what a later one would be.
func TestFirstImportsAtOnce(t *testing.T) {
	h := newHouse(t)
	for range 10 {
		keyID := h.newKey(t, engine.AliyunAES256)
		params := h.parameters(t, keyID)
		materials := make([][]byte, 4)
		for i := range materials {
			materials[i] = randomBytes(32)
		}
		answers := inParallel(len(materials), func(i int) error {
			_, err := h.ImportKeyMaterial(t.Context(), input(t, params, materials[i]))
			return err
		})
		winner := slices.Index(answers, nil)
		require.GreaterOrEqual(t, winner, 0)
		for i, err := range answers {
			if i != winner {
				require.Equal(t, refused, err)
			}
		}
		_, err := h.ImportKeyMaterial(t.Context(), input(t, params, materials[winner]))
		require.NoError(t, err)
	}
}

// Many imports of the same material at once all succeed.
func TestSameImportsAtOnce(t *testing.T) {
	h := newHouse(t)
	keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
	params := h.parameters(t, keyID)
	for _, err := range inParallel(12, func(int) error {
		_, err := h.ImportKeyMaterial(t.Context(), input(t, params, material))
		return err
	}) {
		require.NoError(t, err)
	}
}

// Once a change has returned nobody who starts then uses what was before, not
// even while others use it as hard as they can.
func TestNoUseAfterAChange(t *testing.T) {
	h := newHouse(t)
	c := newCustomer(t, h)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, err := h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
				if kind := kindOf(err); kind != "" && kind != engine.KeyDisabled && kind != engine.KeyPendingImport {
					t.Errorf("encrypt: %v", err)
				}
				_, err = h.Decrypt(t.Context(), c.blob, nil)
				if kind := kindOf(err); kind != "" && kind != engine.KeyDisabled && kind != engine.KeyPendingImport {
					t.Errorf("decrypt: %v", err)
				}
			}
		})
	}
	for i := range 60 {
		switch i % 3 {
		case 0:
			require.NoError(t, h.DisableKey(t.Context(), c.keyID))
			_, err := h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
			requireKind(t, engine.KeyDisabled, err)
			require.NoError(t, h.EnableKey(t.Context(), c.keyID))
		case 1:
			require.NoError(t, h.DeleteKeyMaterial(t.Context(), c.keyID))
			_, err := h.Decrypt(t.Context(), c.blob, nil)
			requireKind(t, engine.KeyPendingImport, err)
			_, err = h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
			require.NoError(t, err)
		case 2:
			in := input(t, c.params, c.material)
			in.ExpireAt = h.clock.in(time.Second)
			_, err := h.ImportKeyMaterial(t.Context(), in)
			require.NoError(t, err)
			h.clock.advance(time.Second)
			_, err = h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
			requireKind(t, engine.KeyPendingImport, err)
			_, err = h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
			require.NoError(t, err)
		}
		h.requireDecrypts(t, c.blob, "secret")
	}
	close(stop)
	wg.Wait()
}

// Everything at once, over few keys and a cache that is too small for them:
// each CMK ends as what was last done to it, its ciphertexts open, and every
// answer is one that the state table knows.
func TestEverythingAtOnce(t *testing.T) {
	h := newHouse(t, with(func(c *engine.Config) {
		c.CacheSize, c.ManualSweep, c.SweepInterval = 2, false, time.Millisecond
	}))
	customers := make([]*customer, 5)
	for i := range customers {
		customers[i] = newCustomer(t, h)
	}
	var done atomic.Int64
	work := func(worker uint64) error {
		random := rand.New(rand.NewPCG(worker, 1))
		for range 60 {
			c := customers[random.IntN(len(customers))]
			action := actions[random.IntN(len(actions))]
			switch err := action.do(t, h, c); kindOf(err) {
			case "", engine.StateModified, engine.KeyDisabled, engine.KeyPendingDeletion, engine.KeyPendingImport:
				done.Add(1)
			default:
				return fmt.Errorf("%s: %w", action.name, err)
			}
		}
		return nil
	}
	for _, err := range inParallel(8, func(i int) error { return work(uint64(i)) }) {
		require.NoError(t, err)
	}
	require.EqualValues(t, 8*60, done.Load())
	for _, c := range customers {
		if h.describe(t, c.keyID).State == engine.PendingDeletion {
			require.NoError(t, h.CancelKeyDeletion(t.Context(), c.keyID))
		}
		if h.describe(t, c.keyID).State == engine.Disabled {
			require.NoError(t, h.EnableKey(t.Context(), c.keyID))
		}
		_, err := h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
		require.NoError(t, err)
		h.requireDecrypts(t, c.blob, "secret")
	}
}
