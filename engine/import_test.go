package engine_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/smx509"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine"
	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store"
	"github.com/keyferry/keyferry/hsm"
)

func TestImportMeasuresAsTheCustomerDoes(t *testing.T) {
	h := newHouse(t)
	for _, spec := range []engine.KeySpec{engine.AliyunAES256, engine.AliyunSM4} {
		t.Run(string(spec), func(t *testing.T) {
			keyID := h.newKey(t, spec)
			material := randomBytes(byok.MaterialLen(string(spec)))
			imported := h.importInto(t, keyID, material)
			require.Equal(t, engine.Enabled, imported.State)
			require.Equal(t, imported, h.describe(t, keyID))

			id, err := byok.MaterialID(keyID, material)
			require.NoError(t, err)
			require.Equal(t, id, imported.MaterialID)
			if imported.CheckValue.Algorithm == hsm.CheckValueAES && spec == engine.AliyunSM4 {
				return // a token without SM4
			}
			kcv, err := byok.KCV(string(spec), material)
			require.NoError(t, err)
			require.Equal(t, kcv, imported.CheckValue.Value)
		})
	}
}

// SM4 material is imported and identified everywhere, and used only where the
// token has SM4.
func TestSM4WithoutSM4InTheToken(t *testing.T) {
	h := newHouse(t)
	if h.cfg.Token.Usable(hsm.SM4) == nil {
		t.Skip("this token has SM4; needs one without")
	}
	keyID := h.newKey(t, engine.AliyunSM4)
	h.importInto(t, keyID, randomBytes(16))
	_, err := h.Encrypt(t.Context(), keyID, []byte("x"), nil)
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "SM4")
	_, _, err = h.GenerateDataKey(t.Context(), engine.DataKeyInput{KeyID: keyID})
	require.Contains(t, requireKind(t, engine.UnsupportedOp, err).Hint, "SM4")

	in := input(t, h.parameters(t, keyID), randomBytes(16))
	in.ExpectCheckValue = randomBytes(3)
	_, err = h.ImportKeyMaterial(t.Context(), in)
	e := requireKind(t, engine.InvalidParameter, err)
	require.Equal(t, "ExpectKeyCheckValue", e.Parameter)
	require.Contains(t, e.Hint, "material id")
}

func TestWrongLengthsAreRefused(t *testing.T) {
	onEveryRoute(t, testWrongLengthsAreRefused, with(func(c *engine.Config) { c.FailureBudget = 1000 }))
}

func testWrongLengthsAreRefused(t *testing.T, h *house) {
	fresh, bound := h.newKey(t, h.route.spec), h.newKey(t, h.route.spec)
	right := h.route.len()
	freshParams, boundParams := h.parameters(t, fresh), h.parameters(t, bound)

	// Its last bytes are zero, so that shorter material with zeros added
	// would be the same.
	first := append(randomBytes(right-9), make([]byte, 9)...)
	_, err := h.ImportKeyMaterial(t.Context(), h.input(t, boundParams, first))
	require.NoError(t, err)
	before := h.describe(t, bound)

	for n := range 65 {
		if n == right {
			continue
		}
		refuse := func(params engine.ImportParameters, name string, material []byte) {
			in := engine.ImportInput{KeyID: params.KeyID, ImportToken: params.ImportToken}
			in.EncryptedKeyMaterial = h.wrapAnything(t, params.PublicKey, material)
			if h.route.alg == hsm.PKCS1v15 && h.cfg.Token.ImplicitRejection() {
				in.ExpectMaterialID = randomBytes(hsm.MaterialIDLen)
			}
			_, err := h.ImportKeyMaterial(t.Context(), in)
			require.Equal(t, refused, err, "%d bytes, %s", n, name)
		}
		refuse(freshParams, "random", randomBytes(n))
		if h.route.alg == defaultRoute.alg { // what comes out is no matter of how it was wrapped
			refuse(freshParams, "zeros", make([]byte, n))
			refuse(freshParams, "zero-tailed", append(randomBytes(max(0, n-8)), make([]byte, min(8, n))...))
		}
		refuse(boundParams, "the first, cut or with zeros", append(bytes.Clone(first), make([]byte, 64)...)[:n])
	}
	require.Equal(t, engine.PendingImport, h.describe(t, fresh).State)
	require.Equal(t, before, h.describe(t, bound))

	_, err = h.ImportKeyMaterial(t.Context(), h.input(t, freshParams, randomBytes(right)))
	require.NoError(t, err, "the right length")
}

