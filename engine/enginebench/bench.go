// Package enginebench measures an engine beside the bare calls of its token: how
// many imports, encryptions and the like it does a second, durably, and what they
// cost beyond the token. "go test -bench" of package engine and "keyferryd bench"
// print the same tables, which are made here; that is why it is a package, and
// why it stands above engine and below the programs.
//
// Start with New. Everything goes over Config.Keys CMKs, which it makes in a
// store that holds nothing else. On the token it leaves nothing behind but
// wrapping pairs and resident material of the instance Instance, which Close
// destroys, and which the next New destroys after ten minutes where a process was
// killed.
//
// The columns:
//
//   - bare: the shortest loop there could be, C_UnwrapKey and C_DestroyObject for
//     an import, each caller on a session of its own, every size and handle known.
//   - calls: every call that the operation makes of the token, likewise.
//   - ours: the engine.
//   - ratio: ours to bare. extra-cpu-µs: the processor time of ours beyond that of
//     calls; what the engine adds, on this machine, to any token.
package enginebench

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Instance is that of every store that is measured, so that what a killed process
// left on the token is told from what servers have there.
const Instance = "be9cbe9cbe9cbe9c"

// Config says what is measured. Token and Store are required.
type Config struct {
	Token  *hsm.Token
	Store  store.Store // empty, and of nobody else
	Keys   int         // CMKs; 0: 1,000
	Logger *slog.Logger
	// PairSpecs and their algorithms are those that the engine offers; nil: as
	// for the engine.
	PairSpecs []hsm.PairSpec
}

// pairs is how many wrapping pairs of an offer there are before they are shared.
const pairs = 4

// Bench is an engine with CMKs that have material. Its methods make Comparisons,
// which must not run at the same time.
type Bench struct {
	token  *hsm.Token
	store  store.Store
	engine *engine.Engine // that keeps every key open
	small  *engine.Engine // that keeps few open

	keys   []key
	routes map[engine.WrappingOffer]*route
	offers []engine.WrappingOffer
	turn   atomic.Int64

	// CMKs whose material is resident; none until a Comparison needs them.
	residents *route
}

// key is a CMK, and what its customer knows.
type key struct {
	id       string
	material []byte
	sealed   hsm.Material // what its row holds
	open     *hsm.Key     // for the bare calls; nil until they need it
	blob     []byte       // what the engine encrypted under it
	raw      []byte       // what open encrypted, under no associated data
}

// route is an offer with imports for some of the CMKs.
type route struct {
	offer   engine.WrappingOffer
	imports []engine.ImportInput
	pairs   []hsm.PairID // of each import
	wrapped sync.Map     // public key, a string → material wrapped under it
}

// named gives a store the instance of all Benches.
type named struct{ store.Store }

// Instance implements store.Store.
func (named) Instance(context.Context) (string, error) { return Instance, nil }

// deaf is for a second engine on one store: what is changed is not reported to
// it, and nothing is.
type deaf struct{ store.Store }

// Watch implements store.Store.
func (deaf) Watch(func(keyID, versionID string)) {}

// smallCache is how many keys are open where most are to be opened first.
const smallCache = 64

// New makes the CMKs and imports their material, under the first algorithm that
// the token offers. It takes seconds.
func New(ctx context.Context, cfg Config) (_ *Bench, err error) {
	n := cmp.Or(cfg.Keys, 1000)
	b := &Bench{token: cfg.Token, store: cfg.Store, keys: make([]key, n), routes: make(map[engine.WrappingOffer]*route)}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	ours := engine.Config{
		Token: cfg.Token, Store: named{cfg.Store}, Logger: cfg.Logger, PairSpecs: cfg.PairSpecs,
		PoolSize: 1, PairBound: pairs, CacheSize: max(2*n, 10_000), Custody: hsm.Sealed,
	}
	if b.engine, err = engine.New(ctx, ours); err != nil {
		return nil, err
	}
	if b.offers = b.engine.Algorithms(); len(b.offers) == 0 {
		return nil, errors.New("the token offers no wrapping algorithm")
	}
	few := ours
	few.Store, few.CacheSize = deaf{ours.Store}, smallCache
	if b.small, err = engine.New(ctx, few); err != nil {
		return nil, err
	}
	err = each(n, func(i int) error {
		k := &b.keys[i]
		k.material = make([]byte, hsm.AES256.Len())
		rand.Read(k.material) // never fails: crypto/rand
		made, err := b.engine.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Sealed})
		k.id = made.KeyID
		return err
	})
	if err != nil {
		return nil, err
	}
	if _, err = b.route(ctx, b.offers[0]); err != nil {
		return nil, err
	}
	return b, each(n, func(i int) error {
		row, err := b.store.Key(ctx, b.keys[i].id)
		if err != nil {
			return err
		}
		return b.keys[i].sealed.UnmarshalBinary(row.Material)
	})
}

