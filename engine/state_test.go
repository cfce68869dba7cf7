package engine_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
)

// situation is a state of a CMK and how it got there.
type situation struct {
	name     string
	state    engine.KeyState
	material bool
	prepare  func(tb testing.TB, h *house, keyID string)
}

var situations = []situation{
	{"Enabled", engine.Enabled, true, func(testing.TB, *house, string) {}},
	{"Disabled", engine.Disabled, true, func(tb testing.TB, h *house, keyID string) {
		require.NoError(tb, h.DisableKey(tb.Context(), keyID))
	}},
	{"PendingDeletion", engine.PendingDeletion, true, func(tb testing.TB, h *house, keyID string) {
		require.NoError(tb, h.ScheduleKeyDeletion(tb.Context(), keyID, 7))
	}},
	{"PendingDeletion without material", engine.PendingDeletion, false, func(tb testing.TB, h *house, keyID string) {
		require.NoError(tb, h.DeleteKeyMaterial(tb.Context(), keyID))
		require.NoError(tb, h.ScheduleKeyDeletion(tb.Context(), keyID, 7))
	}},
	{"PendingImport", engine.PendingImport, false, func(tb testing.TB, h *house, keyID string) {
		require.NoError(tb, h.DeleteKeyMaterial(tb.Context(), keyID))
	}},
}

// action is one operation on a CMK, and what the state table of the API says
// of it: the state it leads to, or the kind of the refusal, in the order of
// situations.
type action struct {
	name string
	do   func(tb testing.TB, h *house, c *customer) error
	want [5]any
}

// customer has a CMK, its material and what he encrypted under it.
type customer struct {
	keyID    string
	material []byte
	params   engine.ImportParameters
	blob     []byte
}

var actions = []action{
	{"Encrypt", func(tb testing.TB, h *house, c *customer) error {
		_, err := h.Encrypt(tb.Context(), c.keyID, []byte("x"), nil)
		return err
	}, use},
	{"Decrypt", func(tb testing.TB, h *house, c *customer) error {
		_, err := h.Decrypt(tb.Context(), c.blob, nil)
		return err
	}, use},
	{"ReEncrypt", func(tb testing.TB, h *house, c *customer) error {
		_, err := h.ReEncrypt(tb.Context(), engine.ReEncryptInput{Blob: c.blob, KeyID: c.keyID})
		return err
	}, use},
	{"GenerateDataKey", func(tb testing.TB, h *house, c *customer) error {
		_, _, err := h.GenerateDataKey(tb.Context(), engine.DataKeyInput{KeyID: c.keyID})
		return err
	}, use},
	{"GenerateDataKeyWithoutPlaintext", func(tb testing.TB, h *house, c *customer) error {
		_, err := h.GenerateDataKeyWithoutPlaintext(tb.Context(), engine.DataKeyInput{KeyID: c.keyID})
		return err
	}, use},
	{
		"EnableKey", func(tb testing.TB, h *house, c *customer) error { return h.EnableKey(tb.Context(), c.keyID) },
		[5]any{engine.Enabled, engine.Enabled, engine.StateModified, engine.StateModified, engine.StateModified},
	},
	{
		"DisableKey", func(tb testing.TB, h *house, c *customer) error { return h.DisableKey(tb.Context(), c.keyID) },
		[5]any{engine.Disabled, engine.Disabled, engine.StateModified, engine.StateModified, engine.StateModified},
	},
	{
		"ScheduleKeyDeletion", func(tb testing.TB, h *house, c *customer) error {
			return h.ScheduleKeyDeletion(tb.Context(), c.keyID, 30)
		},
		[5]any{engine.PendingDeletion, engine.PendingDeletion, engine.StateModified, engine.StateModified, engine.PendingDeletion},
	},
	{
		"CancelKeyDeletion", func(tb testing.TB, h *house, c *customer) error { return h.CancelKeyDeletion(tb.Context(), c.keyID) },
		[5]any{engine.StateModified, engine.StateModified, engine.Enabled, engine.PendingImport, engine.StateModified},
	},
	{
		"GetParametersForImport", func(tb testing.TB, h *house, c *customer) error {
			_, err := h.GetParametersForImport(tb.Context(), c.keyID, hsm.RSA2048, hsm.OAEPSHA1)
			return err
		},
		[5]any{engine.Enabled, engine.Disabled, engine.PendingDeletion, engine.PendingDeletion, engine.PendingImport},
	},
	{
		"ImportKeyMaterial", func(tb testing.TB, h *house, c *customer) error {
			_, err := h.ImportKeyMaterial(tb.Context(), input(tb, c.params, c.material))
			return err
		},
		[5]any{engine.Enabled, engine.Disabled, engine.StateModified, engine.StateModified, engine.Enabled},
	},
	{
		"DeleteKeyMaterial", func(tb testing.TB, h *house, c *customer) error { return h.DeleteKeyMaterial(tb.Context(), c.keyID) },
		[5]any{engine.PendingImport, engine.PendingImport, engine.PendingDeletion, engine.PendingDeletion, engine.PendingImport},
	},
	{
		"DescribeKey", func(tb testing.TB, h *house, c *customer) error {
			_, err := h.DescribeKey(tb.Context(), c.keyID)
			return err
		},
		[5]any{engine.Enabled, engine.Disabled, engine.PendingDeletion, engine.PendingDeletion, engine.PendingImport},
	},
}

