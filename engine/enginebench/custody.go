package enginebench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// residentPart is the part of the CMKs, of which there are more, whose material is
// resident: two hundred of a thousand, as a small HSM holds beside its other
// objects. What they cost grows with it on tokens that search slowly.
const residentPart = 5

// Keeps returns why the token keeps no resident material, nil if it does.
func (b *Bench) Keeps() error { return b.token.Keeps(hsm.Resident, hsm.AES256) }

// reside makes CMKs whose material is resident. hsm.ErrUnsupported if the token
// keeps none.
func (b *Bench) reside(ctx context.Context) (*route, error) {
	if b.residents != nil {
		return b.residents, nil
	}
	if err := b.Keeps(); err != nil {
		return nil, err
	}
	n := len(b.keys) / residentPart
	r := &route{offer: b.offers[0], imports: make([]engine.ImportInput, n), pairs: make([]hsm.PairID, n)}
	b.residents = r // Close destroys what has been made by then
	return r, each(n, func(i int) error {
		key, err := b.engine.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Resident})
		if err != nil {
			return err
		}
		material := make([]byte, hsm.AES256.Len())
		rand.Read(material) // never fails: crypto/rand
		return b.importBy(ctx, r, i, key.KeyID, material)
	})
}

// Custody compares imports, durable ones of material that the CMKs have already,
// in both custodies, each beside the shortest loop of bare calls: C_UnwrapKey into
// an object of the session, or of the token, and C_DestroyObject. hsm.ErrUnsupported
// if the token keeps no resident material.
func (b *Bench) Custody(ctx context.Context, callers int) (*Comparison, error) {
	stays, err := b.reside(ctx)
	if err != nil {
		return nil, err
	}
	sealed, err := b.route(ctx, b.offers[0])
	if err != nil {
		return nil, err
	}
	c := &Comparison{name: fmt.Sprintf("import, %s", b.offers[0]), callers: callers, row: custodies}
	err = c.addBare(ctx, b.token, "bare sealed", b.unwrapping(sealed, (*hsm.Bare).Unwrap))
	c.add("sealed", b.importing(sealed, callers))
	unwrap := func(s *hsm.Bare, pair hsm.PairID, wrapped []byte) error {
		return s.UnwrapResident(pair, Instance, wrapped)
	}
	err = errors.Join(err, c.addBare(ctx, b.token, "bare resident", b.unwrapping(stays, unwrap)))
	c.add("resident", b.importing(stays, callers))
	return c, err
}

// CustodyUse compares encryptions of 64 bytes under CMKs of both custodies that
// are open, each beside C_EncryptInit and C_Encrypt.
func (b *Bench) CustodyUse(ctx context.Context, callers int) (*Comparison, error) {
	stays, err := b.reside(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.openAll(ctx); err != nil {
		return nil, err
	}
	open := make([]*hsm.Key, len(stays.imports))
	err = each(len(open), func(i int) error {
		key, err := b.openResident(ctx, stays.imports[i].KeyID)
		open[i] = key
		return err
	})
	if err != nil {
		return nil, err
	}
	c := &Comparison{name: "encrypt 64 bytes", callers: callers, row: custodies}
	err = c.addBare(ctx, b.token, "bare sealed", b.encryptingBare(len(b.keys), b.openKey))
	c.add("sealed", func(int) step { return b.encrypting(b.engine, len(b.keys), b.keyID) })
	err = errors.Join(err, c.addBare(ctx, b.token, "bare resident", b.encryptingBare(len(open), func(i int) *hsm.Key { return open[i] })))
	c.add("resident", func(int) step {
		return b.encrypting(b.engine, len(open), func(i int) string { return stays.imports[i].KeyID })
	})
	return c, err
}

// openResident opens the material of a CMK for bare calls. Closing it would do
// nothing: its object stays.
func (b *Bench) openResident(ctx context.Context, keyID string) (*hsm.Key, error) {
	row, err := b.store.Key(ctx, keyID)
	if err != nil {
		return nil, err
	}
	var m hsm.Material
	if err := m.UnmarshalBinary(row.Material); err != nil {
		return nil, err
	}
	var id hsm.Identity
	copy(id.KCV[:], row.KCV)
	copy(id.MaterialID[:], row.MaterialID)
	return b.token.OpenResident(ctx, m, Instance, []byte(keyID), id)
}

// custodies are the columns of a comparison of both custodies: of the bare calls
// with an object of the session, and with one of the token.
func custodies(c *Comparison) []Metric {
	by := c.tallies()
	bareSealed, sealed, bareResident, resident := by["bare sealed"], by["sealed"], by["bare resident"], by["resident"]
	return []Metric{
		{"bare-session/s", bareSealed.perSecond()},
		{"sealed/s", sealed.perSecond()},
		{"sealed-ratio", sealed.perSecond() / bareSealed.perSecond()},
		{"bare-token/s", bareResident.perSecond()},
		{"resident/s", resident.perSecond()},
		{"resident-ratio", resident.perSecond() / bareResident.perSecond()},
		{"bare-session-cpu-µs", bareSealed.cpu()},
		{"sealed-cpu-µs", sealed.cpu()},
		{"bare-token-cpu-µs", bareResident.cpu()},
		{"resident-cpu-µs", resident.cpu()},
		{"sealed-p50-µs", sealed.percentile(50)},
		{"resident-p50-µs", resident.percentile(50)},
		{"resident-p99-µs", resident.percentile(99)},
	}
}
