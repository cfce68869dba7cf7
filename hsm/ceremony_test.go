package hsm_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

func initConfig(soft *softhsm.Token) hsm.InitConfig {
	return hsm.InitConfig{
		Module: soft.Module, Label: soft.Label, Pins: hsm.Pins{Serial: soft.Serial}, SOPIN: soft.SOPIN, UserPIN: soft.UserPIN,
	}
}

// noPIN is for steps that must not ask.
func noPIN(t *testing.T) func() ([]byte, error) {
	return func() ([]byte, error) {
		t.Error("a PIN was asked for")
		return nil, os.ErrPermission
	}
}

// user logs in through another client and returns the session.
func user(t *testing.T, soft *softhsm.Token) (*pkcs11.Ctx, pkcs11.SessionHandle) {
	t.Helper()
	p, slot := (&bench{soft: soft}).raw(t)
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	pin, err := soft.UserPIN()
	require.NoError(t, err)
	if err := p.Login(s, pkcs11.CKU_USER, string(pin)); err != nil {
		require.Equal(t, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN), err)
	}
	return p, s
}

func find(t *testing.T, p *pkcs11.Ctx, s pkcs11.SessionHandle, attrs ...*pkcs11.Attribute) []pkcs11.ObjectHandle {
	t.Helper()
	require.NoError(t, p.FindObjectsInit(s, attrs))
	found, _, err := p.FindObjects(s, 100)
	require.NoError(t, err)
	require.NoError(t, p.FindObjectsFinal(s))
	return found
}

// objectFiles are the files in which SoftHSM2 keeps token objects.
func objectFiles(t *testing.T, soft *softhsm.Token) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(soft.Files, "*.object"))
	require.NoError(t, err)
	out := files[:0]
	for _, f := range files {
		if filepath.Base(f) != "token.object" {
			out = append(out, f)
		}
	}
	return out
}

func TestInitIsIncremental(t *testing.T) {
	ctx := context.Background()
	soft := softhsm.New(t)
	cfg := initConfig(soft)
	pins, err := hsm.Init(ctx, cfg)
	require.NoError(t, err)
	require.Equal(t, soft.Serial, pins.Serial)
	require.NotZero(t, pins.VaultAES)
	require.NotZero(t, pins.MACKey)
	require.NotZero(t, pins.ReceiptKey)
	files := objectFiles(t, soft)
	made := 4 // vault, MAC key, both halves of the receipt key
	if pins.VaultSM4 != (hsm.Fingerprint{}) {
		require.NotEqual(t, pins.VaultAES, pins.VaultSM4)
		made++
	}
	require.Len(t, files, made)

	// Again it makes nothing, and needs the SO for nothing.
	cfg.SOPIN = noPIN(t)
	for _, pinned := range []hsm.Pins{{}, {Serial: soft.Serial}, pins} {
		cfg.Pins = pinned
		again, err := hsm.Init(ctx, cfg)
		require.NoError(t, err)
		require.Equal(t, pins, again)
		require.ElementsMatch(t, files, objectFiles(t, soft))
	}
	soft.Pins = pins
	require.NoError(t, soft.Open(t).Close())
}

