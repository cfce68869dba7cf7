package engine_test

import (
	"context"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// newResidentHouse is a house whose CMKs are resident.
func newResidentHouse(t *testing.T, settings ...func(*house)) *house {
	t.Helper()
	if err := plainToken().Keeps(hsm.Resident, hsm.AES256); err != nil {
		t.Skipf("no resident key material on this token, but on that of \"make softhsm\": %v", err)
	}
	return newHouse(t, append([]func(*house){with(func(c *engine.Config) { c.Custody = hsm.Resident })}, settings...)...)
}

// requireHeld requires that token and journal hold exactly the material of n
// CMKs, once the sweep has been there.
func (h *house) requireHeld(t *testing.T, n int) {
	t.Helper()
	require.NoError(t, h.Sweep(t.Context()))
	entries, err := h.store.Residents(t.Context(), time.Time{}, 0)
	require.NoError(t, err)
	objects := h.residents(t)
	require.Equal(t, []int{n, n}, []int{len(entries), len(objects)}, "entries and objects")
	for _, r := range entries {
		require.Equal(t, store.ResidentKept, r.State)
		require.Contains(t, ids(objects), hsm.ObjectID(r.ID))
	}
}

// enabledKeys counts the CMKs whose material can be used.
func (h *house) enabledKeys(t *testing.T) int {
	t.Helper()
	_, total, err := h.ListKeys(t.Context(), engine.ListKeysInput{States: []engine.KeyState{engine.Enabled}})
	require.NoError(t, err)
	return total
}

func ids(objects []hsm.ResidentObject) (out []hsm.ObjectID) {
	for _, o := range objects {
		out = append(out, o.ID)
	}
	return out
}

func TestResidentIsRefusedByName(t *testing.T) {
	ctx := t.Context()
	h := newHouse(t, with(func(c *engine.Config) { c.Custody = hsm.Sealed }))
	_, err := h.CreateKey(ctx, engine.CreateKeyInput{Spec: engine.AliyunSM4, Custody: hsm.Resident})
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "SM4")
	_, err = h.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Resident})
	cfg := h.cfg
	cfg.Custody = hsm.Resident
	if plainToken().Keeps(hsm.Resident, hsm.AES256) == nil {
		require.NoError(t, err)
		cfg.OnlyCustody = true
		e, err := engine.New(ctx, cfg)
		require.NoError(t, err)
		_, err = e.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Sealed})
		requireKind(t, engine.UnsupportedOp, err)
		require.NoError(t, e.Close())
		return
	}
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "CKA_VALUE_LEN")
	_, err = engine.New(ctx, cfg)
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "CKA_VALUE_LEN")
}

func TestResidentLife(t *testing.T) {
	ctx := t.Context()
	h := newResidentHouse(t, withPairs(8))
	keyID, material := h.enabledKey(t)
	require.Equal(t, hsm.Resident, h.describe(t, keyID).Custody)
	blob := h.encrypt(t, keyID, "text")
	h.requireHeld(t, 1)
	first := h.residents(t)[0].ID

	h.importInto(t, keyID, material)
	h.requireHeld(t, 1)
	require.NotEqual(t, first, h.residents(t)[0].ID, "another object has taken its place")
	h.requireDecrypts(t, blob, "text")
	h.restart(t)
	h.requireDecrypts(t, blob, "text")

	_, err := h.ImportKeyMaterial(ctx, input(t, h.parameters(t, keyID), randomBytes(32)))
	requireKind(t, engine.InvalidKeyMaterial, err)
	for _, n := range []int{16, 24, 31, 33} {
		_, err := h.ImportKeyMaterial(ctx, input(t, h.parameters(t, keyID), randomBytes(n)))
		requireKind(t, engine.InvalidKeyMaterial, err)
	}
	require.Len(t, h.residents(t), 1, "what is refused is destroyed at once")
	h.requireHeld(t, 1)

	require.NoError(t, h.DeleteKeyMaterial(ctx, keyID))
	require.Empty(t, h.residents(t), "when DeleteKeyMaterial returns it is gone")
	h.requireHeld(t, 0)
	_, err = h.Decrypt(ctx, blob, nil)
	requireKind(t, engine.KeyPendingImport, err)

	in := input(t, h.parameters(t, keyID), material)
	in.ExpireAt = h.clock.in(time.Hour)
	_, err = h.ImportKeyMaterial(ctx, in)
	require.NoError(t, err)
	h.requireDecrypts(t, blob, "text")
	h.clock.advance(2 * time.Hour)
	h.requireHeld(t, 0)

	h.importInto(t, keyID, material)
	require.NoError(t, h.ScheduleKeyDeletion(ctx, keyID, 7))
	h.requireHeld(t, 1)
	h.clock.advance(8 * 24 * time.Hour)
	h.requireHeld(t, 0)
}

