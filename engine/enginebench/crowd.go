package enginebench

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

// Crowd is a store with any number of CMKs, to see what does not stay the same
// when they are a million.
//
// Its rows are made at the store's level, as the customers' way would take hours.
// A few CMKs are imported through an engine; every other one has the sealed blob
// of one of them, which the token opens, its own names, the material id that this
// material has under its KeyId, and a MAC of its own by the token. So to an engine
// they are CMKs like any other: they encrypt, and take a re-import of their
// material. They have no entry in the log of receipts, like CMKs of before there
// was one, and no import token.
type Crowd struct {
	Token *hsm.Token
	Store store.Store
	N     int

	// Expiring is how many of them, the first ones, have material that expires:
	// Expiry says when. The rest has material that expires in the far future, or
	// never.
	Expiring int
	Expiry   func(i int) time.Time

	materials [templates][]byte
}

// templates are the CMKs that are imported.
const templates = 16

// KeyID is that of CMK i, the same in every Crowd.
func (c *Crowd) KeyID(i int) string { return crowdID("key", i) }

func crowdID(what string, i int) string {
	sum := sha256.Sum256(binary.BigEndian.AppendUint64([]byte(what), uint64(i)))
	id, _ := uuid.FromBytes(sum[:16]) // which is as long as it must be
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id.String()
}

// material is that of CMK i, once it was loaded by this Crowd.
func (c *Crowd) material(i int) []byte { return c.materials[i%templates] }

// Load fills an empty store. progress, if it is not nil, is told how many CMKs
// there are, now and then.
func (c *Crowd) Load(ctx context.Context, progress func(n int)) (err error) {
	rows, err := c.imported(ctx)
	if err != nil {
		return err
	}
	start := time.Now().UTC().Truncate(time.Second).Add(-time.Duration(c.N/100) * time.Second)
	var mu sync.Mutex
	done := 0
	return each(c.N, func(i int) error {
		row := rows[i%templates]
		row.KeyID, row.KeyVersionID, row.Revision = c.KeyID(i), crowdID("version", i), 1
		row.Description = "one of a crowd"
		row.CreatedAt = start.Add(time.Duration(i/100) * time.Second)
		row.ExpireAt, row.Receipt = time.Time{}, nil
		switch {
		case i < c.Expiring:
			row.ExpireAt = c.Expiry(i)
		case i%4 == 0:
			row.ExpireAt = start.AddDate(10, 0, i%1000)
		}
		id, err := byok.MaterialID(row.KeyID, c.material(i))
		if err != nil {
			return err
		}
		row.MaterialID = id[:]
		if err := engine.SealRow(ctx, c.Token, &row); err != nil {
			return err
		}
		if err := c.Store.CreateKey(ctx, row); err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if done++; done%10_000 == 0 && progress != nil {
			progress(done)
		}
		return nil
	})
}

// imported imports the templates and takes them out of the store again.
func (c *Crowd) imported(ctx context.Context) (rows [templates]store.Key, err error) {
	e, err := c.open(ctx, engine.Config{})
	if err != nil {
		return rows, err
	}
	defer func() { err = errors.Join(err, e.Close()) }()
	for i := range templates {
		c.materials[i] = make([]byte, hsm.AES256.Len())
		rand.Read(c.materials[i]) // never fails: crypto/rand
		key, err := e.CreateKey(ctx, engine.CreateKeyInput{Spec: engine.AliyunAES256, Custody: hsm.Sealed})
		if err != nil {
			return rows, err
		}
		in, err := customer(ctx, e, e.Algorithms()[0], key.KeyID, c.materials[i])
		if err != nil {
			return rows, err
		}
		if _, err := e.ImportKeyMaterial(ctx, in); err != nil {
			return rows, err
		}
		if rows[i], err = c.Store.Key(ctx, key.KeyID); err != nil {
			return rows, err
		}
		if err := c.Store.DeleteKey(ctx, store.Deletion{KeyID: key.KeyID, Revision: rows[i].Revision}); err != nil {
			return rows, err
		}
	}
	return rows, nil
}

// open opens an engine on the store, which sweeps only when it is told to.
func (c *Crowd) open(ctx context.Context, cfg engine.Config) (*engine.Engine, error) {
	cfg.Token, cfg.Store = c.Token, c.Store
	cfg.PoolSize, cfg.PairBound, cfg.PairSpecs = 1, pairs, []hsm.PairSpec{hsm.RSA2048}
	cfg.ManualSweep = true
	return engine.New(ctx, cfg)
}

