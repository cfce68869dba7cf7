package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// memory is what a process holds at one moment: as much as a core file would,
// in two parts.
type memory struct {
	// golang is the heap of Go, with the stacks of goroutines, and the
	// variables of the program: all that is the server's own.
	golang []segment
	// c is everything else that can be written to. The token's library lives
	// there, with the keys of a software token in the clear while it uses them,
	// and SQLite's pages, which the files of the database show as well.
	c []segment
}

type segment struct {
	name    string
	content []byte
}

// farOff is how far the heap of Go is from everything that C has mapped. The
// runtime of Go puts it where nothing else is, at a place of its own choice.
const farOff = 1 << 32

// mapping is a line of /proc/PID/maps.
type mapping struct {
	start, end         uint64
	mode, device, path string
	offset, inode      uint64
}

func mappingsOf(t testing.TB, pid int) (all []mapping) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	require.NoError(t, err)
	for line := range strings.Lines(string(maps)) {
		var m mapping
		n, err := fmt.Sscanf(line, "%x-%x %s %x %s %d %s", &m.start, &m.end, &m.mode, &m.offset, &m.device, &m.inode, &m.path)
		require.GreaterOrEqual(t, n, 6, "%q: %v", line, err)
		all = append(all, m)
	}
	return all
}

// ofC tells which mappings are those of C: the ones with a name, the libraries
// with their heap and stack, and whatever is not far off from one of C.
func ofC(all []mapping, exe string) map[int]bool {
	c := map[int]bool{}
	for grown := true; grown; {
		grown = false
		for i, m := range all {
			if c[i] || m.path == exe {
				continue
			}
			near := m.path != ""
			for j := range c {
				near = near || m.start < all[j].end+farOff && all[j].start < m.end+farOff
			}
			if near {
				c[i], grown = true, true
			}
		}
	}
	return c
}

// memoryOf stops a process, which a child of this one must be, and reads what
// it holds. Pages that hold nothing but zeros are left out.
func memoryOf(t testing.TB, pid int) (m memory) {
	t.Helper()
	require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
	defer func() { require.NoError(t, syscall.Kill(pid, syscall.SIGCONT)) }()
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	require.NoError(t, err)
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	require.NoError(t, err, "reading the memory of a child needs the rights of a debugger")
	defer func() { require.NoError(t, mem.Close()) }()
	all := mappingsOf(t, pid)
	c := ofC(all, exe)
	for i := range all {
		this := &all[i]
		if !strings.HasPrefix(this.mode, "rw") {
			continue
		}
		s := segment{fmt.Sprintf("%x-%x %s", this.start, this.end, this.path), read(mem, this.start, this.end)}
		// The variables without a value of the program follow those with one.
		variables := this.path == exe || i > 0 && all[i-1].path == exe && this.path == ""
		if variables || !c[i] {
			m.golang = append(m.golang, s)
		} else {
			m.c = append(m.c, s)
		}
	}
	require.NotEmpty(t, m.golang)
	require.NotEmpty(t, m.c)
	return m
}

// read returns the pages of a mapping that hold anything. Pages that cannot be
// read, of which the race detector has some, hold nothing.
func read(mem io.ReaderAt, start, end uint64) []byte {
	const page, most = 4096, 1 << 20
	var content bytes.Buffer
	zero := make([]byte, page)
	chunk := make([]byte, most)
	for at := start; at < end; at += most {
		n, err := mem.ReadAt(chunk[:min(most, end-at)], int64(at))
		if err != nil && n == 0 {
			continue
		}
		for i := 0; i < n; i += page {
			if p := chunk[i:min(i+page, n)]; !bytes.Equal(p, zero[:len(p)]) {
				content.Write(p)
			}
		}
	}
	return content.Bytes()
}
