package engine_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/hsm"
	"github.com/keyferry/keyferry/hsm/hsmtest"
	"github.com/keyferry/keyferry/softhsm"
)

// benchKeys is over how many CMKs the benchmark goes.
const benchKeys = 1000

// BenchmarkEngine compares what the engine does for one request, durably, with
// the bare PKCS#11 calls of another client on the same token: C_UnwrapKey of a
// customer's blob, C_EncryptInit and C_Encrypt by AES-GCM, and the opening of
// a sealed blob. Each goes over 1,000 CMKs.
//
// extra-cpu-µs is the processor time of one request beyond that of the bare
// calls.
func BenchmarkEngine(b *testing.B) {
	w := newWorkbench(b)
	for _, work := range []struct {
		name string
		bare func(b *testing.B) func() error // one caller's loop, on a session of its own
		ours func(b *testing.B) func() error
	}{
		{"import", w.bareUnwrap, w.importing},
		{"encrypt-64B", w.bareEncrypt, w.encrypting},
		{"decrypt-64B-of-a-closed-key", w.bareOpen, w.opening},
	} {
		for _, callers := range []int{1, 8, 32} {
			b.Run(fmt.Sprintf("%s/%d", work.name, callers), func(b *testing.B) {
				bare, ours := make([]func() error, callers), make([]func() error, callers)
				for i := range callers {
					bare[i], ours[i] = work.bare(b), work.ours(b)
				}
				hsmtest.Compare(b, bare, ours)
			})
		}
	}
}

// workbench is an engine with CMKs that have material, and a second client of
// its token.
type workbench struct {
	large, small *house // with a cache for all keys, and for few
	imports      []engine.ImportInput
	blobs        [][]byte // what each CMK encrypted
	sealed       [][]byte // its material, as the vault key opens it
	pair         []byte   // CKA_ID of the pair that all is wrapped under
	open         []pkcs11.ObjectHandle
	next         atomic.Int64

	p11  *pkcs11.Ctx
	slot uint
}

func newWorkbench(b *testing.B) *workbench {
	b.Helper()
	on := softhsm.New(b, softhsm.WithKeys())
	token := on.Open(b)
	w := &workbench{
		large: newHouse(b, withToken(token), with(func(c *engine.Config) { c.Now = time.Now })),
		small: newHouse(b, withToken(token), with(func(c *engine.Config) { c.Now, c.CacheSize = time.Now, 64 })),
	}
	w.imports = make([]engine.ImportInput, benchKeys)
	w.blobs = make([][]byte, benchKeys)
	w.sealed = make([][]byte, benchKeys)
	prepare := func(i int) error {
		w.imports[i] = input(b, w.large.parameters(b, w.large.newKey(b, engine.AliyunAES256)), randomBytes(32))
		_, err := w.large.ImportKeyMaterial(b.Context(), w.imports[i])
		return err
	}
	prepareSmall := func(i int) error {
		keyID, _ := w.small.enabledKey(b)
		w.blobs[i] = w.small.encrypt(b, keyID, string(make([]byte, 64)))
		row, err := w.small.store.Key(b.Context(), keyID)
		if err != nil {
			return err
		}
		var m hsm.Material
		err = m.UnmarshalBinary(row.Material)
		w.sealed[i], w.pair = m.Ref, row.PairID
		return err
	}
	require.NoError(b, prepare(0))
	require.NoError(b, prepareSmall(0))
	for _, one := range []func(int) error{prepare, prepareSmall} {
		for _, err := range inParallel(benchKeys-1, func(i int) error { return one(i + 1) }) {
			require.NoError(b, err)
		}
	}
	row, err := w.large.store.Key(b.Context(), w.imports[0].KeyID)
	require.NoError(b, err)
	w.pair = row.PairID
	w.large.waitForPairs(b, 1) // nothing is generated while it is measured
	w.small.waitForPairs(b, 1)

	// The library is initialised in this process already.
	w.p11 = pkcs11.New(on.Module)
	require.NotNil(b, w.p11)
	slots, err := w.p11.GetSlotList(true)
	require.NoError(b, err)
	for _, slot := range slots {
		if info, err := w.p11.GetTokenInfo(slot); err == nil && info.Label == on.Label {
			w.slot = slot
		}
	}
	w.openAll(b)
	return w
}

// turn is whose turn it is of the CMKs.
func (w *workbench) turn() int { return int(w.next.Add(1) % benchKeys) }

func (w *workbench) importing(*testing.B) func() error {
	return func() error {
		_, err := w.large.ImportKeyMaterial(context.Background(), w.imports[w.turn()])
		return err
	}
}