// refused is the one answer to bad material, down to its cause, which it has
// not.
var refused error = &engine.Error{Kind: engine.InvalidKeyMaterial}

// wrapAnything wraps by the house's route what byok refuses to.
func (h *house) wrapAnything(tb testing.TB, spki, material []byte) []byte {
	tb.Helper()
	var wrapped []byte
	var err error
	switch h.route.alg {
	case hsm.OAEPSHA256:
		wrapped, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, publicKey(tb, spki), material, nil)
	case hsm.PKCS1v15:
		wrapped, err = rsa.EncryptPKCS1v15(rand.Reader, publicKey(tb, spki), material)
	case hsm.SM2PKE:
		pub, parseErr := smx509.ParsePKIXPublicKey(spki)
		require.NoError(tb, parseErr)
		wrapped, err = sm2.EncryptASN1(rand.Reader, pub.(*ecdsa.PublicKey), material)
	default:
		return oaep(tb, spki, material)
	}
	require.NoError(tb, err)
	return wrapped
}

// oaep wraps by RSAES_OAEP_SHA_1 what byok refuses to.
func oaep(tb testing.TB, spki, material []byte) []byte {
	tb.Helper()
	wrapped, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, publicKey(tb, spki), material, nil)
	require.NoError(tb, err)
	return wrapped
}

func publicKey(tb testing.TB, spki []byte) *rsa.PublicKey {
	tb.Helper()
	key, err := x509.ParsePKIXPublicKey(spki)
	require.NoError(tb, err)
	require.IsType(tb, &rsa.PublicKey{}, key)
	return key.(*rsa.PublicKey)
}

// A CMK has one material for ever: not another one, not after it was deleted,
// and not one with the same check value.
func TestOtherMaterialIsRefused(t *testing.T) { onEveryRoute(t, testOtherMaterialIsRefused) }

func testOtherMaterialIsRefused(t *testing.T, h *house) {
	h.needUse(t)
	first, second := sameCheckValue(t, h.route.spec)
	keyID := h.newKey(t, h.route.spec)
	params := h.parameters(t, keyID)
	imported, err := h.ImportKeyMaterial(t.Context(), h.input(t, params, first))
	require.NoError(t, err)
	blob := h.encrypt(t, keyID, "under the first")

	refuse := func(material []byte) {
		before := h.describe(t, keyID)
		in := h.input(t, params, material)
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.Equal(t, refused, err)
		in.ExpectCheckValue = imported.CheckValue.Value[:]
		_, err = h.ImportKeyMaterial(t.Context(), in)
		require.Equal(t, refused, err)
		require.Equal(t, before, h.describe(t, keyID))
	}
	refuse(h.route.material())
	refuse(second)
	h.requireDecrypts(t, blob, "under the first")

	require.NoError(t, h.DeleteKeyMaterial(t.Context(), keyID))
	refuse(h.route.material())
	refuse(second)

	h.reopen(t)
	refuse(second)
	again, err := h.ImportKeyMaterial(t.Context(), h.input(t, params, first))
	require.NoError(t, err)
	require.Equal(t, imported, again)
	h.requireDecrypts(t, blob, "under the first")
}

