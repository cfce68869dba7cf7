package main

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

var errExpire = errors.New("neither a time nor a duration")

// parseExpire reads a time in RFC 3339 or a duration from now, in days if it
// ends in d. Nothing is never. The answer is in whole seconds, rounded down.
func parseExpire(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		var d time.Duration
		if d, err = parseDuration(s); err == nil {
			at = now.Add(d)
		}
	}
	switch {
	case err != nil:
		return time.Time{}, withHint(usage("--expire %q is neither a time nor a duration", s),
			"give a time as 2027-01-31T00:00:00Z, or a duration from now as 90d or 12h")
	case !at.After(now):
		return time.Time{}, withHint(usage("--expire %s is not in the future", s), "to make material go now, delete it in the KMS")
	}
	return at.UTC().Truncate(time.Second), nil
}

func parseDuration(s string) (time.Duration, error) {
	days, ok := strings.CutSuffix(s, "d")
	if !ok {
		return time.ParseDuration(s)
	}
	const day = 24 * time.Hour
	n, err := strconv.ParseInt(days, 10, 64)
	if err != nil || n < 0 || n > int64(math.MaxInt64/day) {
		return 0, errExpire
	}
	return time.Duration(n) * day, nil
}