func (w *workbench) encrypting(b *testing.B) func() error {
	b.Helper()
	plaintext := make([]byte, 64)
	for i := range w.imports { // every key is open, and has been used before
		w.large.encrypt(b, w.imports[i].KeyID, "x")
	}
	return func() error {
		_, err := w.large.Encrypt(context.Background(), w.imports[w.turn()].KeyID, plaintext, nil)
		return err
	}
}

func (w *workbench) opening(*testing.B) func() error {
	return func() error {
		_, err := w.small.Decrypt(context.Background(), w.blobs[w.turn()], nil)
		return err
	}
}

func (w *workbench) bareUnwrap(b *testing.B) func() error {
	s := w.session(b)
	pair := w.find(b, s, pkcs11.NewAttribute(pkcs11.CKA_ID, w.pair), pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY))
	params := pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil)
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, params)}
	template := bareMaterial(true)
	return func() error {
		key, err := w.p11.UnwrapKey(s, mechanism, pair, w.imports[w.turn()].EncryptedKeyMaterial, template)
		if err != nil {
			return err
		}
		return w.p11.DestroyObject(s, key)
	}
}

// openAll opens every blob once, on a session that lives as long as the
// benchmark.
func (w *workbench) openAll(b *testing.B) {
	b.Helper()
	s := w.session(b)
	vault := w.vault(b, s)
	w.open = make([]pkcs11.ObjectHandle, benchKeys)
	for i := range w.open {
		var err error
		w.open[i], err = w.openBare(s, vault, i)
		require.NoError(b, err)
	}
}

func (w *workbench) bareEncrypt(b *testing.B) func() error {
	s := w.session(b)
	plaintext, aad, iv := make([]byte, 64), randomBytes(100), randomBytes(12)
	return func() error {
		params := pkcs11.NewGCMParams(iv, aad, 128)
		defer params.Free()
		if err := w.p11.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, w.open[w.turn()]); err != nil {
			return err
		}
		_, err := w.p11.Encrypt(s, plaintext)
		return err
	}
}

// bareOpen opens a blob, encrypts a block and closes it: decrypting would need
// the engine's associated data, and takes as long.
func (w *workbench) bareOpen(b *testing.B) func() error {
	s := w.session(b)
	vault := w.vault(b, s)
	plaintext, aad, iv := make([]byte, 64), randomBytes(100), randomBytes(12)
	return func() error {
		key, err := w.openBare(s, vault, w.turn())
		if err != nil {
			return err
		}
		params := pkcs11.NewGCMParams(iv, aad, 128)
		defer params.Free()
		if err := w.p11.EncryptInit(s, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
			return err
		}
		if _, err := w.p11.Encrypt(s, plaintext); err != nil {
			return err
		}
		return w.p11.DestroyObject(s, key)
	}
}

func (w *workbench) openBare(s pkcs11.SessionHandle, vault pkcs11.ObjectHandle, i int) (pkcs11.ObjectHandle, error) {
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}
	return w.p11.UnwrapKey(s, mechanism, vault, w.sealed[i], bareMaterial(false))
}

func (w *workbench) vault(b *testing.B, s pkcs11.SessionHandle) pkcs11.ObjectHandle {
	b.Helper()
	return w.find(b, s, pkcs11.NewAttribute(pkcs11.CKA_LABEL, "keyferry vault AES-256 v1"))
}

func (w *workbench) session(b *testing.B) pkcs11.SessionHandle {
	b.Helper()
	s, err := w.p11.OpenSession(w.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, w.p11.CloseSession(s)) })
	return s
}

func (w *workbench) find(b *testing.B, s pkcs11.SessionHandle, attributes ...*pkcs11.Attribute) pkcs11.ObjectHandle {
	b.Helper()
	require.NoError(b, w.p11.FindObjectsInit(s, attributes))
	found, _, err := w.p11.FindObjects(s, 2)
	require.NoError(b, err)
	require.NoError(b, w.p11.FindObjectsFinal(s))
	require.Len(b, found, 1)
	return found[0]
}

// bareMaterial is the template that wrapping pairs (for fresh material) and
// vault keys pin.
func bareMaterial(fresh bool) []*pkcs11.Attribute {
	mechanisms := make([]byte, 0, 24)
	for _, m := range []uint64{pkcs11.CKM_AES_ECB, pkcs11.CKM_AES_GCM, pkcs11.CKM_AES_CMAC} {
		mechanisms = binary.NativeEndian.AppendUint64(mechanisms, m)
	}
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, fresh),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP_WITH_TRUSTED, true),
		pkcs11.NewAttribute(pkcs11.CKA_ALLOWED_MECHANISMS, mechanisms),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, !fresh),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, fresh),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
		pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_COPYABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false),
	}
}