var use = [5]any{engine.Enabled, engine.KeyDisabled, engine.KeyPendingDeletion, engine.KeyPendingDeletion, engine.KeyPendingImport}

func TestStateTable(t *testing.T) {
	h := newHouse(t)
	for i, from := range situations {
		for _, action := range actions {
			t.Run(from.name+"/"+action.name, func(t *testing.T) {
				c := newCustomer(t, h)
				from.prepare(t, h, c.keyID)
				before := h.describe(t, c.keyID)
				require.Equal(t, from.state, before.State)

				err := action.do(t, h, c)
				after := h.describe(t, c.keyID)
				switch want := action.want[i].(type) {
				case engine.Kind:
					requireKind(t, want, err)
					require.Equal(t, before, after, "a refused operation changes nothing")
				case engine.KeyState:
					require.NoError(t, err)
					require.Equal(t, want, after.State)
				}
				require.Equal(t, before.MaterialID, after.MaterialID)
				require.Equal(t, after.State == engine.PendingDeletion, !after.DeleteAt.IsZero())
				if after.State == engine.Enabled {
					h.requireDecrypts(t, c.blob, "secret")
				}
			})
		}
	}
}

func newCustomer(tb testing.TB, h *house) *customer {
	tb.Helper()
	c := &customer{keyID: h.newKey(tb, engine.AliyunAES256), material: randomBytes(32)}
	c.params = h.parameters(tb, c.keyID)
	_, err := h.ImportKeyMaterial(tb.Context(), input(tb, c.params, c.material))
	require.NoError(tb, err)
	c.blob = h.encrypt(tb, c.keyID, "secret")
	return c
}

// What is idempotent writes nothing.
func TestIdempotence(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	revision := func() int64 {
		row, err := h.store.Key(t.Context(), keyID)
		require.NoError(t, err)
		return row.Revision
	}
	start := revision()
	require.NoError(t, h.EnableKey(t.Context(), keyID))
	require.Equal(t, start, revision())
	require.NoError(t, h.DisableKey(t.Context(), keyID))
	require.NoError(t, h.DisableKey(t.Context(), keyID))
	require.Equal(t, start+1, revision())
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	require.Equal(t, start+2, revision())
}

func TestScheduledDeletion(t *testing.T) {
	h := newHouse(t)
	keyID, _ := h.enabledKey(t)
	blob := h.encrypt(t, keyID, "secret")
	for _, days := range []int{-1, 0, 6, 367} {
		err := h.ScheduleKeyDeletion(t.Context(), keyID, days)
		require.Equal(t, "PendingWindowInDays", requireKind(t, engine.InvalidParameter, err).Parameter)
	}
	require.NoError(t, h.ScheduleKeyDeletion(t.Context(), keyID, 7))
	require.Equal(t, h.clock.in(7*24*time.Hour), h.describe(t, keyID).DeleteAt)
	h.clock.advance(7*24*time.Hour - time.Second)
	require.NoError(t, h.Sweep(t.Context()))
	require.Equal(t, engine.PendingDeletion, h.describe(t, keyID).State)

	h.clock.advance(time.Second)
	gone := func() {
		_, err := h.DescribeKey(t.Context(), keyID)
		requireKind(t, engine.KeyNotFound, err)
		requireKind(t, engine.KeyNotFound, h.CancelKeyDeletion(t.Context(), keyID))
		_, err = h.Decrypt(t.Context(), blob, nil)
		requireKind(t, engine.InvalidCiphertext, err)
		keys, _, err := h.ListKeys(t.Context(), engine.ListKeysInput{})
		require.NoError(t, err)
		require.Empty(t, keys)
	}
	gone()
	require.NoError(t, h.Sweep(t.Context()))
	gone()
	_, err := h.store.Key(t.Context(), keyID)
	require.Error(t, err, "the sweep has removed the row")
}

