package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/softhsm"
)

// Of TestTiming.
const (
	timingEnv     = "KEYFERRY_TIMING"       // 1: measure
	timingTries   = "KEYFERRY_TIMING_TRIES" // of each class; 1,000 if unset
	timingWorkers = 16
	perToken      = 96 // tries by one import token, of a budget of 100
	timingAlpha   = 0.001
)

// The time of an answer tells classes of blobs apart no better than chance.
// Classes come in random order, so that a machine that is slow for a while is
// slow for all of them; the times of each are compared with those of all others
// by two tests, and what they find is corrected for how often they are asked.
//
// The server answers a refusal at the next multiple of a tenth of a second. So
// most times are alike but for the scheduling, and what could show is work so
// different that it needs another tenth more often.
func TestTiming(t *testing.T) {
	if os.Getenv(timingEnv) != "1" {
		t.Skip(`statistics of answer times need a quiet machine for minutes: "make test-timing" takes them`)
	}
	tries := 1000
	if text := os.Getenv(timingTries); text != "" {
		var err error
		tries, err = strconv.Atoi(text)
		require.NoError(t, err)
	}
	modules, err := softhsm.Modules()
	require.NoError(t, err)
	for _, module := range modules { // one after the other
		t.Run(filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(module)))), func(t *testing.T) {
			t.Logf("the module is %s", module)
			dir := t.TempDir()
			require.NoError(t, startDevServer(t, dir, "--module", module).stop())
			for _, algorithm := range algorithms {
				t.Run(algorithm, func(t *testing.T) { measure(t, dir, algorithm, tries) })
			}
		})
	}
}

// withOutstanding sets how many pairs there may be before they are shared:
// those of PKCS #1 v1.5 never are.
func withOutstanding(t *testing.T, dir string, n int) {
	t.Helper()
	configure(t, dir, func(cfg *config) {
		cfg.Pairs = pairsConfig{Specs: []hsm.PairSpec{hsm.RSA2048, hsm.ECSM2}, Ready: 1, Outstanding: n}
	})
}

// measure takes the times of an algorithm's probes and compares them.
func measure(t *testing.T, dir, algorithm string, tries int) {
	if algorithm == byok.PKCS1v15 {
		withOutstanding(t, dir, 1000)
	} else {
		withOutstanding(t, dir, 1)
	}
	s := startDevServer(t, dir)
	defer func() { require.NoError(t, s.stop()) }()
	c := newCustomerOf(t, s.client(t), byok.AES256)
	if !c.ask(t, algorithm) {
		return // it was said why
	}
	_, probes := probesOf(t, c, algorithm)
	times := make([][]float64, len(probes)) // in milliseconds
	rounds := make(chan []string)           // signed queries, one of each class in its place
	var mu sync.Mutex
	var wg sync.WaitGroup
	errs := make([]error, timingWorkers)
	for i := range timingWorkers {
		wg.Go(func() {
			client := &http.Client{Transport: &http.Transport{Proxy: nil}}
			for round := range rounds {
				for _, class := range rand.Perm(len(round)) {
					took, err := timed(client, s.endpoint, round[class])
					if err != nil {
						errs[i] = err
						continue
					}
					mu.Lock()
					times[class] = append(times[class], took)
					mu.Unlock()
				}
			}
		})
	}
	for n := range tries {
		if n%(perToken/len(probes)) == 0 && n > 0 {
			require.True(t, c.ask(t, algorithm))
			_, probes = probesOf(t, c, algorithm)
		}
		round := make([]string, len(probes))
		for class, p := range probes {
			round[class] = c.rpcQuery(t, "ImportKeyMaterial", c.expecting(t, p.make()))
		}
		rounds <- round
	}
	close(rounds)
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	compare(t, probes, times)
}

// timed is how long an answer takes, to its first byte.
func timed(client *http.Client, endpoint, query string) (milliseconds float64, err error) {
	start := time.Now()
	res, err := client.Post("http://"+endpoint+"/?"+query, "", http.NoBody)
	took := time.Since(start)
	if err != nil {
		return 0, err
	}
	body, err := io.ReadAll(res.Body)
	if err = errors.Join(err, res.Body.Close()); err != nil {
		return 0, err
	}
	if res.StatusCode != http.StatusBadRequest {
		return 0, fmt.Errorf("%s: %s", res.Status, body)
	}
	return float64(took) / float64(time.Millisecond), nil
}

// compare tells what it found, and fails the test for a difference.
func compare(t *testing.T, probes []probe, times [][]float64) {
	t.Helper()
	tests := float64(2 * len(probes))
	smallest := 1.0
	t.Logf("%-48s %5s %8s %8s %8s %7s %8s %8s", "milliseconds", "tries", "10%", "median", "90%", "KS D", "KS p", "MW p")
	others := func(class int) []float64 {
		return slices.Concat(slices.Concat(times[:class]...), slices.Concat(times[class+1:]...))
	}
	for class, p := range probes {
		d, ks := kolmogorovSmirnov(times[class], others(class))
		_, mw := mannWhitney(times[class], others(class))
		sorted := slices.Sorted(slices.Values(times[class]))
		t.Logf("%-48s %5d %8.2f %8.2f %8.2f %7.4f %8.5f %8.5f", p.name, len(sorted),
			quantile(sorted, 0.1), quantile(sorted, 0.5), quantile(sorted, 0.9), d, ks, mw)
		smallest = min(smallest, ks, mw)
	}
	corrected := min(1, smallest*tests)
	t.Logf("the smallest p of %g is %.5f, corrected %.4f: a difference is called one below %g", tests, smallest, corrected, timingAlpha)

	// What would have been found: a class that is so much slower.
	for shift := 0.01; ; shift *= 1.5 {
		slower := slices.Clone(times[0])
		for i := range slower {
			slower[i] += shift
		}
		_, ks := kolmogorovSmirnov(slower, others(0))
		_, mw := mannWhitney(slower, others(0))
		if min(ks, mw)*tests < timingAlpha {
			t.Logf("a difference of %.2f ms would have been found", shift)
			break
		}
		require.Less(t, shift, 100.0, "this machine is too noisy to find anything")
	}
	require.GreaterOrEqual(t, corrected, timingAlpha, "the times tell the probes apart")
}
