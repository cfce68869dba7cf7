package hsm_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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

// needResident skips a test on a token that does not report lengths: stock
// SoftHSM2. There TestResidentIsRefusedByName holds.
func needResident(t testing.TB, token *hsm.Token) {
	t.Helper()
	if err := token.Keeps(hsm.Resident, hsm.AES256); err != nil {
		t.Skipf("no resident key material on this token, but on that of \"make softhsm\": %v", err)
	}
}

// newResidentBench is newBench with a pair for resident material.
func newResidentBench(t testing.TB, alg hsm.Algorithm) *bench {
	t.Helper()
	b := newBench(t, alg)
	needResident(t, b.token)
	spec := b.pair.Spec
	var err error
	b.pair, err = b.token.GenerateResidentPair(context.Background(), instance, time.Now(), spec, alg)
	require.NoError(t, err)
	require.Equal(t, hsm.Resident, b.pair.Custody)
	if alg == hsm.SM2PKE {
		b.sm2 = parseSM2(t, b.pair.SPKI)
	} else {
		b.pub = parse(t, b.pair.SPKI)
	}
	return b
}

func objectID() (id hsm.ObjectID) {
	_, _ = rand.Read(id[:])
	return id
}

func (b *bench) stay(wrapped []byte) hsm.ResidentRequest {
	return hsm.ResidentRequest{ImportRequest: b.request(wrapped), ID: objectID(), Instance: instance, Now: time.Now()}
}

func (b *bench) stayed(t testing.TB, material []byte) hsm.Imported {
	t.Helper()
	out, err := b.token.ImportResident(context.Background(), b.stay(b.wrap(t, material)))
	require.NoError(t, err)
	return out
}

// residents lists what is on the token by another client of PKCS#11.
func (b *bench) residents(t *testing.T) []pkcs11.ObjectHandle {
	t.Helper()
	p, s := user(t, b.soft)
	return find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true))
}

func TestResidentIsRefusedByName(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	err := b.token.Keeps(hsm.Resident, hsm.SM4)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "SM4")
	require.ErrorIs(t, b.token.Keeps(hsm.Custody(9), hsm.AES256), hsm.ErrUnsupported)
	require.NoError(t, b.token.Keeps(hsm.Sealed, hsm.SM4))
	why := b.token.Keeps(hsm.Resident, hsm.AES256)
	if hasSM(b.soft) {
		require.NoError(t, why, "ours reports lengths")
		return
	}
	require.ErrorIs(t, why, hsm.ErrUnsupported)
	require.ErrorContains(t, why, "CKA_VALUE_LEN")
	_, err = b.token.GenerateResidentPair(ctx, instance, time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.Equal(t, why, err)
	_, err = b.token.ImportResident(ctx, b.stay(b.wrap(t, random(32))))
	require.Equal(t, why, err)
	material := hsm.Material{Custody: hsm.Resident, Spec: hsm.AES256, Ref: make([]byte, 16)}
	_, err = b.token.OpenResident(ctx, material, instance, []byte("key-1"), hsm.Identity{})
	require.Equal(t, why, err)
}

func TestResidentTakesOneLength(t *testing.T) {
	for _, alg := range offered(t) {
		t.Run(string(alg), func(t *testing.T) {
			b := newResidentBench(t, alg)
			for n := range 65 {
				// Each refusal writes a known answer to the token: every
				// length by one algorithm, those at the edges by the others.
				if alg != hsm.OAEPSHA1 && !slices.Contains([]int{0, 1, 15, 16, 17, 24, 31, 32, 33, 64}, n) {
					continue
				}
				material := random(n)
				clear(material[min(n, 16+n%2*16):]) // of some the tail is zero
				out, err := b.token.ImportResident(context.Background(), b.stay(b.wrap(t, material)))
				if n == 32 {
					require.NoError(t, err)
					require.NoError(t, b.token.DestroyResident(context.Background(), instance, hsm.ObjectID(out.Material.Ref)))
					continue
				}
				require.Equal(t, hsm.ErrInvalidMaterial, err, "%d bytes", n)
				require.Zero(t, out)
			}
			for _, blob := range [][]byte{nil, {1}, random(256), make([]byte, 256)} {
				_, err := b.token.ImportResident(context.Background(), b.stay(blob))
				require.Equal(t, hsm.ErrInvalidMaterial, err)
			}
			require.Empty(t, b.residents(t), "nothing of what was refused is left")
		})
	}
}