// sameCheckValue finds two keys with one check value, which among 2^24 takes
// some thousands of tries.
func sameCheckValue(tb testing.TB, spec engine.KeySpec) (first, second []byte) {
	tb.Helper()
	seen := make(map[[3]byte][]byte)
	for {
		key := randomBytes(byok.MaterialLen(string(spec)))
		kcv, err := byok.KCV(string(spec), key)
		require.NoError(tb, err)
		if other, ok := seen[kcv]; ok {
			return other, key
		}
		seen[kcv] = key
	}
}

// Whatever is wrong with a blob, the answer is the same and comes no sooner
// than the floor.
func TestBadBlobsHaveOneAnswer(t *testing.T) {
	const floor = 20 * time.Millisecond
	h := newHouse(t, withPairs(2), with(func(c *engine.Config) { c.FailureFloor = floor }))
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	material := randomBytes(32)
	good := input(t, params, material).EncryptedKeyMaterial
	pub := publicKey(t, params.PublicKey)

	other := h.parameters(t, h.newKey(t, engine.AliyunAES256))
	require.NotEqual(t, params.PublicKey, other.PublicKey)
	sha2, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, pub, material, nil)
	require.NoError(t, err)
	labelled, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, pub, material, []byte("label"))
	require.NoError(t, err)
	pkcs1, err := rsa.EncryptPKCS1v15(rand.Reader, pub, material)
	require.NoError(t, err)

	bad := map[string][]byte{
		"none":                   nil,
		"empty":                  {},
		"one byte":               {0},
		"truncated":              good[:len(good)-1],
		"half":                   good[:len(good)/2],
		"too long":               append(bytes.Clone(good), 0),
		"leading zero":           append([]byte{0}, good...),
		"huge":                   randomBytes(1 << 20),
		"zeros":                  make([]byte, len(good)),
		"greater than modulus":   bytes.Repeat([]byte{0xff}, len(good)),
		"the modulus":            pub.N.Bytes(),
		"random":                 append([]byte{0}, randomBytes(len(good)-1)...),
		"wrapped for other pair": oaep(t, other.PublicKey, material),
		"OAEP with SHA-256":      sha2,
		"OAEP with a label":      labelled,
		"PKCS#1 v1.5":            pkcs1,
		"not wrapped":            material,
		"wrong length":           oaep(t, params.PublicKey, material[:31]),
	}
	for i := 0; i < len(good); i += 37 {
		tampered := bytes.Clone(good)
		tampered[i] ^= 1
		bad[fmt.Sprintf("tampered at %d", i)] = tampered
	}
	for name, blob := range bad {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			_, err := h.ImportKeyMaterial(t.Context(), engine.ImportInput{
				KeyID: keyID, EncryptedKeyMaterial: blob, ImportToken: params.ImportToken,
			})
			require.GreaterOrEqual(t, time.Since(start), floor)
			require.Equal(t, refused, err)
			require.Equal(t, "engine: key material is invalid", err.Error())
		})
	}
	require.Equal(t, engine.PendingImport, h.describe(t, keyID).State)

	_, err = h.ImportKeyMaterial(t.Context(), engine.ImportInput{
		KeyID: keyID, EncryptedKeyMaterial: good, ImportToken: params.ImportToken,
	})
	require.NoError(t, err, "the good one is still good")

	t.Run("other material", func(t *testing.T) {
		start := time.Now()
		_, err := h.ImportKeyMaterial(t.Context(), input(t, params, randomBytes(32)))
		require.GreaterOrEqual(t, time.Since(start), floor)
		require.Equal(t, refused, err)
	})
}

