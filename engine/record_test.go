package engine

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// Two sequences of fields never make the same record.
func TestRecordIsInjective(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 5), 0, 4)
		a, b := values.Draw(t, "a"), values.Draw(t, "b")
		require.Equal(t, equalFields(a, b), bytes.Equal(recordOf(a), recordOf(b)))

		read := readFields(recordOf(a))
		for _, value := range a {
			require.Equal(t, string(value), string(read.next()))
		}
		require.True(t, read.end())
	})
}

func TestRecordOfTimes(t *testing.T) {
	none := appendTime(nil, time.Time{})
	epoch := appendTime(nil, time.Unix(0, 0))
	require.NotEqual(t, none, epoch, "no time is not 1970")

	read := readFields(epoch)
	require.True(t, read.time().Equal(time.Unix(0, 0)))
	require.True(t, read.end())
}

func TestRecordCutShort(t *testing.T) {
	whole := appendField(appendField(nil, "one"), "two")
	for n := range whole {
		read := readFields(whole[:n])
		read.next()
		read.next()
		require.False(t, read.end(), "%d bytes", n)
	}
	read := readFields(append(whole, 0))
	read.next()
	read.next()
	require.False(t, read.end(), "one byte too many")
}

func recordOf(values [][]byte) []byte {
	var record []byte
	for _, value := range values {
		record = appendField(record, value)
	}
	return record
}

func equalFields(a, b [][]byte) bool {
	return slices.EqualFunc(a, b, bytes.Equal)
}
