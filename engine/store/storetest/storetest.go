// Package storetest is what every store.Store must pass.
//
// An implementation's tests call Run with a function that opens a new, empty
// store, and RunReopened with one that opens the same database again and
// again. Report and CheckReport are the two halves of a test that kills a
// process while it writes. RunBenchmarks measures one.
package storetest

import (
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// Run tests the store that open returns. Every call of open must return a new,
// empty store, which Run closes.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	t.Helper()
	tests := []struct {
		name string
		test func(t *testing.T, s store.Store)
	}{
		{"CreateKey", testCreateKey},
		{"KeyValues", testKeyValues},
		{"UpdateKey", testUpdateKey},
		{"DeleteKey", testDeleteKey},
		{"ListKeys", testListKeys},
		{"ListKeysFollowsChanges", testListKeysFollowsChanges},
		{"ListOneMoment", testListOneMoment},
		{"DueKeys", testDueKeys},
		{"Pairs", testPairs},
		{"RetirePair", testRetirePair},
		{"DeletePair", testDeletePair},
		{"PairCounts", testPairCounts},
		{"BindPair", testBindPair},
		{"BindPairBound", testBindPairBound},
		{"BindPairShares", testBindPairShares},
		{"BindPairRefuses", testBindPairRefuses},
		{"LoadImport", testLoadImport},
		{"CountFailure", testCountFailure},
		{"Budget", testBudget},
		{"Residents", testResidents},
		{"HoldResidents", testHoldResidents},
		{"Usage", testUsage},
		{"Nonces", testNonces},
		{"Receipts", testReceipts},
		{"ExtendLog", testExtendLog},
		{"Boot", testBoot},
		{"Instance", testInstance},
		{"Lease", testLease},
		{"ConcurrentCreate", testConcurrentCreate},
		{"ConcurrentUpdate", testConcurrentUpdate},
		{"ConcurrentBind", testConcurrentBind},
		{"ConcurrentShare", testConcurrentShare},
		{"ConcurrentCounts", testConcurrentCounts},
		{"ConcurrentNonces", testConcurrentNonces},
		{"ConcurrentExtend", testConcurrentExtend},
		{"OneMoment", testOneMoment},
		{"ReadsOwnWrites", testReadsOwnWrites},
		{"CallersOwnSlices", testCallersOwnSlices},
		{"EndedContext", testEndedContext},
		{"GivenUp", testGivenUp},
		{"Closed", testClosed},
		{"CloseUnderLoad", testCloseUnderLoad},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // much of it is waiting for the disk
			s := open(t)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			tt.test(t, s)
		})
	}
	t.Run("InstancesDiffer", func(t *testing.T) { testInstancesDiffer(t, open) })
}

// base is an arbitrary moment that the tests count from.
var base = time.Date(2026, 11, 23, 14, 47, 0, 0, time.UTC)

// at is base and n seconds.
func at(n int) time.Time { return base.Add(time.Duration(n) * time.Second) }

// id16 is an identifier that stands for n.
func id16(n int) (id [16]byte) {
	binary.BigEndian.PutUint64(id[8:], uint64(n))
	id[0] = 0xa5
	return id
}

// fill is n bytes that depend on seed.
func fill(n, seed int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed*31 + i)
	}
	return b
}

// newKey is a CMK before its first import; n tells it from others.
func newKey(n int) store.Key {
	return store.Key{
		KeyID:        fmt.Sprintf("key-%06d", n),
		KeyVersionID: fmt.Sprintf("version-%06d", n),
		Revision:     1,
		Spec:         "Aliyun_AES_256",
		State:        "PendingImport",
		Description:  fmt.Sprintf("number %d, ключ 钥匙", n),
		CreatedAt:    at(n),
		MAC:          fill(32, n),
	}
}