// sample is CMKs from all over the store, none of which expires, the same ones
// whenever it is asked for.
func (c *Crowd) sample(n int) []int {
	random := mathrand.New(mathrand.NewPCG(uint64(c.N), 0)) //nolint:gosec // the same ones each time
	list := make([]int, min(n, c.N-c.Expiring))
	if len(list) == c.N-c.Expiring {
		for i := range list {
			list[i] = c.Expiring + i
		}
		return list
	}
	for i := range list {
		list[i] = c.Expiring + random.IntN(c.N-c.Expiring)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// CompareCrowds makes Comparisons of the same work over two crowds. Each is over
// as many CMKs of either, so that what an engine keeps in memory helps with both
// alike; they are from all over the store.
func CompareCrowds(ctx context.Context, few, many *Crowd, callers int) (comparisons []*Comparison, end func() error, err error) {
	const sample = 900
	var engines []*engine.Engine
	end = func() error {
		var errs []error
		for _, e := range engines {
			errs = append(errs, e.Close())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, end())
		}
	}()
	row := func(c *Comparison) []Metric { return crowds(few, many, &c.loads[0].tally, &c.loads[1].tally) }
	kinds := []string{"encrypt, hit", "encrypt, miss", "describe", "describe, anywhere", "import"}
	for _, kind := range kinds {
		comparisons = append(comparisons, &Comparison{name: kind, callers: callers, row: row})
	}
	for _, crowd := range []*Crowd{few, many} {
		large, err := crowd.open(ctx, engine.Config{})
		if err != nil {
			return nil, end, err
		}
		engines = append(engines, large)
		small, err := (&Crowd{Token: crowd.Token, Store: deaf{crowd.Store}}).open(ctx, engine.Config{CacheSize: smallCache})
		if err != nil {
			return nil, end, err
		}
		engines = append(engines, small)
		chosen := crowd.sample(sample)
		imports := make([]engine.ImportInput, len(chosen))
		err = each(len(chosen), func(i int) (err error) {
			id := crowd.KeyID(chosen[i])
			if imports[i], err = customer(ctx, large, large.Algorithms()[0], id, crowd.material(chosen[i])); err != nil {
				return err
			}
			if _, err = large.ImportKeyMaterial(ctx, imports[i]); err != nil {
				return err
			}
			_, err = large.Encrypt(ctx, id, make([]byte, plaintextLen), nil)
			return err
		})
		if err != nil {
			return nil, end, err
		}
		steps := []func(ctx context.Context, i int) error{
			func(ctx context.Context, i int) error {
				_, err := large.Encrypt(ctx, crowd.KeyID(chosen[i%len(chosen)]), make([]byte, plaintextLen), nil)
				return err
			},
			func(ctx context.Context, i int) error {
				_, err := small.Encrypt(ctx, crowd.KeyID(chosen[i%len(chosen)]), make([]byte, plaintextLen), nil)
				return err
			},
			func(ctx context.Context, i int) error {
				_, err := large.DescribeKey(ctx, crowd.KeyID(chosen[i%len(chosen)]))
				return err
			},
			func(ctx context.Context, i int) error {
				_, err := large.DescribeKey(ctx, crowd.KeyID(crowd.Expiring+int(uint64(i)*0x9e3779b1%uint64(crowd.N-crowd.Expiring))))
				return err
			},
			func(ctx context.Context, i int) error { // last, as it closes what is open
				_, err := large.ImportKeyMaterial(ctx, imports[i%len(imports)])
				return err
			},
		}
		for k, step := range steps {
			comparisons[k].add(strconv.Itoa(crowd.N), func(caller int) func(context.Context) error {
				i := caller
				return func(ctx context.Context) error {
					i += callers
					return step(ctx, i)
				}
			})
		}
	}
	return comparisons, end, nil
}

// crowds are the columns of a comparison of two crowds.
func crowds(few, many *Crowd, a, b *tally) []Metric {
	return []Metric{
		{fmt.Sprintf("%d/s", few.N), a.perSecond()},
		{fmt.Sprintf("%d/s", many.N), b.perSecond()},
		{"time-ratio", a.perSecond() / b.perSecond()},
		{"few-cpu-µs", a.cpu()},
		{"many-cpu-µs", b.cpu()},
		{"cpu-ratio", b.cpu() / a.cpu()},
		{"few-p99-µs", a.percentile(99)},
		{"many-p99-µs", b.percentile(99)},
	}
}

// CompareSweeps has both crowds' material expire, so many CMKs at a time, until
// none is left that does. step is how much time is between them.
func CompareSweeps(ctx context.Context, few, many *Crowd, step time.Duration, start time.Time) (_ Row, err error) {
	var tallies [2]tally
	var engines [2]*engine.Engine
	var clock atomic.Int64 // nanoseconds since start
	defer func() {
		for _, e := range engines {
			if e != nil {
				err = errors.Join(err, e.Close())
			}
		}
	}()
	for i, crowd := range []*Crowd{few, many} {
		e, err := crowd.open(ctx, engine.Config{Now: func() time.Time { return start.Add(time.Duration(clock.Load())) }})
		if err != nil {
			return Row{}, err
		}
		engines[i] = e
	}
	for last := few.Expiry(few.Expiring - 1); !start.Add(time.Duration(clock.Load())).After(last); clock.Add(int64(step)) {
		for i, e := range engines {
			use, began := ProcessorTime(), time.Now()
			if err := e.Sweep(ctx); err != nil {
				return Row{}, err
			}
			took := time.Since(began)
			if clock.Load() > 0 { // the first has what was there before to do
				tallies[i].add(took)
				tallies[i].wall += took
				tallies[i].use += ProcessorTime() - use
			}
		}
	}
	return Row{Name: "expiry sweep", Callers: 1, Metrics: crowds(few, many, &tallies[0], &tallies[1])}, nil
}