func TestCreateKey(t *testing.T) {
	h := newHouse(t)
	for parameter, in := range map[string]engine.CreateKeyInput{
		"KeySpec":     {Spec: "RSA_2048"},
		"Description": {Description: strings.Repeat("x", engine.MaxDescription+1)},
	} {
		_, err := h.CreateKey(t.Context(), in)
		require.Equal(t, parameter, requireKind(t, engine.InvalidParameter, err).Parameter)
	}
	_, err := h.CreateKey(t.Context(), engine.CreateKeyInput{Description: "\xff"})
	requireKind(t, engine.InvalidParameter, err)

	key, err := h.CreateKey(t.Context(), engine.CreateKeyInput{Description: strings.Repeat("é", engine.MaxDescription)})
	require.NoError(t, err)
	require.Equal(t, engine.AliyunAES256, key.Spec)
	require.Equal(t, h.clock.in(0), key.CreatedAt)
	require.Equal(t, key, h.describe(t, key.KeyID))
}

func TestKeyIDs(t *testing.T) {
	h := newHouse(t)
	for id, kind := range map[string]engine.Kind{
		"":                                     engine.MissingParameter,
		"alias/mine":                           engine.UnsupportedAlias,
		"key-hzz630494463ejqjx1234":            engine.KeyNotFound,
		"00000000-0000-4000-8000-000000000000": engine.KeyNotFound,
		"acs:kms:cn-hangzhou:1:key/x":          engine.InvalidParameter,
		"../../etc":                            engine.InvalidParameter,
		"' OR 1=1 --":                          engine.InvalidParameter,
		strings.Repeat("a", 65):                engine.InvalidParameter,
		"00000000-0000-4000-8000-00000000000\x00": engine.InvalidParameter,
	} {
		for _, action := range actions {
			if action.name == "Decrypt" || action.name == "ReEncrypt" || action.name == "ImportKeyMaterial" {
				continue
			}
			requireKind(t, kind, action.do(t, h, &customer{keyID: id}))
		}
		_, err := h.ImportKeyMaterial(t.Context(), engine.ImportInput{KeyID: id, ImportToken: []byte("x")})
		requireKind(t, kind, err)
	}
}

func TestListKeys(t *testing.T) {
	h := newHouse(t)
	var all []string
	for range 5 {
		all = append(all, h.newKey(t, engine.AliyunAES256))
		h.clock.advance(time.Second)
	}
	sm4 := h.newKey(t, engine.AliyunSM4)
	list := func(in engine.ListKeysInput) (ids []string, total int) {
		keys, total, err := h.ListKeys(t.Context(), in)
		require.NoError(t, err)
		for _, key := range keys {
			require.Equal(t, h.describe(t, key.KeyID), key)
			ids = append(ids, key.KeyID)
		}
		return ids, total
	}
	ids, total := list(engine.ListKeysInput{})
	require.Equal(t, append(all, sm4), ids)
	require.Equal(t, 6, total)
	ids, total = list(engine.ListKeysInput{Offset: 1, Limit: 2})
	require.Equal(t, all[1:3], ids)
	require.Equal(t, 6, total)
	ids, _ = list(engine.ListKeysInput{Specs: []engine.KeySpec{engine.AliyunSM4}})
	require.Equal(t, []string{sm4}, ids)
	ids, _ = list(engine.ListKeysInput{States: []engine.KeyState{engine.Enabled}})
	require.Empty(t, ids)
	ids, _ = list(engine.ListKeysInput{KeyIDs: []string{all[3], sm4}, Specs: []engine.KeySpec{engine.AliyunAES256}})
	require.Equal(t, []string{all[3]}, ids)

	_, _, err := h.ListKeys(t.Context(), engine.ListKeysInput{Limit: 1001})
	requireKind(t, engine.InvalidParameter, err)
	_, _, err = h.ListKeys(t.Context(), engine.ListKeysInput{Offset: -1})
	requireKind(t, engine.InvalidParameter, err)
}
