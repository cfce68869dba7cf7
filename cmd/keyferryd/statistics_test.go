package main

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// kolmogorovSmirnov compares two samples: d is the greatest distance of their
// distributions, p how likely one as great is if both are of one distribution
// (asymptotically, with Stephens' correction).
func kolmogorovSmirnov(a, b []float64) (d, p float64) {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	i, j := 0, 0
	for i < len(a) && j < len(b) {
		x := min(a[i], b[j])
		for i < len(a) && a[i] == x {
			i++
		}
		for j < len(b) && b[j] == x {
			j++
		}
		d = max(d, math.Abs(float64(i)/float64(len(a))-float64(j)/float64(len(b))))
	}
	n := math.Sqrt(float64(len(a)) * float64(len(b)) / float64(len(a)+len(b)))
	lambda := (n + 0.12 + 0.11/n) * d
	if lambda < 0.2 {
		return d, 1 // where the series does not converge
	}
	sign := 2.0
	for k := 1.0; k <= 100; k++ {
		p += sign * math.Exp(-2*lambda*lambda*k*k)
		sign = -sign
	}
	return d, min(max(p, 0), 1)
}

// mannWhitney compares two samples by their ranks: p is how likely a difference
// as great is, to either side, if both are of one distribution (by the normal
// approximation, with the correction for ties).
func mannWhitney(a, b []float64) (z, p float64) {
	type ranked struct {
		value float64
		ofA   bool
	}
	all := make([]ranked, 0, len(a)+len(b))
	for _, v := range a {
		all = append(all, ranked{v, true})
	}
	for _, v := range b {
		all = append(all, ranked{v, false})
	}
	slices.SortFunc(all, func(x, y ranked) int {
		switch {
		case x.value < y.value:
			return -1
		case x.value > y.value:
			return 1
		}
		return 0
	})
	sum, ties := 0.0, 0.0
	for i := 0; i < len(all); {
		j := i
		for j < len(all) && all[j].value == all[i].value {
			j++
		}
		for _, r := range all[i:j] {
			if r.ofA {
				sum += float64(i+j+1) / 2
			}
		}
		t := float64(j - i)
		ties += t * (t*t - 1)
		i = j
	}
	m, n := float64(len(a)), float64(len(b))
	u := sum - m*(m+1)/2
	variance := m * n / 12 * (m + n + 1 - ties/((m+n)*(m+n-1)))
	if variance == 0 {
		return 0, 1
	}
	z = (u - m*n/2) / math.Sqrt(variance)
	return z, math.Erfc(math.Abs(z) / math.Sqrt2)
}

// quantile of a sorted sample.
func quantile(sorted []float64, q float64) float64 {
	return sorted[int(q*float64(len(sorted)-1))]
}

func TestStatistics(t *testing.T) {
	t.Parallel()
	// By hand: U is 6 where 10 of 20 is expected, and there are two ties, so that
	// z is -4/sqrt(20/12 * (10 - 12/72)).
	z, p := mannWhitney([]float64{1, 2, 4, 7}, []float64{2, 3, 4, 8, 9})
	require.InDelta(t, -0.98806, z, 1e-5)
	require.InDelta(t, 0.32312, p, 1e-4)
	d, p := kolmogorovSmirnov([]float64{1, 2, 3, 4}, []float64{3, 4, 5, 6})
	require.InDelta(t, 0.5, d, 1e-12)
	require.Greater(t, p, 0.3)

	// What is of one distribution is hardly ever told apart; what is not is.
	random := rand.New(rand.NewPCG(1, 2))
	sample := func(n int, shift float64) []float64 {
		s := make([]float64, n)
		for i := range s {
			s[i] = random.ExpFloat64() + shift
		}
		return s
	}
	const runs = 200
	unlikely := 0
	for range runs {
		a, b := sample(300, 0), sample(700, 0)
		_, ks := kolmogorovSmirnov(a, b)
		_, mw := mannWhitney(a, b)
		if ks < 0.05 {
			unlikely++
		}
		if mw < 0.05 {
			unlikely++
		}
	}
	require.InDelta(t, 0.05*2*runs, unlikely, 15)
	_, p = kolmogorovSmirnov(sample(1000, 0), sample(1000, 0.2))
	require.Less(t, p, 1e-6)
	_, p = mannWhitney(sample(1000, 0), sample(1000, 0.2))
	require.Less(t, p, 1e-6)
}
