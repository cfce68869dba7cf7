package engine_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/engine/store/sqlite"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// faultyStore is a store that something happens to. Nil means nothing.
type faultyStore struct {
	store.Store
	countFailure func() // before it
	addPair      func() error
	updateKey    func(update func() error) error
}

func (s *faultyStore) CountFailure(ctx context.Context, id [16]byte) (int, error) {
	if s.countFailure != nil {
		s.countFailure()
	}
	return s.Store.CountFailure(ctx, id)
}

func (s *faultyStore) AddPair(ctx context.Context, pair store.Pair) error {
	if s.addPair != nil {
		return s.addPair()
	}
	return s.Store.AddPair(ctx, pair)
}

func (s *faultyStore) UpdateKey(ctx context.Context, change store.Update) error {
	update := func() error { return s.Store.UpdateKey(ctx, change) }
	if s.updateKey != nil {
		return s.updateKey(update)
	}
	return update()
}

// A database that has no room answers Unavailable; nothing that was answered
// otherwise is lost, and nothing is half done.
func TestFullDisk(t *testing.T) {
	h := newHouse(t, func(h *house) { h.database.MaxSize = 600 << 10 })
	used, _ := h.enabledKey(t)
	blob := h.encrypt(t, used, "secret")
	var waiting []string
	for range 40 {
		waiting = append(waiting, h.newKey(t, engine.AliyunAES256))
	}
	params := make([]engine.ImportParameters, len(waiting))
	for i, keyID := range waiting {
		params[i] = h.parameters(t, keyID)
	}
	created := len(waiting) + 1
	for size := engine.MaxDescription; size > 0; size /= 2 {
		for {
			_, err := h.CreateKey(t.Context(), engine.CreateKeyInput{Description: strings.Repeat("x", size)})
			if err != nil {
				requireKind(t, engine.Unavailable, err)
				break
			}
			created++
		}
	}

	imported := make(map[string]bool)
	full := 0
	for i, keyID := range waiting {
		_, err := h.ImportKeyMaterial(t.Context(), input(t, params[i], randomBytes(32)))
		if err != nil {
			requireKind(t, engine.Unavailable, err)
			full++
		}
		imported[keyID] = err == nil
	}
	require.Positive(t, full, "the disk is full")
	h.requireDecrypts(t, blob, "secret")

	h.shut(t)
	h.database.MaxSize = 0
	h.open(t)
	_, total, err := h.ListKeys(t.Context(), engine.ListKeysInput{})
	require.NoError(t, err)
	require.Equal(t, created, total)
	for i, keyID := range waiting {
		want := engine.PendingImport
		if imported[keyID] {
			want = engine.Enabled
		}
		require.Equal(t, want, h.describe(t, keyID).State)
		if !imported[keyID] {
			_, err := h.ImportKeyMaterial(t.Context(), input(t, params[i], randomBytes(32)))
			require.NoError(t, err)
		}
	}
	h.requireDecrypts(t, blob, "secret")
}