// Resident material is measured as sealed material is, and used the same.
func TestResidentIsTheSameKey(t *testing.T) {
	ctx := context.Background()
	sealed := newBench(t, hsm.OAEPSHA1)
	b := newResidentBench(t, hsm.OAEPSHA1)
	material := random(32)
	out, other := b.stayed(t, material), sealed.imported(t, material)
	require.Equal(t, other.Identity, out.Identity)
	require.Equal(t, other.CheckValue, out.CheckValue)
	id, err := byok.MaterialID("key-1", material)
	require.NoError(t, err)
	require.Equal(t, id, out.Identity.MaterialID)

	encoded, err := out.Material.MarshalBinary()
	require.NoError(t, err)
	var decoded hsm.Material
	require.NoError(t, decoded.UnmarshalBinary(encoded))
	require.Equal(t, out.Material, decoded)
	require.Error(t, decoded.UnmarshalBinary(encoded[:len(encoded)-1]))

	key, err := b.token.OpenResident(ctx, out.Material, instance, []byte("key-1"), out.Identity)
	require.NoError(t, err)
	ciphertext, err := key.Encrypt(ctx, nil, []byte("hello"), []byte("aad"))
	require.NoError(t, err)
	there, err := sealed.token.OpenMaterial(ctx, other.Material)
	require.NoError(t, err)
	plaintext, err := there.Decrypt(ctx, nil, ciphertext, []byte("aad"))
	require.NoError(t, err)
	require.Equal(t, "hello", string(plaintext))
	require.NoError(t, there.Close())

	require.NoError(t, key.Close())
	require.Len(t, b.residents(t), 1, "closing a key destroys nothing")
	_, err = b.token.OpenMaterial(ctx, out.Material)
	require.ErrorIs(t, err, hsm.ErrUntrusted, "it is no blob")
	_, err = b.token.OpenResident(ctx, other.Material, instance, []byte("key-1"), out.Identity)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

// Another process, which has imported nothing itself, finds it, once.
func TestResidentIsFoundAgain(t *testing.T) {
	ctx := context.Background()
	b := newResidentBench(t, hsm.OAEPSHA1)
	out := b.stayed(t, random(32))
	require.NoError(t, b.token.Close())
	token := open(t, b.soft.Config())
	tap := hsmtest.On(t, b.soft.Module)
	for range 3 {
		key, err := token.OpenResident(ctx, out.Material, instance, []byte("key-1"), out.Identity)
		require.NoError(t, err)
		_, err = key.Encrypt(ctx, nil, []byte("x"), nil)
		require.NoError(t, err)
		require.NoError(t, key.Close())
	}
	require.Equal(t, 1, tap.Calls()["C_FindObjectsInit"], "it is searched for once")
	require.Equal(t, 2, tap.Calls()["C_Sign"], "and measured once")

	list, err := token.Residents(ctx, instance)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, hsm.ObjectID(out.Material.Ref), list[0].ID)
	require.Equal(t, "key-1", string(list[0].Context))
	require.WithinDuration(t, time.Now(), list[0].CreatedAt, time.Minute)
	list, err = token.Residents(ctx, "fedcba9876543210")
	require.NoError(t, err)
	require.Empty(t, list)

	// Destroyed by another process: the open key notices.
	key, err := token.OpenResident(ctx, out.Material, instance, []byte("key-1"), out.Identity)
	require.NoError(t, err)
	p, s := user(t, b.soft)
	for _, o := range b.residents(t) {
		require.NoError(t, p.DestroyObject(s, o))
	}
	_, err = key.Encrypt(ctx, nil, []byte("x"), nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)
	_, err = token.OpenResident(ctx, out.Material, instance, []byte("key-1"), out.Identity)
	require.ErrorIs(t, err, hsm.ErrMaterialGone)
	require.NoError(t, token.DestroyResident(ctx, instance, hsm.ObjectID(out.Material.Ref)), "it is gone")
}

