package enginebench

import (
	"cmp"
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
	c := &Comparison{name: offer.String(), callers: callers, row: against}
	err = c.addBare(ctx, b.token, "bare", b.unwrapping(r, (*hsm.Bare).Unwrap))
	err = errors.Join(err, c.addBare(ctx, b.token, "calls", func(s *hsm.Bare) step {
		record := make([]byte, rowLen)
		return func(context.Context) error {
			i := b.next(len(r.imports))
			in := &r.imports[i]
			return errors.Join(s.Import(r.pairs[i], in.EncryptedKeyMaterial, []byte(in.KeyID)), s.MAC(record))
		}
	}))
	c.add("ours", b.importing(r, callers))
	return c, err
}

// unwrapping makes the step of a bare caller who unwraps what is imported.
func (b *Bench) unwrapping(r *route, unwrap func(*hsm.Bare, hsm.PairID, []byte) error) func(*hsm.Bare) step {
	return func(s *hsm.Bare) step {
		return func(context.Context) error {
			i := b.next(len(r.imports))
			return unwrap(s, r.pairs[i], r.imports[i].EncryptedKeyMaterial)
		}
	}
}

// importing makes the step of one of so many callers, who go over CMKs of their
// own.
func (b *Bench) importing(r *route, callers int) func(caller int) step {
	return func(caller int) step {
		i := caller
		return func(ctx context.Context) error {
			_, err := b.engine.ImportKeyMaterial(ctx, r.imports[i])
			if i += callers; i >= len(r.imports) {
				i = caller
			}
			return err
		}
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
	c.add("reimport", b.importing(r, callers))
	c.add("onboard", func(int) step {
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
		}
	})
	return c, nil
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
	return b.use(ctx, "encrypt 64 bytes", callers, b.encryptingBare(len(b.keys), b.openKey), b.encrypting(b.engine, len(b.keys), b.keyID))
}

func (b *Bench) keyID(i int) string     { return b.keys[i].id }
func (b *Bench) openKey(i int) *hsm.Key { return b.keys[i].open }

// encrypting is the step of a caller who encrypts 64 bytes under n keys in turn.
func (b *Bench) encrypting(e *engine.Engine, n int, keyID func(i int) string) step {
	plaintext := make([]byte, plaintextLen)
	return func(ctx context.Context) error {
		_, err := e.Encrypt(ctx, keyID(b.next(n)), plaintext, nil)
		return err
	}
}

// encryptingBare makes the step of a bare caller who does.
func (b *Bench) encryptingBare(n int, key func(i int) *hsm.Key) func(*hsm.Bare) step {
	return func(s *hsm.Bare) step {
		var iv [12]byte
		plaintext, aad := make([]byte, plaintextLen), make([]byte, aadLen)
		return func(context.Context) error {
			binary.LittleEndian.PutUint64(iv[:], uint64(b.turn.Load())) // of no secret, and thrown away
			return s.Encrypt(key(b.next(n)), &iv, plaintext, aad)
		}
	}
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
		func(s *hsm.Bare) step {
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

func (b *Bench) use(ctx context.Context, name string, callers int, bare func(*hsm.Bare) step, ours step) (*Comparison, error) {
	c := &Comparison{name: name, callers: callers, row: against}
	err := c.addBare(ctx, b.token, "bare", bare)
	c.add("ours", func(int) step { return ours })
	return c, err
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
	// The first use ever of a key writes a row.
	if err := each(len(b.keys), func(i int) error {
		_, err := b.small.Encrypt(ctx, b.keys[i].id, make([]byte, plaintextLen), nil)
		return err
	}); err != nil {
		return nil, err
	}
	err := c.addBare(ctx, b.token, "open", func(s *hsm.Bare) step {
		return func(context.Context) error { return s.Open(b.keys[b.next(len(b.keys))].sealed) }
	})
	c.add("hit", func(int) step { return b.encrypting(b.small, smallCache/2, b.keyID) })
	c.add("miss", func(int) step { return b.encrypting(b.small, len(b.keys), b.keyID) })
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
	c.add("shared", func(int) step {
		return func(ctx context.Context) error { return b.parameters(ctx, b.engine) }
	})
	if err := c.Run(ctx, d); err != nil {
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
// shortest loop, and with the calls that have to be made, if those are others.
func against(c *Comparison) []Metric {
	by := c.tallies()
	bare, calls, ours := by["bare"], by["calls"], by["ours"]
	row := []Metric{{"bare/s", bare.perSecond()}}
	if calls != nil {
		row = append(row, Metric{"calls/s", calls.perSecond()})
	}
	row = append(row, Metric{"ours/s", ours.perSecond()}, Metric{"ratio", ours.perSecond() / bare.perSecond()})
	if calls != nil {
		row = append(row, Metric{"ratio-to-calls", ours.perSecond() / calls.perSecond()})
	}
	row = append(row, Metric{"bare-cpu-µs", bare.cpu()})
	if calls != nil {
		row = append(row, Metric{"calls-cpu-µs", calls.cpu()})
	}
	return append(row,
		Metric{"ours-cpu-µs", ours.cpu()}, Metric{"extra-cpu-µs", ours.cpu() - cmp.Or(calls, bare).cpu()},
		Metric{"p50-µs", ours.percentile(50)}, Metric{"p99-µs", ours.percentile(99)})
}