// Close destroys on the token what New and the Comparisons have made there.
func (b *Bench) Close() error {
	var errs []error
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if b.residents != nil {
		for i := range b.residents.imports {
			if keyID := b.residents.imports[i].KeyID; keyID != "" {
				errs = append(errs, b.engine.DeleteKeyMaterial(ctx, keyID))
			}
		}
	}
	for i := range b.keys {
		clear(b.keys[i].material)
		if b.keys[i].open != nil {
			errs = append(errs, b.keys[i].open.Close())
		}
	}
	for _, e := range []*engine.Engine{b.small, b.engine} {
		if e != nil {
			errs = append(errs, e.Close())
		}
	}
	return errors.Join(append(errs, b.destroyPairs(ctx))...)
}

// destroyPairs destroys the pairs of this Bench, and no other's.
func (b *Bench) destroyPairs(ctx context.Context) error {
	rows, err := b.store.Pairs(ctx, time.Time{}, 0)
	errs := []error{err}
	for _, row := range rows {
		errs = append(errs, b.token.DestroyPair(ctx, row.ID))
	}
	return errors.Join(errs...)
}

// next is whose turn it is of n.
func (b *Bench) next(n int) int { return int(uint64(b.turn.Add(1)) % uint64(n)) }

// each does work for 0 to n-1, several at a time.
func each(n int, work func(i int) error) error {
	const workers = 32
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && errs[w] == nil; i = int(next.Add(1)) - 1 {
				errs[w] = work(i)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// route has material of the CMKs imported by an offer, of all by the first and
// of a hundred by any other: enough that callers are not in each other's way.
func (b *Bench) route(ctx context.Context, offer engine.WrappingOffer) (*route, error) {
	if r := b.routes[offer]; r != nil {
		return r, nil
	}
	n := len(b.keys)
	switch {
	case offer.Algorithm == hsm.PKCS1v15:
		n = min(n, pairs) // they are not shared
	case len(b.routes) > 0:
		n = min(n, 100)
	}
	r := &route{offer: offer, imports: make([]engine.ImportInput, n), pairs: make([]hsm.PairID, n)}
	err := each(n, func(i int) error { return b.importBy(ctx, r, i, b.keys[i].id, b.keys[i].material) })
	if err != nil {
		return nil, fmt.Errorf("%s: %w", offer, err)
	}
	b.routes[offer] = r
	return r, b.poolFilled(ctx, 1, b.offers)
}

// importBy makes import i of a route.
func (b *Bench) importBy(ctx context.Context, r *route, i int, keyID string, material []byte) (err error) {
	if r.imports[i], err = customer(ctx, b.engine, r.offer, keyID, material); err != nil {
		return err
	}
	if _, err = b.engine.ImportKeyMaterial(ctx, r.imports[i]); err != nil {
		return err
	}
	row, err := b.store.Key(ctx, keyID)
	copy(r.pairs[i][:], row.PairID)
	return err
}

// customer asks for parameters and wraps material under them.
func customer(ctx context.Context, e *engine.Engine, offer engine.WrappingOffer, keyID string, material []byte) (in engine.ImportInput, err error) {
	params, err := e.GetParametersForImport(ctx, keyID, offer.Spec, offer.Algorithm)
	if err != nil {
		return in, err
	}
	in = engine.ImportInput{KeyID: keyID, ImportToken: params.ImportToken}
	if in.EncryptedKeyMaterial, err = byok.Wrap(string(offer.Algorithm), params.PublicKey, material); err != nil {
		return in, err
	}
	if offer.Algorithm == hsm.PKCS1v15 { // which some tokens ask for
		id, err := byok.MaterialID(keyID, material)
		if err != nil {
			return in, err
		}
		in.ExpectMaterialID = id[:]
	}
	return in, nil
}