// While another program has the database locked, what needs to write is
// unavailable: bad material too, since its failure cannot be counted.
func TestLockedDatabase(t *testing.T) {
	h := newHouse(t, func(h *house) { h.database.BusyTimeout = 10 * time.Millisecond })
	keyID, material := h.enabledKey(t)
	params := h.parameters(t, keyID)
	blob := h.encrypt(t, keyID, "secret")
	before := h.describe(t, keyID)

	db := h.burgle(t)
	defer func() { require.NoError(t, db.Close()) }()
	conn, err := db.Conn(t.Context())
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	require.NoError(t, err)

	bad := input(t, params, material)
	bad.EncryptedKeyMaterial[5] ^= 1
	for name, do := range map[string]func() error{
		"good material": func() error {
			_, err := h.ImportKeyMaterial(t.Context(), input(t, params, material))
			return err
		},
		"bad material": func() error {
			_, err := h.ImportKeyMaterial(t.Context(), bad)
			return err
		},
		"disable":  func() error { return h.DisableKey(t.Context(), keyID) },
		"delete":   func() error { return h.DeleteKeyMaterial(t.Context(), keyID) },
		"schedule": func() error { return h.ScheduleKeyDeletion(t.Context(), keyID, 7) },
	} {
		t.Run(name, func(t *testing.T) {
			requireKind(t, engine.Unavailable, do())
			require.Equal(t, before, h.describe(t, keyID))
			h.requireDecrypts(t, blob, "secret")
		})
	}
	_, err = conn.ExecContext(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	_, err = h.ImportKeyMaterial(t.Context(), bad)
	require.Equal(t, refused, err)
	_, err = h.ImportKeyMaterial(t.Context(), input(t, params, material))
	require.NoError(t, err)
}

// A commit whose answer is lost may have taken effect. Either way what the
// engine does next is what the database says.
func TestLostCommit(t *testing.T) {
	var faulty *faultyStore
	h := newHouse(t, withStore(func(s store.Store) store.Store {
		faulty = &faultyStore{Store: s}
		return faulty
	}))
	for _, tookEffect := range []bool{false, true} {
		for name, test := range map[string]struct {
			do   func(c *customer) error
			then any // of an Encrypt, if it took effect
		}{
			"disable":  {func(c *customer) error { return h.DisableKey(t.Context(), c.keyID) }, engine.KeyDisabled},
			"delete":   {func(c *customer) error { return h.DeleteKeyMaterial(t.Context(), c.keyID) }, engine.KeyPendingImport},
			"schedule": {func(c *customer) error { return h.ScheduleKeyDeletion(t.Context(), c.keyID, 7) }, engine.KeyPendingDeletion},
			"import": {func(c *customer) error {
				_, err := h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
				return err
			}, engine.Kind("")},
		} {
			t.Run(fmt.Sprintf("%s/took effect: %t", name, tookEffect), func(t *testing.T) {
				c := newCustomer(t, h)
				faulty.updateKey = func(update func() error) error {
					if tookEffect {
						require.NoError(t, update())
					}
					return fmt.Errorf("%w: the answer is lost", store.ErrUnavailable)
				}
				requireKind(t, engine.Unavailable, test.do(c))
				faulty.updateKey = nil
				_, err := h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
				if tookEffect {
					require.Equal(t, test.then, kindOf(err))
				} else {
					require.NoError(t, err)
				}
			})
		}
	}
}

// A change that its caller gave up takes effect later, and then nobody uses
// what it made stale.
func TestCommitAfterItsCallerGaveUp(t *testing.T) {
	goOn, began, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	var faulty *faultyStore
	h := newHouse(t, withStore(func(s store.Store) store.Store {
		faulty = &faultyStore{Store: s}
		return faulty
	}))
	keyID, _ := h.enabledKey(t)
	faulty.updateKey = func(update func() error) error {
		close(began)
		<-goOn
		defer close(ended)
		return update()
	}
	ctx, giveUp := context.WithCancel(t.Context())
	answer := make(chan error)
	go func() { answer <- h.DisableKey(ctx, keyID) }()
	<-began
	giveUp()
	err := <-answer
	requireKind(t, engine.Unavailable, err)
	require.ErrorIs(t, err, context.Canceled)

	h.encrypt(t, keyID, "nothing has changed yet, and the key is open now")
	require.Equal(t, 1, h.OpenKeys())
	close(goOn)
	<-ended
	require.Eventually(t, func() bool {
		_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
		return kindOf(err) == engine.KeyDisabled
	}, time.Minute, time.Millisecond)
}

// The database of a running engine cannot be opened a second time.
func TestSecondEngineOnOneDatabase(t *testing.T) {
	h := newHouse(t)
	_, err := sqlite.Open(t.Context(), h.database)
	require.Error(t, err)
}

func TestHealth(t *testing.T) {
	h := newHouse(t)
	require.NoError(t, h.Health(t.Context()))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Error(t, h.Health(ctx))
}

func TestAfterClose(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	h.encrypt(t, keyID, "x")
	require.NoError(t, h.Engine.Close())
	require.NoError(t, h.Engine.Close(), "twice is once")
	require.Zero(t, h.OpenKeys())
	_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
	requireKind(t, engine.Unavailable, err)
	requireKind(t, engine.Unavailable, h.DisableKey(t.Context(), keyID))
}

func TestConfigIsChecked(t *testing.T) {
	_, err := engine.New(t.Context(), engine.Config{PoolSize: -1, FailureFloor: -1})
	for _, field := range []string{"Token", "Store", "PoolSize", "FailureFloor"} {
		require.ErrorContains(t, err, "Config."+field)
	}
}

// What the engine adds to the token's own calls: one MAC to an import, for the
// new row, and one more for each row and import token that this process has not
// seen before; nothing to the use of an open key.
func TestCallsOfTheToken(t *testing.T) {
	h := newHouse(t, sealed)
	keyID, material := h.enabledKey(t)
	h.waitForPairs(t, 1)
	in := input(t, h.parameters(t, keyID), material)
	h.encrypt(t, keyID, "x")

	tap := hsmtest.On(t, module(t))
	calls := func(do func()) []string {
		tap.Reset()
		do()
		// Sessions are opened when they are first used.
		return slices.DeleteFunc(tap.Sequence(), func(call string) bool { return call == "C_OpenSession" })
	}
	bare := calls(func() { h.bareImport(t, in) })
	require.Equal(t, "C_UnwrapKey", bare[0])
	mac := []string{"C_SignInit", "C_Sign"}
	closed := []string{"C_DestroyObject"}
	importing := func() {
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.NoError(t, err)
	}
	require.Equal(t, slices.Concat(bare, mac, closed), calls(importing))
	h.restart(t)
	require.Equal(t, slices.Concat(mac, mac, bare, mac), calls(importing), "a row and an import token of another process")

	var blob []byte
	encrypt := []string{"C_EncryptInit", "C_Encrypt"}
	require.Equal(t, slices.Concat([]string{"C_UnwrapKey"}, mac, encrypt),
		calls(func() { blob = h.encrypt(t, keyID, "x") }), "a miss, and the count of uses")
	require.Equal(t, encrypt, calls(func() { h.encrypt(t, keyID, "x") }), "a hit")
	require.Equal(t, []string{"C_DecryptInit", "C_Decrypt"}, calls(func() { h.requireDecrypts(t, blob, "x") }))
	require.Empty(t, calls(func() { h.describe(t, keyID) }))
	require.Equal(t, mac, calls(func() { h.parameters(t, keyID) }))
	require.Equal(t, slices.Concat(mac, closed), calls(func() { require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID)) }))
}

