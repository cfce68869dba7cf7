package contract

import (
	"slices"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// A token without CKM_AES_CMAC gives the same identity: it is built from ECB
// and CBC in the token.
func TestCMACIsBuilt(t *testing.T) {
	soft := softhsm.New(t)
	tap := hsmtest.On(t, soft.Module)
	lackCMAC := func() {
		require.LessOrEqual(t, tap.Heal(), 1)
		// What a probe signs first is a CMAC.
		tap.Inject(hsmtest.Fault{Call: "C_SignInit", RV: pkcs11.CKR_MECHANISM_INVALID})
	}
	lackCMAC()
	var err error
	soft.Pins, err = hsm.Init(ctx, hsm.InitConfig{Module: soft.Module, Label: soft.Label, SOPIN: soft.SOPIN, UserPIN: soft.UserPIN})
	require.NoError(t, err)
	lackCMAC()
	token := soft.Open(t)
	require.Equal(t, 1, tap.Heal())
	require.Equal(t, hsm.Absent, token.Capabilities().Finding(hsm.FindCMAC).Verdict)

	pair, err := token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	var sealed hsm.Material
	for _, keyID := range []string{"k", "1234abcd-12ab-34cd-56ef-1234567890ab", "fourteen bytes", "thirty bytes of a long context"} {
		for spec, material := range fixed {
			blob, err := byok.Wrap(string(hsm.OAEPSHA1), pair.SPKI, material)
			require.NoError(t, err)
			tap.Reset()
			out, err := token.Import(ctx, hsm.ImportRequest{
				Pair: pair.ID, Algorithm: hsm.OAEPSHA1, Wrapped: blob, Spec: spec, Context: []byte(keyID),
			})
			require.NoError(t, err)
			require.Zero(t, tap.Calls()["C_Sign"])
			want, err := byok.MaterialID(keyID, material)
			require.NoError(t, err)
			require.Equal(t, want, out.Identity.MaterialID, "%s, %s", spec, keyID)
			if token.Usable(spec) == nil {
				testUse(t, token, out.Material)
			}
			if spec == hsm.AES256 {
				sealed = out.Material
			}
		}
	}
	require.NoError(t, token.Close())
	// When the token has learnt it, what was sealed opens, and pairs, which are
	// for a day, are made anew.
	token = soft.Open(t)
	require.Equal(t, hsm.Proven, token.Capabilities().Finding(hsm.FindCMAC).Verdict)
	testUse(t, token, sealed)
	_, err = token.Pair(ctx, pair.ID)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

// Examine shows the token a PIN once, and never tries another way in.
func TestExamineTriesThePINOnce(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, soft.Module)
	cfg := soft.Config()
	cfg.PIN = func() ([]byte, error) { return []byte("wrong, and long enough"), nil }
	_, err := hsm.Examine(ctx, cfg, false)
	require.ErrorIs(t, err, hsm.ErrPIN)
	require.Equal(t, 1, tap.Calls()["C_Login"])
	require.Zero(t, tap.Calls()["C_GenerateKeyPair"])
}

// Examine lists what voids everything, and goes on past it.
func TestExamineFindsStrangers(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	hsmtest.Keep(t, soft.Module)
	p := pkcs11.New(soft.Module)
	require.NotNil(t, p)
	slots, err := p.GetSlotList(true)
	require.NoError(t, err)
	slot := slots[slices.IndexFunc(slots, func(s uint) bool {
		info, err := p.GetTokenInfo(s)
		return err == nil && info.Label == soft.Label
	})]
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	pin, err := soft.SOPIN()
	require.NoError(t, err)
	require.NoError(t, p.Login(s, pkcs11.CKU_SO, string(pin)))
	_, err = p.CreateObject(s, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, make([]byte, 32)), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "a stranger"),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_TRUSTED, true),
	})
	require.NoError(t, err)
	require.NoError(t, p.Logout(s))
	require.NoError(t, p.CloseSession(s))

	x, err := hsm.Examine(ctx, soft.Config(), false)
	require.NoError(t, err)
	i := slices.IndexFunc(x.Trusted, func(o hsm.TrustedObject) bool { return o.Label == "a stranger" })
	require.GreaterOrEqual(t, i, 0)
	require.ErrorIs(t, x.Trusted[i].Err, hsm.ErrUntrusted)
	require.ErrorIs(t, x.Keys[0].Err, hsm.ErrUntrusted)
	_, err = hsm.Open(ctx, soft.Config())
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}