// After so many refusals the import token is dead: for good material as well,
// and after a restart. Another token of the same CMK is not.
func TestFailureBudget(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	material := randomBytes(32)
	bad := input(t, params, material)
	bad.EncryptedKeyMaterial[9] ^= 1
	for range 99 {
		_, err := h.ImportKeyMaterial(t.Context(), bad)
		require.Equal(t, refused, err)
	}
	_, err := h.ImportKeyMaterial(t.Context(), input(t, params, material))
	require.NoError(t, err, "one failure is left")
	_, err = h.ImportKeyMaterial(t.Context(), bad)
	require.Equal(t, refused, err)

	dead := func() {
		_, err := h.ImportKeyMaterial(t.Context(), bad)
		requireKind(t, engine.InvalidImportToken, err)
		_, err = h.ImportKeyMaterial(t.Context(), input(t, params, material))
		requireKind(t, engine.InvalidImportToken, err)
	}
	dead()
	h.reopen(t)
	dead()
	h.importInto(t, keyID, material)
}

// Many at once do not get more tries than one after the other.
func TestFailureBudgetUnderConcurrency(t *testing.T) {
	const budget = 7
	h := newHouse(t, with(func(c *engine.Config) { c.FailureBudget = budget }))
	keyID := h.newKey(t, engine.AliyunAES256)
	bad := input(t, h.parameters(t, keyID), randomBytes(32))
	bad.EncryptedKeyMaterial[9] ^= 1

	answers := inParallel(40, func(int) error {
		_, err := h.ImportKeyMaterial(t.Context(), bad)
		return err
	})
	tried := 0
	for _, err := range answers {
		if refused.Error() == err.Error() {
			tried++
			continue
		}
		requireKind(t, engine.InvalidImportToken, err)
	}
	require.Equal(t, budget, tried)
}

// Nor do many at once on several nodes, each of which counts what is under way
// for itself.
func TestFailureBudgetOnEveryNode(t *testing.T) {
	const budget = 7
	h := newHouse(t, with(func(c *engine.Config) { c.FailureBudget = budget }))
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	material := randomBytes(32)
	bad := input(t, params, material)
	bad.EncryptedKeyMaterial[9] ^= 1
	other, err := engine.New(t.Context(), h.cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close()) }()
	nodes := []*engine.Engine{h.Engine, other}

	tried := 0
	for _, err := range inParallel(40, func(i int) error {
		_, err := nodes[i%2].ImportKeyMaterial(t.Context(), bad)
		return err
	}) {
		if refused.Error() == err.Error() {
			tried++
			continue
		}
		requireKind(t, engine.InvalidImportToken, err)
	}
	require.Equal(t, budget, tried)
	for _, node := range nodes {
		_, err := node.ImportKeyMaterial(t.Context(), input(t, params, material))
		requireKind(t, engine.InvalidImportToken, err)
	}
}

// inParallel runs f so many times at once and returns what each answered.
func inParallel(n int, f func(i int) error) []error {
	answers := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { answers[i] = f(i) })
	}
	wg.Wait()
	return answers
}

// A caller who hangs up does not get around the count, and is not told sooner
// or otherwise.
func TestFailureIsCountedForOneWhoHangsUp(t *testing.T) {
	ctx, hangUp := context.WithCancel(t.Context())
	h := newHouse(t, with(func(c *engine.Config) { c.FailureBudget, c.FailureFloor = 1, time.Hour }),
		withStore(func(s store.Store) store.Store {
			return &faultyStore{Store: s, countFailure: func() { hangUp() }}
		}))
	keyID := h.newKey(t, engine.AliyunAES256)
	in := input(t, h.parameters(t, keyID), randomBytes(32))
	in.EncryptedKeyMaterial[9] ^= 1
	_, err := h.ImportKeyMaterial(ctx, in)
	require.Equal(t, refused, err)
	_, err = h.ImportKeyMaterial(t.Context(), in)
	requireKind(t, engine.InvalidImportToken, err)
}