// Init interrupted at any call is finished by the next, with one vault.
func TestInitSurvivesInterruption(t *testing.T) {
	softhsm.Once(t)
	ctx := context.Background()
	soft := softhsm.New(t)
	tap := hsmtest.On(t, soft.Module)
	_, err := hsm.Init(ctx, initConfig(soft))
	require.NoError(t, err)
	calls := tap.Sequence()
	first := 0
	for calls[first] != "C_GenerateKey" {
		first++
	}
	step := 12
	if slow() {
		step = 1
	}
	for n := first; n < len(calls)-8; n += step {
		for _, took := range []bool{false, true} {
			soft := softhsm.New(t)
			tap.Reset()
			tap.Inject(hsmtest.Fault{After: n, RV: pkcs11.CKR_DEVICE_ERROR, TookEffect: took, Times: -1})
			_, err := hsm.Init(ctx, initConfig(soft))
			require.Error(t, err)
			require.NotZero(t, tap.Heal())
			// A fresh process: whoever was logged in is not.
			p, slot := (&bench{soft: soft}).raw(t)
			require.NoError(t, p.CloseAllSessions(slot))
			pins, err := hsm.Init(ctx, initConfig(soft))
			require.NoError(t, err, "after call %d, %s", n, calls[n])
			cfg := initConfig(soft)
			cfg.Pins, cfg.SOPIN = pins, noPIN(t)
			again, err := hsm.Init(ctx, cfg)
			require.NoError(t, err)
			require.Equal(t, pins, again, "it is whole, and nothing is there twice")
		}
	}
}

func TestInitRefuses(t *testing.T) {
	softhsm.Once(t)
	ctx := context.Background()
	soft := softhsm.New(t, softhsm.WithKeys())
	other := hsm.Fingerprint{1}
	short := func() ([]byte, error) { return []byte("1234"), nil }
	wrong := func() ([]byte, error) { return []byte("wrong-but-long-enough-pin"), nil }
	fresh := softhsm.New(t)
	for name, c := range map[string]struct {
		soft   *softhsm.Token
		change func(*hsm.InitConfig)
		want   error
		text   string
	}{
		"another serial":     {soft, func(c *hsm.InitConfig) { c.Pins.Serial = "0000000000000000" }, hsm.ErrUntrusted, "serial"},
		"no such label":      {soft, func(c *hsm.InitConfig) { c.Label = "nobody" }, hsm.ErrUnavailable, "nobody"},
		"pinned vault gone":  {soft, func(c *hsm.InitConfig) { c.Pins.VaultAES = other }, hsm.ErrUntrusted, "vault"},
		"pinned MAC gone":    {soft, func(c *hsm.InitConfig) { c.Pins.MACKey = other }, hsm.ErrUntrusted, "MAC"},
		"no module":          {soft, func(c *hsm.InitConfig) { c.Module = "/nonexistent.so" }, hsm.ErrUnavailable, "/nonexistent.so"},
		"not a module":       {soft, func(c *hsm.InitConfig) { c.Module = "/bin/true" }, hsm.ErrUnavailable, "/bin/true"},
		"short user PIN":     {fresh, func(c *hsm.InitConfig) { c.UserPIN = short }, hsm.ErrPIN, "fewer than 22"},
		"short SO PIN":       {fresh, func(c *hsm.InitConfig) { c.SOPIN = short }, hsm.ErrSOPIN, "fewer than 22"},
		"wrong user PIN":     {fresh, func(c *hsm.InitConfig) { c.UserPIN = wrong }, hsm.ErrPIN, "CKR_PIN_INCORRECT"},
		"wrong SO PIN":       {fresh, func(c *hsm.InitConfig) { c.SOPIN = wrong }, hsm.ErrSOPIN, "CKR_PIN_INCORRECT"},
		"SO PIN not at hand": {fresh, func(c *hsm.InitConfig) { c.SOPIN = nil }, hsm.ErrSOPIN, "vault key is missing"},
	} {
		before := len(objectFiles(t, c.soft))
		cfg := initConfig(c.soft)
		c.change(&cfg)
		_, err := hsm.Init(ctx, cfg)
		require.ErrorIs(t, err, c.want, name)
		require.ErrorContains(t, err, c.text, name)
		require.NotContains(t, err.Error(), "wrong-but", name)
		require.Len(t, objectFiles(t, c.soft), before, "%s: nothing was made", name)
	}
}

func TestInitRefusesATokenInUse(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	token := soft.Open(t)
	_, err := hsm.Init(context.Background(), initConfig(soft))
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	_, err = token.MAC(context.Background(), "test")
	require.NoError(t, err, "and leaves it alone")
}