// An import token of one custody is of no use to a CMK of the other.
func TestCustodiesDoNotMix(t *testing.T) {
	ctx := t.Context()
	h := newResidentHouse(t)
	resident := h.newKey(t, engine.AliyunAES256)
	sealed, err := h.CreateKey(ctx, engine.CreateKeyInput{Custody: hsm.Sealed})
	require.NoError(t, err)
	mine, theirs := h.parameters(t, resident), h.parameters(t, sealed.KeyID)
	for _, c := range []struct{ to, of engine.ImportParameters }{{mine, theirs}, {theirs, mine}} {
		in := input(t, c.of, randomBytes(32))
		in.KeyID = c.to.KeyID
		_, err := h.ImportKeyMaterial(ctx, in)
		requireKind(t, engine.InvalidImportToken, err)
		// Nor with a MAC that whoever has the PIN can make.
		in.ImportToken, err = h.Forge(ctx, c.of.ImportToken, func(f *engine.Forgery) { f.KeyID = c.to.KeyID })
		require.NoError(t, err)
		_, err = h.ImportKeyMaterial(ctx, in)
		requireKind(t, engine.InvalidImportToken, err)
	}
	h.requireHeld(t, 0)
	h.importInto(t, sealed.KeyID, randomBytes(32))
	h.requireHeld(t, 0)
	require.Equal(t, hsm.Sealed, h.describe(t, sealed.KeyID).Custody)
}

func TestResidentLimit(t *testing.T) {
	ctx := t.Context()
	log, logger := newLog()
	h := newResidentHouse(t, withPairs(8), with(func(c *engine.Config) { c.ResidentLimit, c.Logger = 2, logger }))
	first, material := h.enabledKey(t)
	h.enabledKey(t)
	third := h.newKey(t, engine.AliyunAES256)
	_, err := h.ImportKeyMaterial(ctx, input(t, h.parameters(t, third), randomBytes(32)))
	requireKind(t, engine.LimitExceeded, err)
	require.Contains(t, log.String(), "as much key material as it may")
	h.requireHeld(t, 2)
	h.importInto(t, first, material) // one takes the place of another
	h.requireHeld(t, 2)
	require.NoError(t, h.DeleteKeyMaterial(ctx, first))
	h.importInto(t, third, randomBytes(32))
	h.restart(t)
	require.Contains(t, log.String(), "nearly full")
	require.Len(t, h.Advice(), 1)
	require.Contains(t, h.Advice()[0], "nearly full")
	stats, err := h.Stats(ctx)
	require.NoError(t, err)
	require.Equal(t, []int{2, 2}, []int{stats.Room.Objects, stats.Room.Limit})
	require.NoError(t, h.DeleteKeyMaterial(ctx, third))
	h.clock.advance(time.Minute)
	h.requireHeld(t, 1)
	require.Empty(t, h.Advice())
	require.Contains(t, log.String(), "has room for key material again")
}

// hangUp lets a caller hang up once the journal has the entry of an import.
type hangUp struct {
	store.Store
	cancel context.CancelFunc
}

func (h *hangUp) AddResident(ctx context.Context, r store.Resident, limit int) error {
	err := h.Store.AddResident(ctx, r, limit)
	if h.cancel != nil {
		h.cancel()
	}
	return err
}

// Callers who hang up do not fill journal and token, so that nobody else can
// import.
func TestResidentHangUp(t *testing.T) {
	caller := &hangUp{}
	h := newResidentHouse(t, withPairs(8), with(func(c *engine.Config) { c.ResidentLimit = 1 }),
		withStore(func(s store.Store) store.Store { caller.Store = s; return caller }))
	keyID := h.newKey(t, engine.AliyunAES256)
	in := input(t, h.parameters(t, keyID), randomBytes(32))
	for range 3 {
		var ctx context.Context
		ctx, caller.cancel = context.WithTimeout(t.Context(), time.Minute)
		_, err := h.ImportKeyMaterial(ctx, in)
		requireKind(t, engine.Unavailable, err)
		entries, err := h.store.Residents(t.Context(), time.Time{}, 0)
		require.NoError(t, err)
		require.Empty(t, entries)
		require.Empty(t, h.residents(t))
	}
	caller.cancel = nil
	_, err := h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	h.requireHeld(t, 1)
}

