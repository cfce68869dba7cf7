package enginebench

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

// rowLen is about how long what is authenticated of a CMK's row is.
const rowLen = 128

// plaintextLen is of what is encrypted, in bytes.
const plaintextLen = 64

// aadLen is about how long the associated data of the engine is.
const aadLen = 100

// Import compares imports of material that the CMKs have already, durably.
func (b *Bench) Import(ctx context.Context, offer engine.WrappingOffer, callers int) (*Comparison, error) {
	r, err := b.route(ctx, offer)
	if err != nil {
		return nil, err
	}
	// As each caller waits for its import, no two import into one CMK at once
	// unless there are fewer CMKs than callers.
	callers = min(callers, len(r.imports))
	c := &Comparison{name: offer.String(), callers: callers, row: against("bare", "calls", "ours")}
	type step = func(context.Context) error
	err = c.add("bare", func(int) (step, error) {
		s, err := b.session(ctx, c)
		return func(context.Context) error {
			i := b.next(len(r.imports))
			return s.Unwrap(r.pairs[i], r.imports[i].EncryptedKeyMaterial)
		}, err
	})
	err = errors.Join(err, c.add("calls", func(int) (step, error) {
		s, err := b.session(ctx, c)
		record := make([]byte, rowLen)
		return func(context.Context) error {
			i := b.next(len(r.imports))
			in := &r.imports[i]
			return errors.Join(s.Import(r.pairs[i], in.EncryptedKeyMaterial, []byte(in.KeyID)), s.MAC(record))
		}, err
	}))
	err = errors.Join(err, c.add("ours", func(caller int) (step, error) { return b.importing(r, caller, callers), nil }))
	return c, err
}

// importing is the step of one of so many callers, who go over CMKs of their own.
func (b *Bench) importing(r *route, caller, callers int) func(context.Context) error {
	i := caller
	return func(ctx context.Context) error {
		_, err := b.engine.ImportKeyMaterial(ctx, r.imports[i])
		if i += callers; i >= len(r.imports) {
			i = caller
		}
		return err
	}
}

// Onboard compares imports into CMKs that have the material already with
// CreateKey, GetParametersForImport and ImportKeyMaterial of CMKs that are new.
// What the customer computes is left out: where a wrapping pair is shared, one
// wrapping is used again.
func (b *Bench) Onboard(ctx context.Context, callers int) (*Comparison, error) {
	r, err := b.route(ctx, b.offers[0])
	if err != nil {
		return nil, err
	}
	c := &Comparison{name: "create, parameters, import", callers: callers, row: func(c *Comparison) []Metric {
		again, fresh := &c.loads[0].tally, &c.loads[1].tally
		return []Metric{
			{"reimport/s", again.perSecond()},
			{"onboard/s", fresh.perSecond()},
			{"ratio", fresh.perSecond() / again.perSecond()},
			{"reimport-cpu-µs", again.cpu()},
			{"onboard-cpu-µs", fresh.cpu()},
			{"p50-µs", fresh.percentile(50)},
			{"p99-µs", fresh.percentile(99)},
		}
	}}
	err = c.add("reimport", func(caller int) (func(context.Context) error, error) { return b.importing(r, caller, callers), nil })
	err = errors.Join(err, c.add("onboard", func(int) (func(context.Context) error, error) {
		return func(ctx context.Context) error {
			made, err := b.engine.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Sealed})
			if err != nil {
				return err
			}
			params, err := b.engine.GetParametersForImport(ctx, made.KeyID, r.offer.Spec, r.offer.Algorithm)
			if err != nil {
				return err
			}
			wrapped, err := r.wrap(params.PublicKey, b.keys[0].material)
			if err != nil {
				return err
			}
			_, err = b.engine.ImportKeyMaterial(ctx, engine.ImportInput{
				KeyID: made.KeyID, EncryptedKeyMaterial: wrapped, ImportToken: params.ImportToken,
			})
			return err
		}, nil
	}))
	return c, err
}

// wrap wraps material once for each public key.
func (r *route) wrap(publicKey, material []byte) ([]byte, error) {
	if wrapped, ok := r.wrapped.Load(string(publicKey)); ok {
		return wrapped.([]byte), nil
	}
	wrapped, err := byok.Wrap(string(r.offer.Algorithm), publicKey, material)
	if err == nil {
		r.wrapped.Store(string(publicKey), wrapped)
	}
	return wrapped, err
}

// Encrypt compares encryptions of 64 bytes under CMKs that are open.
func (b *Bench) Encrypt(ctx context.Context, callers int) (*Comparison, error) {
	if err := b.openAll(ctx); err != nil {
		return nil, err
	}
	plaintext := make([]byte, plaintextLen)
	return b.use(ctx, "encrypt 64 bytes", callers,
		func(s *hsm.Bare) func(context.Context) error {
			var iv [12]byte
			aad := make([]byte, aadLen)
			return func(context.Context) error {
				binary.LittleEndian.PutUint64(iv[:], uint64(b.turn.Load())) // of no secret, and thrown away
				return s.Encrypt(b.keys[b.next(len(b.keys))].open, &iv, plaintext, aad)
			}
		},
		func(ctx context.Context) error {
			_, err := b.engine.Encrypt(ctx, b.keys[b.next(len(b.keys))].id, plaintext, nil)
			return err
		})
}