// A key that is trusted and not ours opens everything: the token is refused.
func TestForeignTrustedKeyIsRefused(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	p, slot := (&bench{soft: soft}).raw(t)
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	so, err := soft.SOPIN()
	require.NoError(t, err)
	require.NoError(t, p.Login(s, pkcs11.CKU_SO, string(so)))
	_, err = p.CreateObject(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, make([]byte, 32)), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_TRUSTED, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, "a thief's"), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
	})
	require.NoError(t, err)
	require.NoError(t, p.Logout(s))
	require.NoError(t, p.CloseSession(s))
	_, err = hsm.Open(context.Background(), soft.Config())
	require.ErrorIs(t, err, hsm.ErrUntrusted)
	require.ErrorContains(t, err, "a thief's")
	_, err = hsm.Init(context.Background(), initConfig(soft))
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

// A second token of the label can be made without any credential of the first.
func TestSecondTokenOfTheLabelIsRefused(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	p, _ := (&bench{soft: soft}).raw(t)
	slots, err := p.GetSlotList(true)
	require.NoError(t, err)
	for _, slot := range slots {
		if info, err := p.GetTokenInfo(slot); err == nil && info.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			require.NoError(t, p.InitToken(slot, "the thief's own PIN", soft.Label))
		}
	}
	_, err = hsm.Open(context.Background(), soft.Config())
	require.ErrorIs(t, err, hsm.ErrUntrusted)
	require.ErrorContains(t, err, "2 tokens")
	_, err = hsm.InitToken(context.Background(), soft.Module, soft.Label, soft.SOPIN, soft.UserPIN)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

// A key of the vault's label that is not the pinned one is never sealed under.
func TestVaultIsFoundByFingerprint(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	cfg := soft.Config()
	cfg.Pins.VaultAES[0] ^= 1
	_, err := hsm.Open(context.Background(), cfg)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
	cfg = soft.Config()
	cfg.Pins.MACKey[0] ^= 1
	_, err = hsm.Open(context.Background(), cfg)
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.ErrorContains(t, err, "MAC key")

	// The user may copy the vault; copies are the same key and do no harm.
	before := len(objectFiles(t, soft))
	token := soft.Open(t)
	require.NoError(t, hsm.CopyVaultForTest(context.Background(), token))
	require.NoError(t, token.Close())
	require.Len(t, objectFiles(t, soft), before+1)
	require.NoError(t, soft.Open(t).Close())
	cfg2 := initConfig(soft)
	cfg2.SOPIN = noPIN(t)
	pins, err := hsm.Init(context.Background(), cfg2)
	require.NoError(t, err)
	require.Equal(t, soft.Pins, pins)
}

// What Init makes cannot be taken out, destroyed or given another use by the
// user: the token itself refuses.
func TestKeysOfTheTokenAreGuarded(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	p, s := user(t, soft)
	for label, class := range map[string]uint{
		"keyferry vault AES-256 v1": pkcs11.CKO_SECRET_KEY, "keyferry mac HMAC-SHA-256 v1": pkcs11.CKO_SECRET_KEY,
		"keyferry receipt P-256 v1": pkcs11.CKO_PRIVATE_KEY,
	} {
		found := find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_CLASS, class))
		require.Len(t, found, 1, label)
		_, err := p.GetAttributeValue(s, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
		require.Equal(t, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_SENSITIVE), err, label)
		require.Equal(t, pkcs11.Error(pkcs11.CKR_ACTION_PROHIBITED), p.DestroyObject(s, found[0]), label)
		for _, a := range []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_DERIVE, pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_DESTROYABLE} {
			err := p.SetAttributeValue(s, found[0], []*pkcs11.Attribute{pkcs11.NewAttribute(a, true)})
			require.Error(t, err, "%s %d", label, a)
		}
		require.Error(t, p.DecryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_ECB, nil)}, found[0]), label)
	}
	require.NoError(t, p.Logout(s))
}