func TestExpectations(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	material := randomBytes(32)
	kcv, err := byok.KCV(string(engine.AliyunAES256), material)
	require.NoError(t, err)
	id, err := byok.MaterialID(keyID, material)
	require.NoError(t, err)
	elsewhere, err := byok.MaterialID(h.newKey(t, engine.AliyunAES256), material)
	require.NoError(t, err)

	for name, expect := range map[string]struct{ kcv, id []byte }{
		"other check value":              {randomBytes(3), nil},
		"other material id":              {nil, randomBytes(32)},
		"material id under another CMK":  {nil, elsewhere[:]},
		"first half of the id":           {nil, append(bytes.Clone(id[:16]), randomBytes(16)...)},
		"second half of the id":          {nil, append(randomBytes(16), id[16:]...)},
		"right id and other check value": {randomBytes(3), id[:]},
		"right check value and other id": {kcv[:], randomBytes(32)},
	} {
		t.Run(name, func(t *testing.T) {
			in := input(t, params, material)
			in.ExpectCheckValue, in.ExpectMaterialID = expect.kcv, expect.id
			_, err := h.ImportKeyMaterial(t.Context(), in)
			require.Equal(t, refused, err)
			key := h.describe(t, keyID)
			require.Equal(t, engine.PendingImport, key.State)
			require.Zero(t, key.MaterialID, "nothing is known of a material that was refused")
		})
	}
	for parameter, in := range map[string]engine.ImportInput{
		"ExpectKeyCheckValue": {ExpectCheckValue: kcv[:2]},
		"ExpectKeyMaterialId": {ExpectMaterialID: id[:31]},
	} {
		in.KeyID, in.ImportToken = keyID, params.ImportToken
		_, err := h.ImportKeyMaterial(t.Context(), in)
		require.Equal(t, parameter, requireKind(t, engine.InvalidParameter, err).Parameter)
	}
	in := input(t, params, material)
	in.ExpectCheckValue, in.ExpectMaterialID = kcv[:], id[:]
	_, err = h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
}

// Where the token answers a damaged PKCS#1 v1.5 blob with a random key, the
// customer has to say what he expects.
func TestPKCS1v15(t *testing.T) {
	h := newHouse(t, withToken(pkcs1Token()))
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parametersV15(t, keyID)
	material := randomBytes(32)
	in := inputFor(t, params, hsm.PKCS1v15, material)
	if h.cfg.Token.ImplicitRejection() {
		_, err := h.ImportKeyMaterial(t.Context(), in)
		e := requireKind(t, engine.InvalidParameter, err)
		require.Equal(t, "ExpectKeyMaterialId", e.Parameter)
		require.Contains(t, e.Hint, "RSAES_PKCS1_V1_5")
	}
	id, err := byok.MaterialID(keyID, material)
	require.NoError(t, err)
	in.ExpectMaterialID = id[:]
	_, err = h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)

	for i := range 20 {
		in.EncryptedKeyMaterial = inputFor(t, params, hsm.PKCS1v15, material).EncryptedKeyMaterial
		in.EncryptedKeyMaterial[i] ^= 1
		_, err = h.ImportKeyMaterial(t.Context(), in)
		require.Equal(t, refused, err)
	}
}

func TestExpiryOfARequest(t *testing.T) {
	h := newHouse(t)
	keyID := h.newKey(t, engine.AliyunAES256)
	params := h.parameters(t, keyID)
	for name, at := range map[string]time.Time{
		"past":             h.clock.in(-time.Hour),
		"1970":             time.Unix(0, 0),
		"this second":      h.clock.in(0),
		"no whole second":  h.clock.in(time.Hour).Add(1),
		"a year too large": time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		t.Run(name, func(t *testing.T) {
			in := input(t, params, randomBytes(32))
			in.ExpireAt = at
			_, err := h.ImportKeyMaterial(t.Context(), in)
			require.Equal(t, "KeyMaterialExpireUnix", requireKind(t, engine.InvalidParameter, err).Parameter)
		})
	}
	in := input(t, params, randomBytes(32))
	in.ExpireAt = h.clock.in(time.Second).In(time.FixedZone("", 3600))
	key, err := h.ImportKeyMaterial(t.Context(), in)
	require.NoError(t, err)
	require.Equal(t, h.clock.in(time.Second), key.ExpireAt, "in UTC")
}
