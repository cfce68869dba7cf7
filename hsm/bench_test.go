package hsm_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
)

// BenchmarkSequence compares what Token does for one import, encryption or
// opening with the bare PKCS#11 calls of another client on the same token.
func BenchmarkSequence(b *testing.B) {
	t := newBench(b, hsm.OAEPSHA1)
	ctx := context.Background()
	req := t.request(t.wrap(b, random(32)))
	material := t.imported(b, random(32)).Material
	key, err := t.token.OpenMaterial(ctx, material)
	require.NoError(b, err)
	plain, aad := random(64), random(100)
	p, slot := t.raw(b)
	session := func() pkcs11.SessionHandle {
		s, err := p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		require.NoError(b, err)
		return s
	}
	find := func(s pkcs11.SessionHandle, attr *pkcs11.Attribute) pkcs11.ObjectHandle {
		require.NoError(b, p.FindObjectsInit(s, []*pkcs11.Attribute{attr}))
		found, _, err := p.FindObjects(s, 2)
		require.NoError(b, err)
		require.NoError(b, p.FindObjectsFinal(s))
		return found[0]
	}
	oaep := func() []*pkcs11.Mechanism {
		params := pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil)
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, params)}
	}
	for name, pair := range map[string]struct {
		bare func() func() error // one loop's step, with a session of its own
		ours func() error
	}{
		"import": {
			bare: func() func() error {
				s := session()
				priv, mech, tmpl := find(s, pkcs11.NewAttribute(pkcs11.CKA_ID, t.pair.ID[:])), oaep(), hsm.MeasuredForTest()
				return func() error {
					o, err := p.UnwrapKey(s, mech, priv, req.Wrapped, tmpl)
					if err != nil {
						return err
					}
					return p.DestroyObject(s, o)
				}
			},
			ours: func() error {
				_, err := t.token.Import(ctx, req)
				return err
			},
		},
		"open": {
			bare: func() func() error {
				s := session()
				vault := find(s, pkcs11.NewAttribute(pkcs11.CKA_TRUSTED, true))
				mech, tmpl := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, hsm.OpenedForTest()
				return func() error {
					o, err := p.UnwrapKey(s, mech, vault, material.Ref, tmpl)
					if err != nil {
						return err
					}
					return p.DestroyObject(s, o)
				}
			},
			ours: func() error {
				k, err := t.token.OpenMaterial(ctx, material)
				if err != nil {
					return err
				}
				return k.Close()
			},
		},
		"encrypt": {
			bare: func() func() error {
				s := session()
				iv := random(12)
				return func() error {
					params := pkcs11.NewGCMParams(iv, aad, 128)
					defer params.Free()
					err := p.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, hsm.HandleForTest(key))
					if err != nil {
						return err
					}
					_, err = p.Encrypt(s, plain)
					return err
				}
			},
			ours: func() error {
				_, err := key.Encrypt(ctx, nil, plain, aad)
				return err
			},
		},
	} {
		for _, callers := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("%s/%d", name, callers), func(b *testing.B) {
				bare := make([]func() error, callers)
				ours := make([]func() error, callers)
				for i := range callers {
					bare[i], ours[i] = pair.bare(), pair.ours
				}
				hsmtest.Compare(b, bare, ours)
			})
		}
	}
	require.NoError(b, key.Close())
}
