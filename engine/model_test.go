package engine_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

// model is what a CMK should be, kept by rules much simpler than the engine's.
type model struct {
	h      *house
	keyID  string
	gone   bool
	state  engine.KeyState // as it was last set; see now
	held   bool            // there is material, unless it has expired
	expire time.Time
	delete time.Time

	materials [][]byte // that the customer has; the first imported is the CMK's
	bound     []byte
	identity  [hsm.MaterialIDLen]byte
	params    engine.ImportParameters
	blobs     [][]byte
}

// now lets time do to the model what it does to a CMK.
func (m *model) now() {
	now := m.h.clock.in(0)
	if m.held && !m.expire.IsZero() && !now.Before(m.expire) {
		m.lose()
	}
	if m.state == engine.PendingDeletion && !now.Before(m.delete) {
		m.gone = true
	}
}

func (m *model) lose() {
	m.held, m.expire = false, time.Time{}
	if m.state != engine.PendingDeletion {
		m.state = engine.PendingImport
	}
}

// refusal is what an operation on a CMK in this state answers, "" if it is
// done.
func (m *model) refusal(allowed ...engine.KeyState) engine.Kind {
	if m.gone {
		return engine.KeyNotFound
	}
	for _, state := range allowed {
		if state == m.state {
			return ""
		}
	}
	return engine.StateModified
}

func (m *model) useRefusal() engine.Kind {
	switch {
	case m.gone:
		return engine.KeyNotFound
	case m.state == engine.Disabled:
		return engine.KeyDisabled
	case m.state == engine.PendingDeletion:
		return engine.KeyPendingDeletion
	case m.state == engine.PendingImport:
		return engine.KeyPendingImport
	}
	return ""
}

// kindOf is the kind of an error, "" of none.
func kindOf(err error) engine.Kind {
	var e *engine.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	if err != nil {
		return engine.Kind("not of the engine: " + err.Error())
	}
	return ""
}

// Whatever is done to a CMK, in whatever order, it is what the model says.
func TestRandomLives(t *testing.T) {
	h := newHouse(t)
	// The walks take years; the token dates pairs by a clock of its own, and
	// they must not seem too old to live.
	h.clock.advance(-20 * 365 * 24 * time.Hour)
	rapid.Check(t, func(r *rapid.T) {
		m := &model{
			h: h, keyID: h.newKey(t, engine.AliyunAES256), state: engine.PendingImport,
			materials: [][]byte{randomBytes(32), randomBytes(32)},
		}
		m.params = h.parameters(t, m.keyID)
		ctx := t.Context()
		step := func(f func(r *rapid.T)) func(r *rapid.T) {
			return func(r *rapid.T) { m.now(); f(r) }
		}
		r.Repeat(map[string]func(*rapid.T){
			"import": step(m.importMaterial),
			"delete material": step(func(r *rapid.T) {
				want := m.refusal(engine.Enabled, engine.Disabled, engine.PendingImport, engine.PendingDeletion)
				require.Equal(r, want, kindOf(h.DeleteKeyMaterial(ctx, m.keyID)))
				if want == "" {
					m.lose()
				}
			}),
			"enable": step(func(r *rapid.T) {
				want := m.refusal(engine.Enabled, engine.Disabled)
				require.Equal(r, want, kindOf(h.EnableKey(ctx, m.keyID)))
				if want == "" {
					m.state = engine.Enabled
				}
			}),
			"disable": step(func(r *rapid.T) {
				want := m.refusal(engine.Enabled, engine.Disabled)
				require.Equal(r, want, kindOf(h.DisableKey(ctx, m.keyID)))
				if want == "" {
					m.state = engine.Disabled
				}
			}),
			"schedule": step(func(r *rapid.T) {
				want := m.refusal(engine.Enabled, engine.Disabled, engine.PendingImport)
				require.Equal(r, want, kindOf(h.ScheduleKeyDeletion(ctx, m.keyID, 7)))
				if want == "" {
					m.state, m.delete = engine.PendingDeletion, h.clock.in(7*24*time.Hour)
				}
			}),
			"cancel": step(func(r *rapid.T) {
				want := m.refusal(engine.PendingDeletion)
				require.Equal(r, want, kindOf(h.CancelKeyDeletion(ctx, m.keyID)))
				if want == "" {
					m.state, m.delete = engine.Enabled, time.Time{}
					if !m.held {
						m.state = engine.PendingImport
					}
				}
			}),
			"encrypt": step(func(r *rapid.T) {
				out, err := h.Encrypt(ctx, m.keyID, []byte("x"), nil)
				require.Equal(r, m.useRefusal(), kindOf(err))
				if err == nil {
					m.blobs = append(m.blobs, out.Blob)
				}
			}),
			"decrypt": step(func(r *rapid.T) {
				if len(m.blobs) == 0 {
					r.Skip("nothing to decrypt")
				}
				want := m.useRefusal()
				if want == engine.KeyNotFound {
					want = engine.InvalidCiphertext
				}
				_, err := h.Decrypt(ctx, rapid.SampledFrom(m.blobs).Draw(r, "blob"), nil)
				require.Equal(r, want, kindOf(err))
			}),
			"wait": step(func(r *rapid.T) {
				h.clock.advance(rapid.SampledFrom([]time.Duration{time.Second, 10 * time.Second, time.Minute}).Draw(r, "time"))
			}),
			"wait for long": step(func(r *rapid.T) {
				if m.gone || m.state != engine.PendingDeletion {
					r.Skip("nothing to wait for")
				}
				h.clock.advance(4 * 24 * time.Hour)
			}),
			"sweep":   func(r *rapid.T) { require.NoError(r, h.Sweep(ctx)) },
			"restart": func(*rapid.T) { h.restart(t) },
			"":        func(r *rapid.T) { m.now(); m.check(t, r) },
		})
	})
}

