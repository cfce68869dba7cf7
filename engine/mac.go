package engine

import (
	"context"
	"crypto/sha256"
	"sync"

	"github.com/keyferry/keyferry/hsm"
)

// authority makes and verifies the MACs of rows and import tokens. The key is
// in the token; what the token has once made or verified is remembered by its
// digest, so that it is not asked again for what has not changed: most of what
// a process reads it has written itself.
//
// To remember is as good as to ask: a digest stands for the domain, the record
// and the MAC, every byte of them, and the answer cannot change.
type authority struct {
	token *hsm.Token
	size  int // how many digests a generation holds

	mu         sync.Mutex
	young, old map[[sha256.Size]byte]struct{}
}

func newAuthority(token *hsm.Token, size int) *authority {
	return &authority{token: token, size: size, young: make(map[[sha256.Size]byte]struct{})}
}

// sign returns the MAC of a record.
func (a *authority) sign(ctx context.Context, domain string, record []byte) ([]byte, error) {
	mac, err := a.token.MAC(ctx, domain, record)
	if err != nil {
		return nil, err
	}
	a.remember(digest(domain, record, mac[:]))
	return mac[:], nil
}

// verify returns hsm.ErrUntrusted if the MAC of a record is not its MAC.
func (a *authority) verify(ctx context.Context, domain string, record, mac []byte) error {
	d := digest(domain, record, mac)
	if a.knows(d) {
		return nil
	}
	if err := a.token.VerifyMAC(ctx, mac, domain, record); err != nil {
		return err
	}
	a.remember(d)
	return nil
}

func digest(domain string, record, mac []byte) [sha256.Size]byte {
	b := make([]byte, 0, 3*fieldLen+len(domain)+len(record)+len(mac))
	b = appendField(b, domain)
	b = appendField(b, record)
	return sha256.Sum256(appendField(b, mac))
}

func (a *authority) knows(d [sha256.Size]byte) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, ok := a.young[d]; ok {
		return true
	}
	_, ok := a.old[d]
	if ok {
		a.add(d) // so that what is asked for stays
	}
	return ok
}

func (a *authority) remember(d [sha256.Size]byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.add(d)
}

// add remembers a digest, and forgets those that were not asked for since a
// whole generation was added. The caller holds authority.mu.
func (a *authority) add(d [sha256.Size]byte) {
	if len(a.young) >= a.size {
		a.young, a.old = make(map[[sha256.Size]byte]struct{}, a.size), a.young
	}
	a.young[d] = struct{}{}
}