// Decrypt compares decryptions of 64 bytes under CMKs that are open.
func (b *Bench) Decrypt(ctx context.Context, callers int) (*Comparison, error) {
	if err := b.openAll(ctx); err != nil {
		return nil, err
	}
	aad := make([]byte, aadLen)
	err := each(len(b.keys), func(i int) (err error) {
		b.keys[i].raw, err = b.keys[i].open.Encrypt(ctx, nil, make([]byte, plaintextLen), aad)
		return err
	})
	if err != nil {
		return nil, err
	}
	return b.use(ctx, "decrypt 64 bytes", callers,
		func(s *hsm.Bare) func(context.Context) error {
			return func(context.Context) error {
				k := &b.keys[b.next(len(b.keys))]
				return s.Decrypt(k.open, k.raw, aad)
			}
		},
		func(ctx context.Context) error {
			_, err := b.engine.Decrypt(ctx, b.keys[b.next(len(b.keys))].blob, nil)
			return err
		})
}

func (b *Bench) use(
	ctx context.Context, name string, callers int, bare func(*hsm.Bare) func(context.Context) error, ours func(context.Context) error,
) (*Comparison, error) {
	c := &Comparison{name: name, callers: callers, row: against("bare", "bare", "ours")}
	err := c.add("bare", func(int) (func(context.Context) error, error) {
		s, err := b.session(ctx, c)
		if err != nil {
			return nil, err
		}
		return bare(s), nil
	})
	return c, errors.Join(err, c.add("ours", func(int) (func(context.Context) error, error) { return ours, nil }))
}

// openAll opens every key for the bare calls, and in the engine.
func (b *Bench) openAll(ctx context.Context) error {
	return each(len(b.keys), func(i int) (err error) {
		k := &b.keys[i]
		if k.open == nil {
			if k.open, err = b.token.OpenMaterial(ctx, k.sealed); err != nil {
				return err
			}
		}
		// Imports have closed it.
		out, err := b.engine.Encrypt(ctx, k.id, make([]byte, plaintextLen), nil)
		k.blob = out.Blob
		return err
	})
}

// Miss compares encryptions of 64 bytes under CMKs that are open with those under
// CMKs that have to be read, verified and opened first, and closed afterwards.
func (b *Bench) Miss(ctx context.Context, callers int) (*Comparison, error) {
	if len(b.keys) < 4*smallCache {
		return nil, fmt.Errorf("%d CMKs are too few to miss a cache of %d", len(b.keys), smallCache)
	}
	plaintext := make([]byte, plaintextLen)
	c := &Comparison{name: "encrypt on a hit, on a miss", callers: callers, row: func(c *Comparison) []Metric {
		open, hit, miss := &c.loads[0].tally, &c.loads[1].tally, &c.loads[2].tally
		return []Metric{
			{"bare-open/s", open.perSecond()},
			{"hit/s", hit.perSecond()},
			{"miss/s", miss.perSecond()},
			{"bare-open-cpu-µs", open.cpu()},
			{"hit-cpu-µs", hit.cpu()},
			{"miss-cpu-µs", miss.cpu()},
			{"miss-extra-cpu-µs", miss.cpu() - hit.cpu()},
			{"hit-p50-µs", hit.percentile(50)},
			{"miss-p50-µs", miss.percentile(50)},
			{"miss-p99-µs", miss.percentile(99)},
		}
	}}
	encrypt := func(n int) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := b.small.Encrypt(ctx, b.keys[b.next(n)].id, plaintext, nil)
			return err
		}
	}
	// The first use ever of a key writes a row.
	if err := each(len(b.keys), func(i int) error {
		_, err := b.small.Encrypt(ctx, b.keys[i].id, plaintext, nil)
		return err
	}); err != nil {
		return nil, err
	}
	err := c.add("open", func(int) (func(context.Context) error, error) {
		s, err := b.session(ctx, c)
		return func(context.Context) error { return s.Open(b.keys[b.next(len(b.keys))].sealed) }, err
	})
	err = errors.Join(err, c.add("hit", func(int) (func(context.Context) error, error) { return encrypt(smallCache / 2), nil }))
	err = errors.Join(err, c.add("miss", func(int) (func(context.Context) error, error) { return encrypt(len(b.keys)), nil }))
	return c, err
}

