package enginebench

import (
	"context"
	"errors"
	"time"

	"github.com/keyferry/keyferry/engine"
)

// Suite is what one table compares.
type Suite struct {
	Name  string // short
	Title string // of the table
	rows  []func(ctx context.Context, callers int) (*Comparison, error)
	few   bool // more callers than eight show nothing more
}

// Suites are all tables but that of Parameters.
func (b *Bench) Suites() []Suite {
	type rows = []func(context.Context, int) (*Comparison, error)
	imports := Suite{Name: "import", Title: "Import of wrapped material into CMKs that have it, durably"}
	for _, offer := range b.offers {
		imports.rows = append(imports.rows, func(ctx context.Context, callers int) (*Comparison, error) {
			return b.Import(ctx, offer, callers)
		})
	}
	suites := []Suite{
		imports,
		{Name: "onboard", Title: "New CMKs, durably, beside imports into old ones", rows: rows{b.Onboard}},
		{Name: "encrypt", Title: "Encryption under open keys", rows: rows{b.Encrypt}},
		{Name: "decrypt", Title: "Decryption under open keys", rows: rows{b.Decrypt}, few: true},
	}
	if len(b.keys) >= 4*smallCache {
		suites = append(suites, Suite{Name: "miss", Title: "Keys that have to be opened first", rows: rows{b.Miss}, few: true})
	}
	return suites
}

// CustodySuites compare sealed with resident material, where the token keeps both.
// They put objects on it until Close, one for five CMKs, and come before Suites: the
// last of those has a second engine use the keys, after which the first opens
// none again.
func (b *Bench) CustodySuites() []Suite {
	if b.Keeps() != nil {
		return nil
	}
	type rows = []func(context.Context, int) (*Comparison, error)
	return []Suite{
		{Name: "custody-import", Title: "Custody: imports, durably", rows: rows{b.Custody}, few: true},
		{Name: "custody-encrypt", Title: "Custody: encryption", rows: rows{b.CustodyUse}, few: true},
	}
}

// Rows is how many rows the suite has at so many callers.
func (s *Suite) Rows(callers []int) (n int) {
	for i := range callers {
		if !s.skips(i, callers[i]) {
			n += len(s.rows)
		}
	}
	return n
}

func (s *Suite) skips(i, callers int) bool { return s.few && i > 0 && callers > 8 }

// Each calls do with every comparison of the suite at so many callers.
func (s *Suite) Each(ctx context.Context, callers []int, do func(callers int, c *Comparison) error) error {
	for _, row := range s.rows {
		for i, n := range callers {
			if s.skips(i, n) {
				continue
			}
			c, err := row(ctx, n)
			if err != nil {
				return err
			}
			if err := errors.Join(do(n, c), c.Close()); err != nil {
				return err
			}
			if c.callers < n {
				break // there are no more of them
			}
		}
	}
	return nil
}

// Plan says how Tables measures.
type Plan struct {
	Suites  []Suite
	Callers []int         // at a time
	Each    time.Duration // what a row takes
	Fresh   int           // pairs that are generated for Parameters
}

// Tables measures the suites of a plan, and parameters, and makes the tables.
func (b *Bench) Tables(ctx context.Context, p Plan) (tables []*Table, err error) {
	for _, s := range p.Suites {
		t := &Table{Title: s.Title}
		err := s.Each(ctx, p.Callers, func(_ int, c *Comparison) error {
			err := c.Run(ctx, p.Each)
			t.Rows = append(t.Rows, c.Row())
			return err
		})
		if err != nil {
			return nil, err
		}
		tables = append(tables, t)
	}
	t, err := b.Parameters(ctx, p.Fresh, p.Callers[len(p.Callers)-1], p.Each)
	return append(tables, t), err
}

// Offers are the wrapping algorithms that the token offers, the first of which
// the keys were imported by.
func (b *Bench) Offers() []engine.WrappingOffer { return b.offers }
