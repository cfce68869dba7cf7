package hsmtest

import (
	"errors"
	"fmt"
	"sync/atomic"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// Census counts what this process has open of a module, for as long as a test
// may run: unlike a Tap it remembers nothing else.
type Census struct {
	module   *p11.Module
	sessions atomic.Int64
}

// Count begins a Census of the module at path, which ends with the test.
func Count(tb TB, path string) *Census {
	tb.Helper()
	c := &Census{module: load(tb, path)}
	c.module.SetHook(c)
	tb.Cleanup(func() { c.module.SetHook(nil) })
	return c
}

// Before implements the seam's hook.
func (*Census) Before(p11.Func) p11.RV { return p11.OK }

// After implements the seam's hook.
func (c *Census) After(fn p11.Func, rv p11.RV) p11.RV {
	switch {
	case rv != p11.OK:
	case fn == "C_OpenSession":
		c.sessions.Add(1)
	case fn == "C_CloseSession":
		c.sessions.Add(-1)
	case fn == "C_Finalize":
		c.sessions.Store(0)
	}
	return rv
}

// Sessions is how many are open of those that were opened since Count.
func (c *Census) Sessions() int { return int(c.sessions.Load()) }

// Objects is how many objects this process sees on the token with that label:
// those on the token and those of all its sessions.
func (c *Census) Objects(label string) (n int, err error) {
	tokens, err := c.module.Tokens()
	if err != nil {
		return 0, err
	}
	for _, token := range tokens {
		if token.Label != label {
			continue
		}
		s, err := c.module.OpenSession(token.Slot)
		if err != nil {
			return 0, err
		}
		objects, err := s.FindObjects(p11.NewTemplate())
		return len(objects), errors.Join(err, s.Close())
	}
	return 0, fmt.Errorf("hsmtest: no token has the label %q", label)
}