// imported is the next revision of key, with every field set.
func imported(key store.Key) store.Key {
	n := int(key.Revision)
	key.Revision++
	key.State = "Enabled"
	key.DeleteAt = at(7 * 86400)
	key.KCV = fill(3, n+1)
	key.MaterialID = fill(32, n+2)
	key.CheckValueAlgorithm = "SHA_256"
	key.CheckValue = fill(32, n+3)
	key.Material = fill(120, n+4)
	key.ExpireAt = at(86400)
	key.WrappingAlgorithm = "RSAES_OAEP_SHA_256"
	key.PairID = fill(16, n+5)
	key.PairFingerprint = fill(32, n+6)
	key.Custody = "resident"
	key.Receipt = fill(32, n+8)
	key.MAC = fill(32, n+7)
	return key
}

// newPair is a pair that is ready.
func newPair(n int) store.Pair {
	p := store.Pair{ID: id16(n), Spec: "RSA_2048", Algorithm: "RSAES_OAEP_SHA_256", CreatedAt: at(n)}
	copy(p.Fingerprint[:], fill(32, n))
	return p
}

// newBind asks for a pair for token n of key at the moment at(n), without ever
// reaching a bound.
func newBind(n int, key store.Key) store.BindRequest {
	return store.BindRequest{
		TokenID:   id16(1000 + n),
		KeyID:     key.KeyID,
		Spec:      "RSA_2048",
		Algorithm: "RSAES_OAEP_SHA_256",
		Now:       at(n),
		ExpiresAt: at(n + 86400),
		Bound:     1 << 20,
	}
}

// create adds key to s.
func create(t *testing.T, s store.Store, key store.Key) store.Key {
	t.Helper()
	require.NoError(t, s.CreateKey(t.Context(), key))
	return key
}

// addPairs adds ready pairs number from to to, excluding to.
func addPairs(t *testing.T, s store.Store, from, to int) {
	t.Helper()
	for n := from; n < to; n++ {
		require.NoError(t, s.AddPair(t.Context(), newPair(n)))
	}
}

// bind binds a pair.
func bind(t *testing.T, s store.Store, req store.BindRequest) store.ImportToken {
	t.Helper()
	token, err := s.BindPair(t.Context(), req)
	require.NoError(t, err)
	return token
}

// requireKey requires that s has key, and just as it is.
func requireKey(t *testing.T, s store.Store, key store.Key) {
	t.Helper()
	got, err := s.Key(t.Context(), key.KeyID)
	require.NoError(t, err)
	require.Equal(t, key, got)
}

// ids are the identifiers of keys.
func ids(keys []store.Key) []string {
	list := make([]string, len(keys))
	for i, k := range keys {
		list[i] = k.KeyID
	}
	return list
}

// together calls do(0) to do(n-1) at once and returns their errors. The calls
// begin when all of their goroutines are there.
func together(n int, do func(i int) error) []error {
	errs := make([]error, n)
	start := make(chan struct{})
	done := make(chan struct{})
	for i := range n {
		go func() {
			defer func() { done <- struct{}{} }()
			<-start
			errs[i] = do(i)
		}()
	}
	close(start)
	for range n {
		<-done
	}
	return errs
}