func module(tb testing.TB) string {
	tb.Helper()
	path, err := softhsm.FindModule()
	require.NoError(tb, err)
	return path
}

// bareImport is the token's part of an import alone.
func (h *house) bareImport(tb testing.TB, in engine.ImportInput) {
	tb.Helper()
	row, err := h.store.Key(tb.Context(), in.KeyID)
	require.NoError(tb, err)
	_, err = h.cfg.Token.Import(tb.Context(), hsm.ImportRequest{
		Pair: hsm.PairID(row.PairID), Algorithm: hsm.Algorithm(row.WrappingAlgorithm),
		Wrapped: in.EncryptedKeyMaterial, Spec: hsm.AES256, Context: []byte(in.KeyID),
	})
	require.NoError(tb, err)
}

// count counts the objects that a second client of the same library sees: those
// of the token and of all sessions.
func count(tb testing.TB, on *softhsm.Token, attrs ...*pkcs11.Attribute) (objects int) {
	tb.Helper()
	p := pkcs11.New(on.Module)
	require.NotNil(tb, p)
	slots, err := p.GetSlotList(true)
	require.NoError(tb, err)
	for _, slot := range slots {
		info, err := p.GetTokenInfo(slot)
		require.NoError(tb, err)
		if info.Label != on.Label {
			continue
		}
		session, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
		require.NoError(tb, err)
		require.NoError(tb, p.FindObjectsInit(session, attrs))
		for {
			found, _, err := p.FindObjects(session, 100)
			require.NoError(tb, err)
			if len(found) == 0 {
				break
			}
			objects += len(found)
		}
		require.NoError(tb, p.FindObjectsFinal(session))
		require.NoError(tb, p.CloseSession(session))
		return objects
	}
	require.FailNow(tb, "the token is not there")
	return 0
}