// The pair of one custody does not import into the other.
func TestCustodiesDoNotMix(t *testing.T) {
	ctx := context.Background()
	b := newBench(t, hsm.OAEPSHA1)
	needResident(t, b.token)
	sealedPair, sealedPub := b.pair, b.pub
	var err error
	b.pair, err = b.token.GenerateResidentPair(ctx, instance, time.Now(), hsm.RSA2048, hsm.OAEPSHA1)
	require.NoError(t, err)
	b.pub = parse(t, b.pair.SPKI)
	_, err = b.token.Import(ctx, b.request(b.wrap(t, random(32))))
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.ErrorContains(t, err, "resident")
	residentPair := b.pair
	b.pair, b.pub = sealedPair, sealedPub
	_, err = b.token.ImportResident(ctx, b.stay(b.wrap(t, random(32))))
	require.ErrorIs(t, err, hsm.ErrUnsupported)

	// Nor does the token let a thief who has the PIN: an extractable object,
	// one that could be changed or copied, one of the session.
	b.pair, b.pub = residentPair, parse(t, residentPair.SPKI)
	blob := b.wrap(t, random(32))
	p, s := user(t, b.soft)
	priv := find(t, p, s, pkcs11.NewAttribute(pkcs11.CKA_ID, residentPair.ID[:]))[0]
	oaep := pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil))
	for _, flipped := range []uint{
		pkcs11.CKA_TOKEN, pkcs11.CKA_PRIVATE, pkcs11.CKA_SENSITIVE, pkcs11.CKA_EXTRACTABLE, pkcs11.CKA_COPYABLE, pkcs11.CKA_MODIFIABLE, pkcs11.CKA_WRAP, pkcs11.CKA_DERIVE,
	} {
		attrs := hsm.ResidentForTest()
		for _, a := range attrs {
			if a.Type == flipped {
				a.Value = []byte{a.Value[0] ^ 1}
			}
		}
		_, err = p.UnwrapKey(s, []*pkcs11.Mechanism{oaep}, priv, blob, attrs)
		require.Error(t, err, "attribute 0x%x", flipped)
	}
	_, err = p.UnwrapKey(s, []*pkcs11.Mechanism{oaep}, priv, blob, hsm.MeasuredForTest())
	require.Error(t, err)
	o, err := p.UnwrapKey(s, []*pkcs11.Mechanism{oaep}, priv, blob, hsm.ResidentForTest())
	require.NoError(t, err, "with our own template it works: the refusals above are the pins'")
	for _, attr := range []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_ID, []byte("x")),
	} {
		require.Error(t, p.SetAttributeValue(s, o, []*pkcs11.Attribute{attr}))
	}
	_, err = p.CopyObject(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false)})
	require.Error(t, err)
	_, err = p.GetAttributeValue(s, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
	require.Error(t, err)
}