// methods calls every method of a store that can fail, each on rows that
// exist as far as the fixture of prepare goes.
var methods = []struct {
	name string
	call func(ctx context.Context, s store.Store) error
}{
	{"CreateKey", func(ctx context.Context, s store.Store) error { return s.CreateKey(ctx, newKey(2)) }},
	{"Key", func(ctx context.Context, s store.Store) error {
		_, err := s.Key(ctx, newKey(1).KeyID)
		return err
	}},
	{"KeyByVersion", func(ctx context.Context, s store.Store) error {
		_, err := s.KeyByVersion(ctx, newKey(1).KeyVersionID)
		return err
	}},
	{"UpdateKey", func(ctx context.Context, s store.Store) error {
		return s.UpdateKey(ctx, store.Update{Key: imported(newKey(1))})
	}},
	{"DeleteKey", func(ctx context.Context, s store.Store) error {
		return s.DeleteKey(ctx, store.Deletion{KeyID: newKey(1).KeyID, Revision: 1})
	}},
	{"ListKeys", func(ctx context.Context, s store.Store) error {
		_, _, err := s.ListKeys(ctx, store.KeyFilter{}, 0, 10)
		return err
	}},
	{"DueKeys", func(ctx context.Context, s store.Store) error {
		_, err := s.DueKeys(ctx, at(0), 10)
		return err
	}},
	{"AddPair", func(ctx context.Context, s store.Store) error { return s.AddPair(ctx, newPair(3)) }},
	{"BindPair", func(ctx context.Context, s store.Store) error {
		_, err := s.BindPair(ctx, newBind(2, newKey(1)))
		return err
	}},
	{"LoadImport", func(ctx context.Context, s store.Store) error {
		_, _, err := s.LoadImport(ctx, newKey(1).KeyID, id16(1001))
		return err
	}},
	{"CountFailure", func(ctx context.Context, s store.Store) error {
		_, err := s.CountFailure(ctx, id16(1001))
		return err
	}},
	{"Pairs", func(ctx context.Context, s store.Store) error {
		_, err := s.Pairs(ctx, time.Time{}, 0)
		return err
	}},
	{"PairCounts", func(ctx context.Context, s store.Store) error {
		_, err := s.PairCounts(ctx, at(0))
		return err
	}},
	{"RetirePair", func(ctx context.Context, s store.Store) error { return s.RetirePair(ctx, id16(2), at(0)) }},
	{"DeletePair", func(ctx context.Context, s store.Store) error { return s.DeletePair(ctx, id16(2)) }},
	{"Log", func(ctx context.Context, s store.Store) error {
		_, err := s.Log(ctx)
		return err
	}},
	{"PendingReceipts", func(ctx context.Context, s store.Store) error {
		_, err := s.PendingReceipts(ctx, 10)
		return err
	}},
	{"ExtendLog", func(ctx context.Context, s store.Store) error {
		return s.ExtendLog(ctx, store.LogExtension{Head: []byte("head")})
	}},
	{"LogTiles", func(ctx context.Context, s store.Store) error {
		_, err := s.LogTiles(ctx, []store.Tile{{}})
		return err
	}},
	{"LogReceipts", func(ctx context.Context, s store.Store) error {
		_, err := s.LogReceipts(ctx, 0, 10)
		return err
	}},
	{"KeyReceipts", func(ctx context.Context, s store.Store) error {
		_, _, err := s.KeyReceipts(ctx, newKey(1).KeyID, 0, 10)
		return err
	}},
	{"ImportReceipt", func(ctx context.Context, s store.Store) error {
		_, err := s.ImportReceipt(ctx, newKey(1).KeyID, "")
		return err
	}},
	{"NextBoot", func(ctx context.Context, s store.Store) error {
		_, err := s.NextBoot(ctx)
		return err
	}},
	{"Usage", func(ctx context.Context, s store.Store) error {
		_, err := s.Usage(ctx, newKey(1).KeyID)
		return err
	}},
	{"PutUsages", func(ctx context.Context, s store.Store) error {
		_, err := s.PutUsages(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: newKey(1).KeyID, Uses: 9, Boot: 1, MAC: fill(32, 9)}, Was: 1}})
		return err
	}},
	{"AddNonce", func(ctx context.Context, s store.Store) error {
		_, err := s.AddNonce(ctx, newNonce(1), at(0))
		return err
	}},
	{"DeleteNonces", func(ctx context.Context, s store.Store) error { return s.DeleteNonces(ctx, at(9000)) }},
	{"Lease", func(ctx context.Context, s store.Store) error {
		_, err := s.Lease(ctx, "a lease", "me", time.Minute)
		return err
	}},
	{"Instance", func(ctx context.Context, s store.Store) error {
		_, err := s.Instance(ctx)
		return err
	}},
}

// prepare makes the rows that methods works on: key 1 with token 1001 and a
// usage, and pair 1, bound, and pair 2, ready.
func prepare(t *testing.T, s store.Store) {
	t.Helper()
	key := create(t, s, newKey(1))
	addPairs(t, s, 1, 3)
	bind(t, s, newBind(1, key))
	_, err := s.PutUsages(t.Context(), []store.UsageUpdate{{Usage: store.Usage{KeyID: key.KeyID, Uses: 1, Boot: 1, MAC: fill(32, 1)}}})
	require.NoError(t, err)
}