// Nothing of imports, refusals, uses and evictions stays behind in the token,
// and sessions do not grow.
func TestNothingLeaks(t *testing.T) {
	on := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, on.Module)
	cfg := on.Config()
	cfg.Sessions = 4
	token, err := hsm.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	h := newHouse(t, withToken(token), with(func(c *engine.Config) { c.CacheSize, c.FailureBudget = 3, 1000 }))
	var customers []*customer
	for range 6 {
		customers = append(customers, newCustomer(t, h))
	}
	h.waitForPairs(t, 1)
	work := func() {
		inParallel(40, func(i int) error {
			c := customers[i%len(customers)]
			in := input(t, c.params, c.material)
			if i%3 == 0 {
				in.EncryptedKeyMaterial[3] ^= 1
			}
			_, _ = h.ImportKeyMaterial(t.Context(), in)
			_, _ = h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
			_, _ = h.Decrypt(t.Context(), c.blob, map[string]string{"wrong": "context"})
			return nil
		})
	}
	work()
	require.Equal(t, 3, h.OpenKeys())
	before := count(t, on)
	for range 5 {
		work()
	}
	becomes := func(n int, what string) {
		t.Helper()
		require.Eventually(t, func() bool { return count(t, on) == n }, 10*time.Second, time.Millisecond, what)
	}
	becomes(before, "what was imported, used and evicted is gone")
	require.LessOrEqual(t, tap.Sessions(), 4+2)

	for _, c := range customers {
		require.NoError(t, h.DeleteKeyMaterial(t.Context(), c.keyID))
	}
	held := 3 // what is open of sealed material
	if h.cfg.Custody == hsm.Resident {
		held = len(customers)
	}
	becomes(before-held, "no handle outlives its material")
}

// Return values of the token, for faults.
const (
	deviceError          = 0x30
	deviceRemoved        = 0x32
	sessionHandleInvalid = 0xb3
)

// A token that goes away makes requests unavailable; when it is back, all is
// as it was, open keys too.
func TestTokenGoesAway(t *testing.T) {
	on := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, on.Module)
	cfg := on.Config()
	cfg.Patience = 50 * time.Millisecond
	token, err := hsm.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	h := newHouse(t, withToken(token))
	c := newCustomer(t, h)
	h.waitForPairs(t, 1)

	tap.Inject(hsmtest.Fault{RV: deviceRemoved, Times: -1})
	for range 3 {
		_, err = h.Encrypt(t.Context(), c.keyID, []byte("x"), nil)
		requireKind(t, engine.Unavailable, err)
		_, err = h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
		requireKind(t, engine.Unavailable, err)
		h.describe(t, c.keyID) // it has seen that row
		requireKind(t, engine.Unavailable, h.Health(t.Context()))
	}
	tap.Heal()
	require.Eventually(t, func() bool { return h.Health(t.Context()) == nil }, time.Minute, 10*time.Millisecond)
	h.requireDecrypts(t, c.blob, "secret")
	_, err = h.ImportKeyMaterial(t.Context(), input(t, c.params, c.material))
	require.NoError(t, err)
}

// Whichever call of an import fails, and whether or not it took effect: the
// import succeeds or is unavailable, is whole or has changed nothing, and is
// never taken for bad material.
func TestEveryCallOfAnImportFails(t *testing.T) {
	on := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, on.Module)
	token := on.Open(t)
	h := newHouse(t, withToken(token), with(func(c *engine.Config) { c.FailureBudget = 1 }))
	keyID, material := h.newKey(t, engine.AliyunAES256), randomBytes(32)
	params := h.parameters(t, keyID)
	h.waitForPairs(t, 1)
	in := input(t, params, material)
	_, err := h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	before := count(t, on)

	faults := []hsmtest.Fault{
		{RV: sessionHandleInvalid},
		{RV: sessionHandleInvalid, TookEffect: true},
		{RV: deviceError},
		{RV: deviceError, TookEffect: true},
		{RV: deviceRemoved},
	}
	for _, fault := range faults {
		for fired := true; fired; fault.After++ {
			require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
			tap.Inject(fault)
			_, err := h.ImportKeyMaterial(t.Context(), in)
			fired = tap.Heal() > 0
			switch kindOf(err) {
			case "":
			case engine.Unavailable:
				require.True(t, fired, "%+v: %v", fault, err)
			default:
				require.NoError(t, err, "%+v", fault)
			}
			key := h.describe(t, keyID)
			require.Equal(t, err == nil, key.State == engine.Enabled, "%+v: %v", fault, err)
		}
		require.Greater(t, fault.After, 10, "an import makes that many calls")
	}
	h.clock.advance(11 * time.Minute) // what an import may have left is old
	require.NoError(t, h.Sweep(t.Context()))
	_, err = h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	require.Equal(t, before, count(t, on))
}