// importMaterial imports one of the materials, well wrapped or not.
func (m *model) importMaterial(r *rapid.T) {
	ctx := r.Context()
	if !m.gone && !m.h.clock.in(0).Before(m.params.ExpiresAt) {
		var err error
		m.params, err = m.h.GetParametersForImport(ctx, m.keyID, hsm.RSA2048, hsm.OAEPSHA1)
		require.NoError(r, err)
	}
	material := rapid.SampledFrom(m.materials).Draw(r, "material")
	wrapped, err := byok.Wrap(byok.OAEPSHA1, m.params.PublicKey, material)
	require.NoError(r, err)
	in := engine.ImportInput{KeyID: m.keyID, EncryptedKeyMaterial: wrapped, ImportToken: m.params.ImportToken}
	damaged := rapid.SampledFrom([]bool{false, false, false, true}).Draw(r, "damaged")
	if damaged {
		in.EncryptedKeyMaterial[11] ^= 1
	}
	if after := rapid.SampledFrom([]time.Duration{0, time.Second, 30 * time.Second}).Draw(r, "expires"); after != 0 {
		in.ExpireAt = m.h.clock.in(after)
	}

	want := m.refusal(engine.Enabled, engine.Disabled, engine.PendingImport)
	if want == "" && (damaged || m.bound != nil && !bytes.Equal(m.bound, material)) {
		want = engine.InvalidKeyMaterial
	}
	key, err := m.h.ImportKeyMaterial(ctx, in)
	require.Equal(r, want, kindOf(err))
	if err != nil {
		return
	}
	m.bound, m.held, m.expire, m.identity = material, true, in.ExpireAt, key.MaterialID
	if m.state == engine.PendingImport {
		m.state = engine.Enabled
	}
}

// check compares the CMK with the model.
func (m *model) check(tb testing.TB, r *rapid.T) {
	key, err := m.h.DescribeKey(tb.Context(), m.keyID)
	if m.gone {
		require.Equal(r, engine.KeyNotFound, kindOf(err))
		return
	}
	require.NoError(r, err)
	require.Equal(r, m.state, key.State)
	require.Equal(r, m.expire, key.ExpireAt)
	require.Equal(r, m.delete, key.DeleteAt)
	require.Equal(r, m.identity, key.MaterialID)
}
