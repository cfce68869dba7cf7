package storetest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
)

// reporters is how many goroutines of Report write at once.
const reporters = 6

// Report writes to s until the process is killed or a write fails, and one
// line to w for each write that was acknowledged. CheckReport reads the lines.
//
// The life of a key in a report: created, updated three times with a receipt
// each, given an import token with two failures and a usage; every third one is
// deleted then, with another receipt.
func Report(ctx context.Context, s store.Store, w io.Writer) error {
	boot, err := s.NextBoot(ctx) // no two reports on one database are alike
	if err != nil {
		return err
	}
	var mu sync.Mutex
	say := func(format string, args ...any) error {
		mu.Lock()
		defer mu.Unlock()
		_, err := fmt.Fprintf(w, format+"\n", args...)
		return err
	}
	if err := say("boot %d", boot); err != nil {
		return err
	}
	failed := make(chan error, reporters)
	for r := range reporters {
		go func() {
			var err error
			for n := r; err == nil; n += reporters {
				err = reportKey(ctx, s, int(boot)*1_000_000+n, say)
			}
			failed <- err
		}()
	}
	for range reporters {
		err = <-failed
	}
	return err
}

// reportKey is the life of key n.
func reportKey(ctx context.Context, s store.Store, n int, say func(string, ...any) error) error {
	key := newKey(n)
	err := s.CreateKey(ctx, key)
	for range 3 {
		if err == nil {
			err = say("key %d %d", n, key.Revision)
		}
		key = imported(key)
		if err == nil {
			err = s.UpdateKey(ctx, store.Update{Key: key, Receipt: newReceipt(key)})
		}
	}
	if err == nil {
		err = say("key %d %d", n, key.Revision)
	}
	if err == nil {
		err = s.AddPair(ctx, newPair(n))
	}
	if err == nil {
		_, err = s.BindPair(ctx, newBind(n, key))
	}
	if err == nil {
		err = say("token %d 0", n)
	}
	for failure := 1; failure <= 2; failure++ {
		if err == nil {
			_, err = s.CountFailure(ctx, id16(1000+n))
		}
		if err == nil {
			err = say("token %d %d", n, failure)
		}
	}
	if err == nil {
		_, err = s.PutUsages(ctx, []store.UsageUpdate{{Usage: store.Usage{KeyID: key.KeyID, Uses: uint64(n), MAC: fill(32, n)}}})
	}
	if err == nil {
		err = say("usage %d 0", n)
	}
	if err == nil {
		_, err = s.AddNonce(ctx, newNonce(n), at(0))
	}
	if err == nil {
		err = say("nonce %d 0", n)
	}
	if err == nil && n%3 == 0 {
		gone := store.Deletion{KeyID: key.KeyID, Revision: key.Revision, Receipt: newReceipt(imported(key))}
		if err = s.DeleteKey(ctx, gone); err == nil {
			err = say("deleted %d 0", n)
		}
	}
	return err
}

// CheckReport requires of the store that everything acknowledged in a report
// is there, at most one step further: the write that was under way when the
// process died. A last line without an end is no acknowledgement.
func CheckReport(t *testing.T, s store.Store, report []byte) {
	t.Helper()
	last := map[int]map[string]int{} // by key number: the last number said of each word
	lines := bufio.NewScanner(bytes.NewReader(wholeLines(report)))
	for lines.Scan() {
		var word string
		var n, m int
		if _, err := fmt.Sscanf(lines.Text(), "boot %d", &n); err == nil {
			continue
		}
		_, err := fmt.Sscanf(lines.Text(), "%s %d %d", &word, &n, &m)
		require.NoError(t, err, lines.Text())
		if last[n] == nil {
			last[n] = map[string]int{}
		}
		last[n][word] = m
	}
	require.NoError(t, lines.Err())
	for n, said := range last {
		checkKey(t, s, n, said)
	}
}

func checkKey(t *testing.T, s store.Store, n int, said map[string]int) {
	t.Helper()
	ctx := t.Context()
	if _, ok := said["nonce"]; ok {
		fresh, err := s.AddNonce(ctx, newNonce(n), at(1))
		require.NoError(t, err)
		require.False(t, fresh, "nonce %d was acknowledged", n)
	}
	_, receipts, err := s.KeyReceipts(ctx, newKey(n).KeyID, 0, 0)
	require.NoError(t, err)
	key, token, err := s.LoadImport(ctx, newKey(n).KeyID, id16(1000+n))
	if err != nil {
		require.Contains(t, []int{0, 4}, receipts, "key %d", n)
	} else {
		require.EqualValues(t, key.Revision-1, receipts, "of key %d, one for each update", n)
	}
	if _, ok := said["deleted"]; ok {
		require.ErrorIs(t, err, store.ErrNotFound, "key %d was deleted", n)
		return
	}
	if _, ok := said["nonce"]; ok && n%3 == 0 && err != nil {
		require.ErrorIs(t, err, store.ErrNotFound, "key %d was being deleted", n)
		return
	}
	require.NoError(t, err, "key %d was acknowledged", n)
	want := newKey(n)
	for want.Revision < key.Revision {
		want = imported(want)
	}
	require.Equal(t, want, key, "key %d is half written", n)
	require.GreaterOrEqual(t, int(key.Revision), said["key"])
	require.LessOrEqual(t, int(key.Revision), said["key"]+1)
	if failures, ok := said["token"]; ok {
		require.Equal(t, id16(1000+n), token.ID, "token %s was acknowledged", hex.EncodeToString(token.ID[:]))
		require.GreaterOrEqual(t, token.Failures, failures)
		require.LessOrEqual(t, token.Failures, failures+1)
		require.False(t, token.Pair.BoundAt.IsZero())
	}
	if _, ok := said["usage"]; ok {
		usage, err := s.Usage(ctx, key.KeyID)
		require.NoError(t, err)
		require.EqualValues(t, n, usage.Uses)
	}
}