// Whoever has the PIN puts another key in the place of resident material.
func TestSubstitutedResidentIsRefused(t *testing.T) {
	ctx := context.Background()
	b := newResidentBench(t, hsm.OAEPSHA1)
	genuine := b.stayed(t, random(32))
	id := hsm.ObjectID(genuine.Material.Ref)
	substitute := func(req hsm.ResidentRequest) {
		req.ID = id
		_, err := b.token.ImportResident(ctx, req)
		require.NoError(t, err)
	}
	destroy := func() {
		p, s := user(t, b.soft)
		for _, o := range b.residents(t) {
			require.NoError(t, p.DestroyObject(s, o))
		}
	}
	reopened := func(t *testing.T) error {
		token := open(t, b.soft.Config())
		_, err := token.OpenResident(ctx, genuine.Material, instance, []byte("key-1"), genuine.Identity)
		return err
	}
	t.Run("beside the genuine one", func(t *testing.T) {
		substitute(b.stay(b.wrap(t, random(32))))
		require.NoError(t, reopened(t), "a lookalike is passed over")
	})
	destroy()
	t.Run("another key, by an unwrap of the thief's own", func(t *testing.T) {
		substitute(b.stay(b.wrap(t, random(32))))
		require.ErrorIs(t, reopened(t), hsm.ErrUntrusted)
		require.ErrorContains(t, reopened(t), "another key")
	})
	destroy()
	t.Run("of another CMK", func(t *testing.T) {
		req := b.stay(b.wrap(t, random(32)))
		req.Context = []byte("key-2")
		substitute(req)
		require.ErrorIs(t, reopened(t), hsm.ErrUntrusted)
	})
	destroy()
	t.Run("of known value", func(t *testing.T) {
		p, s := user(t, b.soft)
		attrs := append(hsm.ResidentForTest(),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, random(32)), pkcs11.NewAttribute(pkcs11.CKA_ID, id[:]),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, fmt.Sprintf("keyferry material %s %d key-1", instance, time.Now().Unix())))
		_, err := p.CreateObject(s, attrs)
		require.NoError(t, err)
		require.ErrorIs(t, reopened(t), hsm.ErrUntrusted)
	})
	destroy()
	t.Run("none", func(t *testing.T) { require.ErrorIs(t, reopened(t), hsm.ErrMaterialGone) })
}

// Whatever call of an import fails, having done nothing or having taken
// effect, afterwards there is the object of an answered import or, once
// DestroyResident has been there, none.
func TestResidentImportUnderFaults(t *testing.T) {
	ctx := context.Background()
	b := newResidentBench(t, hsm.OAEPSHA1)
	b.stayed(t, random(32)) // the pair is known
	tap := hsmtest.On(t, b.soft.Module)
	wrapped := b.wrap(t, random(32))
	tap.Reset()
	first, err := b.token.ImportResident(ctx, b.stay(wrapped))
	require.NoError(t, err)
	calls := len(tap.Sequence())
	t.Logf("calls of an import: %v", tap.Sequence())
	require.NoError(t, b.token.DestroyResident(ctx, instance, hsm.ObjectID(first.Material.Ref)))
	before := len(b.residents(t))
	for n := range calls {
		for _, rv := range []uint{pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_DEVICE_MEMORY} {
			for _, tookEffect := range []bool{false, true} {
				req := b.stay(wrapped)
				tap.Inject(hsmtest.Fault{After: n, RV: uint32(rv), TookEffect: tookEffect})
				out, err := b.token.ImportResident(ctx, req)
				tap.Heal()
				name := fmt.Sprintf("call %d, 0x%x, took effect: %t: %v", n, rv, tookEffect, err)
				if err == nil {
					require.Len(t, b.residents(t), before+1, name)
					key, err := b.token.OpenResident(ctx, out.Material, instance, []byte("key-1"), out.Identity)
					require.NoError(t, err, name)
					require.NoError(t, key.Close())
				} else {
					require.True(t, errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrFull) || errors.Is(err, hsm.ErrInvalidMaterial) ||
						errors.Is(err, hsm.ErrUntrusted), name)
				}
				require.NoError(t, b.token.DestroyResident(ctx, instance, req.ID), name)
				require.Len(t, b.residents(t), before, name)
			}
		}
	}
}

// A token whose policy has nothing wrapped, or no AES key wrap, is refused by
// name, also where all material would be resident: its vault is known by what
// it wraps.
func TestResidentAloneIsRefusedByName(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	tap := hsmtest.On(t, soft.Module)
	for _, rv := range []uint32{pkcs11.CKR_KEY_UNEXTRACTABLE, pkcs11.CKR_MECHANISM_INVALID} {
		tap.Inject(hsmtest.Fault{Call: "C_WrapKey", RV: rv, Times: -1})
		_, err := hsm.Open(t.Context(), soft.Config())
		require.ErrorIs(t, err, hsm.ErrUnsupported)
		require.ErrorContains(t, err, "CKM_AES_KEY_WRAP")
		require.ErrorContains(t, err, "in every custody")
		x, err := hsm.Examine(t.Context(), soft.Config(), false)
		require.NoError(t, err)
		require.ErrorContains(t, x.Capabilities.Refusal(), "in every custody")
		tap.Heal()
	}
}