// Material that somebody destroyed in the token is missed, and can come back.
func TestResidentLost(t *testing.T) {
	ctx := t.Context()
	log, logger := newLog()
	h := newResidentHouse(t, withPairs(8), with(func(c *engine.Config) { c.Logger = logger }))
	keyID, material := h.enabledKey(t)
	blob := h.encrypt(t, keyID, "text")
	h.destroyResidents(t)
	_, err := h.Encrypt(ctx, keyID, []byte("x"), nil)
	requireKind(t, engine.MaterialLost, err)
	_, err = h.Decrypt(ctx, blob, nil)
	requireKind(t, engine.MaterialLost, err)
	require.True(t, h.describe(t, keyID).MaterialLost)
	require.Contains(t, log.String(), keyID)
	h.restart(t)
	require.True(t, h.describe(t, keyID).MaterialLost, "found out at the start")
	h.importInto(t, keyID, material)
	require.False(t, h.describe(t, keyID).MaterialLost)
	h.requireDecrypts(t, blob, "text")
	h.requireHeld(t, 1)
}

// Objects of this store that neither a row nor the journal knows go when they
// are old; those of other stores, and young ones, stay.
func TestResidentOrphans(t *testing.T) {
	ctx := t.Context()
	h := newResidentHouse(t)
	h.enabledKey(t)
	token := h.cfg.Token
	pair, err := token.GenerateResidentPair(ctx, h.instance, h.clock.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	plant := func(instance string, age time.Duration) {
		params := engine.ImportParameters{PublicKey: pair.SPKI}
		req := hsm.ResidentRequest{Instance: instance, Now: h.clock.Now().Add(-age), ImportRequest: hsm.ImportRequest{
			Pair: pair.ID, Algorithm: hsm.OAEPSHA1, Spec: hsm.AES256, Context: []byte("nobody"),
			Wrapped: input(t, params, randomBytes(32)).EncryptedKeyMaterial,
		}}
		copy(req.ID[:], randomBytes(16))
		_, err := token.ImportResident(ctx, req)
		require.NoError(t, err)
	}
	const stranger = "fedcba9876543210"
	plant(h.instance, time.Hour)
	plant(h.instance, time.Minute)
	plant(stranger, time.Hour)
	h.restart(t)
	require.Len(t, h.residents(t), 2, "the old one is gone")
	h.clock.advance(time.Hour)
	h.requireHeld(t, 1)
	others, err := token.Residents(ctx, stranger)
	require.NoError(t, err)
	require.Len(t, others, 1)
	require.NoError(t, token.DestroyResident(ctx, stranger, others[0].ID))
}

// mortal lets a process die at one of its writes: from then on neither the
// store nor the token does anything for it.
type mortal struct {
	store.Store
	die func() // what else dies

	mu         sync.Mutex
	left       int // writes until death; -1: immortal
	tookEffect bool
	dead       bool
}

// lives has the process live for so many writes more.
func (m *mortal) lives(writes int, tookEffect bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.left, m.tookEffect, m.dead = writes, tookEffect, false
}

func (m *mortal) write(do func() error) error {
	m.mu.Lock()
	fatal := m.left == 0 && !m.dead
	if m.left > 0 {
		m.left--
	}
	m.dead = m.dead || fatal
	dead := m.dead
	m.mu.Unlock()
	if fatal {
		if m.tookEffect {
			_ = do()
		}
		m.die()
	}
	if dead {
		return store.ErrUnavailable
	}
	return do()
}

func (m *mortal) AddResident(ctx context.Context, r store.Resident, limit int) error {
	return m.write(func() error { return m.Store.AddResident(ctx, r, limit) })
}

func (m *mortal) UpdateKey(ctx context.Context, u store.Update) error {
	return m.write(func() error { return m.Store.UpdateKey(ctx, u) })
}

func (m *mortal) CondemnResident(ctx context.Context, id [16]byte) error {
	return m.write(func() error { return m.Store.CondemnResident(ctx, id) })
}

func (m *mortal) RemoveResidents(ctx context.Context, list [][16]byte) error {
	return m.write(func() error { return m.Store.RemoveResidents(ctx, list) })
}

// Whatever a process was about when it died, the next one ends with the
// material of every answered import, of no other, and with no orphan.
func TestResidentDeath(t *testing.T) {
	if err := plainToken().Keeps(hsm.Resident, hsm.AES256); err != nil {
		t.Skipf("no resident key material on this token, but on that of \"make softhsm\": %v", err)
	}
	ctx := t.Context()
	cfg := softhsm.New(t, softhsm.WithKeys()).Config()
	cfg.Patience = 50 * time.Millisecond
	tap := hsmtest.On(t, cfg.Module)
	token, err := hsm.Open(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	m := &mortal{left: -1, die: func() { tap.Inject(hsmtest.Fault{RV: deviceRemoved, Times: -1}) }}
	h := newHouse(t, withToken(token), with(func(c *engine.Config) { c.Custody, c.PairSpecs = hsm.Resident, []hsm.PairSpec{hsm.RSA2048} }),
		withStore(func(s store.Store) store.Store { m.Store = s; return m }))
	held := 0
	for _, what := range []string{"import", "refused import", "re-import", "delete"} {
		for n := range 3 {
			for _, tookEffect := range []bool{false, true} {
				if tookEffect != (n%2 == 0) && os.Getenv("KEYFERRY_SLOW") == "" {
					continue // each is a new process, as far as the token goes: half of them by default
				}
				t.Run(fmt.Sprintf("%s/%d/%t", what, n, tookEffect), func(t *testing.T) {
					keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
					if what != "import" {
						h.importInto(t, keyID, material)
					}
					if what == "refused import" {
						material = randomBytes(32)
					}
					in := input(t, h.parameters(t, keyID), material)
					h.rest(t) // or the generator dies, too, and leaves what goes when it is old
					m.lives(n, tookEffect)
					var answer error
					if what == "delete" {
						answer = h.DeleteKeyMaterial(ctx, keyID)
					} else {
						_, answer = h.ImportKeyMaterial(ctx, in)
					}
					_ = h.Engine.Close() // it may be dead
					_ = token.Close()
					tap.Heal()
					m.lives(-1, false)
					// The next process logs in to the token anew.
					token, err = hsm.Open(ctx, cfg)
					require.NoError(t, err)
					h.cfg.Token = token
					h.start(t)
					h.clock.advance(11 * time.Minute)
					state := h.describe(t, keyID).State
					if state == engine.Enabled {
						held++
						h.encrypt(t, keyID, "x")
					}
					h.requireHeld(t, held)
					switch {
					case what == "delete" && answer == nil:
						require.Equal(t, engine.PendingImport, state)
					case what == "re-import", what == "refused import", answer == nil:
						require.Equal(t, engine.Enabled, state)
					}
				})
			}
		}
	}
}

// slowReader reads the rows of CMKs, and something happens before it goes on.
type slowReader struct {
	store.Store
	meanwhile func()
}

func (s *slowReader) Key(ctx context.Context, keyID string) (store.Key, error) {
	row, err := s.Store.Key(ctx, keyID)
	if f := s.meanwhile; f != nil {
		s.meanwhile = nil
		f()
	}
	return row, err
}

// Material that was replaced or deleted while somebody was about to open it is
// not lost: what is there now counts.
func TestResidentReplacedWhileOpening(t *testing.T) {
	reader := &slowReader{}
	log, logger := newLog()
	h := newResidentHouse(t, with(func(c *engine.Config) { c.Logger = logger }),
		withStore(func(s store.Store) store.Store { reader.Store = s; return reader }))
	keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
	in := input(t, h.parameters(t, keyID), material)
	imports := func() {
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.NoError(t, err)
	}
	imports()
	reader.meanwhile = imports
	start := time.Now()
	h.encrypt(t, keyID, "text")
	require.Nil(t, reader.meanwhile)
	reader.meanwhile = func() { require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID)) }
	h.restart(t)
	_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
	requireKind(t, engine.KeyPendingImport, err)
	require.Less(t, time.Since(start), hsm.SearchPatience, "what is known to be gone is not looked for")
	require.NotContains(t, log.String(), "not in the token any more")
}
