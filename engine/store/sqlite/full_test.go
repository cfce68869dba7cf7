package sqlite_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/engine/store/storetest"
)

func init() { children["full"] = fullChild }

// fillUp creates keys from several callers until each has been refused, and
// returns the numbers of those that were acknowledged.
func fillUp(ctx context.Context, s *sqlite.Store) (created []int, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for caller := range 8 {
		wg.Go(func() {
			for n := caller; ; n += 8 {
				e := s.CreateKey(ctx, storetest.BenchKey(n))
				mu.Lock()
				switch {
				case e == nil:
					created = append(created, n)
				case !errors.Is(e, store.ErrUnavailable):
					err = errors.Join(err, e)
				}
				mu.Unlock()
				if e != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return created, err
}

// checkFull requires of a full store that it has what was acknowledged, and
// nothing else.
func checkFull(ctx context.Context, s *sqlite.Store, created []int) error {
	for _, n := range created {
		if _, err := s.Key(ctx, storetest.BenchKey(n).KeyID); err != nil {
			return fmt.Errorf("key %d was acknowledged: %w", n, err)
		}
	}
	_, total, err := s.ListKeys(ctx, store.KeyFilter{}, 0, 0)
	if err == nil && total != len(created) {
		err = fmt.Errorf("%d keys were acknowledged and %d are there", len(created), total)
	}
	return err
}

// TestFull fills a database of bounded size.
func TestFull(t *testing.T) {
	path := newPath(t)
	s, err := sqlite.Open(t.Context(), sqlite.Config{Path: path, MaxSize: 512 << 10})
	require.NoError(t, err)
	created, err := fillUp(t.Context(), s)
	require.NoError(t, err)
	require.Greater(t, len(created), 100)
	require.NoError(t, checkFull(t.Context(), s, created))
	require.ErrorIs(t, s.AddPair(t.Context(), store.Pair{ID: [16]byte{1}, Spec: string(make([]byte, 1<<20))}), store.ErrUnavailable)

	// What needs no room works, and makes room.
	for _, n := range created[:50] {
		require.NoError(t, s.DeleteKey(t.Context(), store.Deletion{KeyID: storetest.BenchKey(n).KeyID, Revision: 1}))
	}
	for _, n := range created[:20] {
		require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(n)))
	}
	require.NoError(t, s.Close())
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.LessOrEqual(t, info.Size(), int64(512<<10))
	requireSound(t, path)

	s = open(t, path) // no bound any more
	require.NoError(t, checkFull(t.Context(), s, append(created[50:], created[:20]...)))
	for n := range 100 {
		require.NoError(t, s.CreateKey(t.Context(), storetest.BenchKey(1_000_000+n)))
	}
	require.NoError(t, s.Close())
}

// TestDiskFull has the operating system refuse to let files grow, in a child
// process whose limit it is.
func TestDiskFull(t *testing.T) {
	path := newPath(t)
	cmd := storetest.Child(t, "full", path)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var created []int
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var n int
		_, err := fmt.Sscan(lines.Text(), &n)
		require.NoError(t, err)
		created = append(created, n)
	}
	require.NoError(t, cmd.Wait())
	require.Greater(t, len(created), 100)
	requireSound(t, path)
	s := open(t, path)
	require.NoError(t, checkFull(t.Context(), s, created))
	require.NoError(t, s.Close())
}

// fullChild fills the disk, checks, gets a larger disk and goes on. It prints
// the keys that are there in the end.
func fullChild(path string) error {
	ctx := context.Background()
	s, err := sqlite.Open(ctx, sqlite.Config{Path: path})
	if err != nil {
		return err
	}
	signal.Ignore(syscall.SIGXFSZ) // so that write fails with EFBIG
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	small := limit
	small.Cur = 1 << 20
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &small); err != nil {
		return err
	}
	created, err := fillUp(ctx, s)
	if err != nil {
		return err
	}
	// What is too large for the last bytes of the disk may have been several
	// writes together, so one by one a few more may fit.
	for n := 1_000_000; ; n++ {
		err := s.CreateKey(ctx, storetest.BenchKey(n))
		if errors.Is(err, store.ErrUnavailable) {
			break
		}
		if err != nil {
			return err
		}
		created = append(created, n)
	}
	if err := checkFull(ctx, s, created); err != nil {
		return err
	}

	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		return err
	}
	for n := 2_000_000; n < 2_000_100; n++ {
		if err := s.CreateKey(ctx, storetest.BenchKey(n)); err != nil {
			return err
		}
		created = append(created, n)
	}
	for _, n := range created {
		fmt.Println(n)
	}
	return s.Close()
}
