package hsm_test

import (
	"context"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// plant makes a private key object with a pair's identifier that cannot be
// destroyed: without a PIN, or as somebody who has it.
func plant(t *testing.T, b *bench, private bool) {
	t.Helper()
	p, slot := b.raw(t)
	s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(t, err)
	at := pkcs11.NewAttribute
	for _, class := range []uint{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKO_PUBLIC_KEY} {
		attrs := []*pkcs11.Attribute{
			at(pkcs11.CKA_CLASS, class), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA), at(pkcs11.CKA_TOKEN, true), at(pkcs11.CKA_PRIVATE, private),
			at(pkcs11.CKA_ID, b.pair.ID[:]), at(pkcs11.CKA_LABEL, "keyferry pair "+instance+" RSAES_OAEP_SHA_1 1"), at(pkcs11.CKA_DESTROYABLE, false),
			at(pkcs11.CKA_MODULUS, b.pub.N.Bytes()), at(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		}
		if class == pkcs11.CKO_PRIVATE_KEY {
			attrs = append(attrs, at(pkcs11.CKA_UNWRAP, true), at(pkcs11.CKA_PRIVATE_EXPONENT, []byte{3}))
		}
		_, err = p.CreateObject(s, attrs)
		require.NoError(t, err)
	}
	require.NoError(t, p.CloseSession(s))
}

// Objects that someone puts beside a pair neither keep it from being destroyed
// nor appear as one, unless he has the PIN.
func TestPlantedObjectsDoNotSaveAPair(t *testing.T) {
	ctx := context.Background()
	for name, private := range map[string]bool{"without a PIN": false, "with the PIN": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, hsm.OAEPSHA1)
			plant(t, b, private)
			err := b.token.DestroyPair(ctx, b.pair.ID)
			if private {
				require.ErrorIs(t, err, hsm.ErrUnavailable, "it is said that something is left")
			} else {
				require.NoError(t, err)
				list, err := b.token.Pairs(ctx, instance)
				require.NoError(t, err)
				require.Empty(t, list)
			}
			_, err = b.token.Pair(ctx, b.pair.ID)
			require.Error(t, err)
			p, s := user(t, b.soft)
			for _, o := range find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_ID, b.pair.ID[:]), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)) {
				got, err := p.GetAttributeValue(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LOCAL, nil)})
				require.NoError(t, err)
				require.Equal(t, []byte{0}, got[0].Value, "what is left was never ours")
			}
		})
	}
}

// A generation that took effect and was reported as failed leaves a pair of
// another identifier than the next attempt's.
func TestGenerationThatTookEffect(t *testing.T) {
	softhsm.Once(t)
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	tap := hsmtest.On(t, b.soft.Module)
	tap.Inject(hsmtest.Fault{Call: "C_GenerateKeyPair", RV: pkcs11.CKR_SESSION_CLOSED, TookEffect: true})
	info, _ := newPair(t, b.token, hsm.OAEPSHA1)
	require.Equal(t, 1, tap.Heal())
	list, err := b.token.Pairs(ctx, instance)
	require.NoError(t, err)
	require.Len(t, list, 3, "the one before, the orphan, and this one")
	require.NoError(t, b.token.Close())
	again, err := open(t, b.soft.Config()).Pair(ctx, info.ID)
	require.NoError(t, err)
	require.Equal(t, info, again)
}

// An unwrap that took effect and was reported as failed leaves no material.
func TestUnwrapThatTookEffect(t *testing.T) {
	softhsm.Once(t)
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 2 })
	req := b.request(b.wrap(t, random(32)))
	tap := hsmtest.On(t, b.soft.Module)
	for range 5 {
		tap.Inject(hsmtest.Fault{Call: "C_UnwrapKey", RV: pkcs11.CKR_GENERAL_ERROR, TookEffect: true})
		_, err := b.token.Import(context.Background(), req)
		require.NoError(t, err, "it does not fail again")
	}
	require.Equal(t, 5, tap.Heal())
	p, s := user(t, b.soft)
	require.Empty(t, find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)))
}

// Whoever panics in the middle of a call does not take the session's place
// with him.
func TestPanicLeavesThePlace(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1, func(c *hsm.Config) { c.Sessions = 1 })
	tap := hsmtest.On(t, b.soft.Module)
	tap.Hold("C_Sign", func() { panic("in the module") })
	require.Panics(t, func() { _, _ = b.token.MAC(context.Background(), "test") })
	tap.Hold("C_Sign", func() {})
	_, err := b.token.MAC(context.Background(), "test")
	require.NoError(t, err)
	require.NoError(t, b.token.Close())
}

// Close, which may finalise the module, waits for every call into it, whatever
// the call is for.
func TestCloseWaitsForEveryCall(t *testing.T) {
	b := newBench(t, hsm.OAEPSHA1)
	tap := hsmtest.On(t, b.soft.Module)
	in, out := make(chan struct{}), make(chan struct{})
	tap.Hold("C_GetSessionInfo", func() { in <- struct{}{}; <-out }) // examine's
	tap.Inject(hsmtest.Fault{Call: "C_Sign", RV: pkcs11.CKR_SESSION_CLOSED})
	failed := make(chan error)
	go func() {
		_, err := b.token.MAC(context.Background(), "test")
		failed <- err
	}()
	<-in
	tap.Hold("C_GetSessionInfo", func() {})
	closed := make(chan error, 1)
	go func() { closed <- b.token.Close() }()
	require.Never(t, func() bool { return len(closed) > 0 }, 50*time.Millisecond, tick)
	close(out)
	require.Error(t, <-failed)
	require.NoError(t, <-closed)
}