func TestReseal(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithReseal())
	b := &bench{soft: soft, token: soft.Open(t)}
	b.pair, b.pub = newPair(t, b.token, hsm.OAEPSHA1)
	b.works(t)
}

// Another client of PKCS#11 finds the receipt key by its identifier.
func TestReceiptKeyVerifies(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	p, s := user(t, soft)
	priv := find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	pub := find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyferry receipt P-256 v1"), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY))
	require.Len(t, priv, 1)
	require.Len(t, pub, 1)
	mech := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}
	digest := random(32)
	require.NoError(t, p.SignInit(s, mech, priv[0]))
	sig, err := p.Sign(s, digest)
	require.NoError(t, err)
	require.NoError(t, p.VerifyInit(s, mech, pub[0]))
	require.NoError(t, p.Verify(s, digest, sig))
	require.NoError(t, p.Logout(s))
}

func TestInitTokenTouchesOnlyABlankSlot(t *testing.T) {
	ctx := context.Background()
	soft := softhsm.New(t)
	short := func() ([]byte, error) { return []byte("1234"), nil }
	for name, call := range map[string]func() (string, error){
		"short SO PIN":   func() (string, error) { return hsm.InitToken(ctx, soft.Module, "new", short, soft.UserPIN) },
		"short user PIN": func() (string, error) { return hsm.InitToken(ctx, soft.Module, "new", soft.SOPIN, short) },
		"one PIN":        func() (string, error) { return hsm.InitToken(ctx, soft.Module, "new", soft.UserPIN, soft.UserPIN) },
		"no PIN":         func() (string, error) { return hsm.InitToken(ctx, soft.Module, "new", soft.SOPIN, nil) },
		"label taken":    func() (string, error) { return hsm.InitToken(ctx, soft.Module, soft.Label, soft.SOPIN, soft.UserPIN) },
		"no label":       func() (string, error) { return hsm.InitToken(ctx, soft.Module, "", soft.SOPIN, soft.UserPIN) },
		"long label": func() (string, error) {
			return hsm.InitToken(ctx, soft.Module, "a label of more than thirty-two by", soft.SOPIN, soft.UserPIN)
		},
	} {
		_, err := call()
		require.Error(t, err, name)
	}
	_, err := hsm.Init(ctx, initConfig(soft))
	require.NoError(t, err, "and the token that was there is as it was")
}

// A crash between C_InitToken and C_InitPIN leaves a token that nobody can use;
// the next InitToken ends what the first began.
func TestInitTokenEndsWhatACrashLeft(t *testing.T) {
	ctx := context.Background()
	soft := softhsm.New(t)
	tap := hsmtest.On(t, soft.Module)
	const label = "half made"
	tap.Inject(hsmtest.Fault{Call: "C_InitPIN", RV: pkcs11.CKR_DEVICE_ERROR})
	_, err := hsm.InitToken(ctx, soft.Module, label, soft.SOPIN, soft.UserPIN)
	require.ErrorIs(t, err, hsm.ErrUnavailable)
	require.Equal(t, 1, tap.Heal())
	_, err = hsm.InitToken(ctx, soft.Module, label, soft.UserPIN, soft.UserPIN)
	require.ErrorIs(t, err, hsm.ErrPIN, "whoever ends it has the SO PIN")
	serial, err := hsm.InitToken(ctx, soft.Module, label, soft.SOPIN, soft.UserPIN)
	require.NoError(t, err)
	_, err = hsm.Init(ctx, hsm.InitConfig{Module: soft.Module, Label: label, Pins: hsm.Pins{Serial: serial}, SOPIN: soft.SOPIN, UserPIN: soft.UserPIN})
	require.NoError(t, err)
	_, err = hsm.InitToken(ctx, soft.Module, label, soft.SOPIN, soft.UserPIN)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}