// Parameters measures GetParametersForImport: by one caller who gets a fresh
// pair each time while the pool has some, by callers who share pairs, and what it
// takes the token to generate one. It takes so many fresh pairs, and measures the
// shared ones for as long as d.
func (b *Bench) Parameters(ctx context.Context, fresh, callers int, d time.Duration) (*Table, error) {
	var held, made tally
	if err := b.takeFresh(ctx, fresh, &held); err != nil {
		return nil, err
	}
	offer := b.offers[0]
	for range max(1, fresh/8) {
		var pair hsm.PairInfo
		err := made.time(func() (err error) {
			pair, err = b.token.GeneratePair(ctx, Instance, time.Now(), offer.Spec, offer.Algorithm)
			return err
		})
		if err != nil {
			return nil, err
		}
		if err := b.token.DestroyPair(ctx, pair.ID); err != nil {
			return nil, err
		}
	}
	c := &Comparison{name: "parameters", callers: callers}
	err := c.add("shared", func(int) (func(context.Context) error, error) {
		return func(ctx context.Context) error { return b.parameters(ctx, b.engine) }, nil
	})
	if err = errors.Join(err, c.Run(ctx, d)); err != nil {
		return nil, err
	}
	row := func(name string, callers int, t *tally) Row {
		return Row{Name: name, Callers: callers, Metrics: []Metric{
			{"times", float64(t.n)},
			{"per-s", t.perSecond()},
			{"p50-ms", t.percentile(50) / 1000},
			{"p99-ms", t.percentile(99) / 1000},
		}}
	}
	return &Table{Title: "Parameters for import", Rows: []Row{
		row("a fresh pair of the pool", 1, &held),
		row("a shared pair", callers, &c.loads[0].tally),
		row("for comparison, generating a pair", 1, &made),
	}}, nil
}

// parameters asks for parameters of one of the CMKs.
func (b *Bench) parameters(ctx context.Context, e *engine.Engine) error {
	_, err := e.GetParametersForImport(ctx, b.keys[b.next(len(b.keys))].id, b.offers[0].Spec, b.offers[0].Algorithm)
	return err
}

// time counts what one step takes.
func (t *tally) time(step func() error) error {
	start := time.Now()
	err := step()
	t.add(time.Since(start))
	t.wall += time.Since(start)
	return err
}

// takeFresh takes so many fresh pairs, each time as many as the pool has.
func (b *Bench) takeFresh(ctx context.Context, n int, t *tally) (err error) {
	size := min(8, n)
	roomy, err := engine.New(ctx, engine.Config{
		Token: b.token, Store: deaf{named{b.store}}, PairSpecs: []hsm.PairSpec{b.offers[0].Spec},
		PoolSize: size, PairBound: 1 << 20, Custody: hsm.Sealed,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, roomy.Close()) }()
	for t.n < n {
		if err := b.poolFilled(ctx, size, roomy.Algorithms()); err != nil {
			return err
		}
		for range min(size, n-t.n) {
			if err := t.time(func() error { return b.parameters(ctx, roomy) }); err != nil {
				return err
			}
		}
	}
	return nil
}

// poolFilled waits until there are so many ready pairs of offers, so that none is
// generated meanwhile.
func (b *Bench) poolFilled(ctx context.Context, size int, offers []engine.WrappingOffer) error {
	for {
		counts, err := b.store.PairCounts(ctx, time.Now())
		if err != nil {
			return err
		}
		ready := make(map[engine.WrappingOffer]int)
		for _, n := range counts {
			ready[engine.WrappingOffer{Spec: hsm.PairSpec(n.Spec), Algorithm: hsm.Algorithm(n.Algorithm)}] = n.Ready
		}
		if !slices.ContainsFunc(offers, func(o engine.WrappingOffer) bool { return ready[o] < size }) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// against are the columns of a comparison of ours with bare calls: with the
// shortest loop, and with the calls that have to be made.
func against(bare, calls, ours string) func(*Comparison) []Metric {
	return func(c *Comparison) []Metric {
		by := map[string]*tally{}
		for _, l := range c.loads {
			by[l.name] = &l.tally
		}
		b, n, o := by[bare], by[calls], by[ours]
		row := []Metric{{"bare/s", b.perSecond()}}
		if calls != bare {
			row = append(row, Metric{"calls/s", n.perSecond()})
		}
		row = append(row, Metric{"ours/s", o.perSecond()}, Metric{"ratio", o.perSecond() / b.perSecond()})
		if calls != bare {
			row = append(row, Metric{"ratio-to-calls", o.perSecond() / n.perSecond()})
		}
		row = append(row, Metric{"bare-cpu-µs", b.cpu()})
		if calls != bare {
			row = append(row, Metric{"calls-cpu-µs", n.cpu()})
		}
		return append(row,
			Metric{"ours-cpu-µs", o.cpu()}, Metric{"extra-cpu-µs", o.cpu() - n.cpu()},
			Metric{"p50-µs", o.percentile(50)}, Metric{"p99-µs", o.percentile(99)})
	}
}
