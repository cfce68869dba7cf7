// Package contract holds every kind of token that this machine has to one
// suite: what hsm promises holds on all of them, what a token lacks is named,
// and a token that gives keys away is refused.
package contract

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/hsm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// candidate is a token without any keys.
type candidate struct {
	hsm.Config                           // without pins but, where it has one, the serial
	soPIN      func() ([]byte, error)    // nil: the token has no security officer who could help
	needs      []hsm.Exception           // what it cannot keep, exactly
	findings   map[string]hsm.Verdict    // what else it is known for
	offers     []hsm.Algorithm           // of RSA pairs
	slow       bool                      // its private keys are
	usable     map[hsm.MaterialSpec]bool // what can encrypt
}

func (c *candidate) initConfig() hsm.InitConfig {
	return hsm.InitConfig{
		Module: c.Module, InitArgs: c.InitArgs, Label: c.Label, Pins: c.Pins, SOPIN: c.soPIN, UserPIN: c.PIN, Accept: c.Accept,
	}
}

// lengths are those that an import is tried with.
func (c *candidate) lengths() (list []int) {
	if c.slow {
		return []int{0, 1, 15, 16, 17, 24, 31, 32, 33, 40, 64}
	}
	for n := range 65 {
		list = append(list, n)
	}
	return list
}

// instance marks the pairs of these tests.
const instance = "0123456789abcdef"

var ctx = context.Background()

// run holds a token to the contract.
func run(t *testing.T, c *candidate) {
	t.Run("needs exceptions by name", func(t *testing.T) { testExceptions(t, c) })
	c.Accept = c.needs
	t.Run("init", func(t *testing.T) { testInit(t, c) })
	t.Run("examine", func(t *testing.T) { testExamine(t, c) })
	token := open(t, c.Config)
	before := objects(t, c)
	t.Run("capabilities", func(t *testing.T) { testCapabilities(t, c, token) })
	for _, alg := range c.offers {
		t.Run(string(alg), func(t *testing.T) { testImport(t, c, token, alg) })
	}
	t.Run("pairs", func(t *testing.T) { testPairs(t, c, token) })
	t.Run("MAC", func(t *testing.T) { testMAC(t, token) })
	require.Equal(t, before, objects(t, c), "nothing is left on the token")
	require.NoError(t, token.Close())
	t.Run("open again", func(t *testing.T) { testOpenAgain(t, c) })
}

func open(t *testing.T, cfg hsm.Config) *hsm.Token {
	t.Helper()
	token, err := hsm.Open(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, token.Close()) })
	return token
}

func objects(t *testing.T, c *candidate) hsm.ObjectCounts {
	t.Helper()
	x, err := hsm.Examine(ctx, c.Config, false)
	require.NoError(t, err)
	return x.Objects
}

// A token is refused for what it cannot keep, before anything is made on it,
// and in words that say what is lost and what to accept.
func testExceptions(t *testing.T, c *candidate) {
	x, err := hsm.Examine(ctx, c.Config, false)
	require.NoError(t, err)
	require.NoError(t, x.Capabilities.Refusal())
	var needs []hsm.Exception
	for _, n := range x.Capabilities.Needs {
		needs = append(needs, n.Exception)
		require.NotEmpty(t, n.Evidence, n.Exception)
	}
	require.ElementsMatch(t, c.needs, needs)
	if len(c.needs) == 0 {
		require.NoError(t, x.Rules)
		return
	}
	_, err = hsm.Init(ctx, c.initConfig())
	var refused *hsm.ExceptionError
	require.ErrorAs(t, err, &refused)
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.Equal(t, x.Capabilities.Needs, refused.Needs)
	// Each of them, with all others accepted.
	for i, missing := range c.needs {
		cfg := c.Config
		cfg.Accept = append(append([]hsm.Exception(nil), c.needs[:i]...), c.needs[i+1:]...)
		cfg.Pins = hsm.Pins{Serial: x.Token.Serial, VaultAES: hsm.Fingerprint{1}, MACKey: hsm.Fingerprint{1}}
		_, err = hsm.Open(ctx, cfg)
		require.ErrorAs(t, err, &refused, missing)
		require.Len(t, refused.Needs, 1)
		require.Equal(t, missing, refused.Needs[0].Exception)
		require.ErrorContains(t, err, missing.Loses())
		require.ErrorContains(t, err, fmt.Sprintf("accept %q", missing))
	}
	require.Equal(t, hsm.ObjectCounts{}, objects(t, c), "nothing was made")
}

func testInit(t *testing.T, c *candidate) {
	pins, err := hsm.Init(ctx, c.initConfig())
	require.NoError(t, err)
	require.NotEmpty(t, pins.Serial)
	require.NotZero(t, pins.VaultAES)
	require.NotZero(t, pins.MACKey)
	require.NotZero(t, pins.ReceiptKey)
	require.Equal(t, c.usable[hsm.SM4], pins.VaultSM4 != hsm.Fingerprint{})
	made := objects(t, c)
	// Again, with the pins and without, and without the security officer.
	officer := c.soPIN
	c.soPIN = nil
	for _, known := range []hsm.Pins{{Serial: pins.Serial}, pins} {
		c.Pins = known
		again, err := hsm.Init(ctx, c.initConfig())
		require.NoError(t, err)
		require.Equal(t, pins, again)
	}
	c.soPIN = officer
	require.Equal(t, made, objects(t, c), "nothing was made twice")
}

func testExamine(t *testing.T, c *candidate) {
	x, err := hsm.Examine(ctx, c.Config, false)
	require.NoError(t, err)
	require.NoError(t, x.Rules)
	for _, k := range x.Keys {
		require.Equal(t, k.Wanted, !k.Missing(), k.Name)
		require.NoError(t, k.Err)
	}
	for _, o := range x.Trusted {
		require.NoError(t, o.Err)
	}
	again, err := hsm.Examine(ctx, c.Config, false)
	require.NoError(t, err)
	require.Equal(t, x.Objects, again.Objects, "it writes nothing")
}

func testCapabilities(t *testing.T, c *candidate, token *hsm.Token) {
	caps := token.Capabilities()
	seen := map[string]bool{}
	for _, f := range caps.Findings {
		require.False(t, seen[f.ID], "%s is there once", f.ID)
		seen[f.ID] = true
		require.NotEmpty(t, f.Statement, f.ID)
		require.NotContains(t, f.Evidence, "\n")
		if f.Verdict != hsm.Proven && f.Verdict != hsm.Off {
			require.NotEmpty(t, f.Evidence, f.ID)
		}
	}
	for id, want := range c.findings {
		require.Equal(t, want, caps.Finding(id).Verdict, "%s: %s", id, caps.Finding(id).Evidence)
	}
	for _, alg := range []hsm.Algorithm{hsm.OAEPSHA1, hsm.OAEPSHA256, hsm.PKCS1v15} {
		err := token.Offers(hsm.RSA2048, alg)
		if offered(c, alg) {
			require.NoError(t, err)
			continue
		}
		// What is lacking is refused by name.
		require.ErrorIs(t, err, hsm.ErrUnsupported)
		require.ErrorContains(t, err, string(alg))
		_, err = token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, alg)
		require.ErrorIs(t, err, hsm.ErrUnsupported)
	}
	for _, spec := range []hsm.MaterialSpec{hsm.AES256, hsm.SM4} {
		if c.usable[spec] {
			require.NoError(t, token.Usable(spec))
		} else {
			require.ErrorIs(t, token.Usable(spec), hsm.ErrUnsupported)
		}
	}
}

func offered(c *candidate, alg hsm.Algorithm) bool {
	for _, a := range c.offers {
		if a == alg {
			return true
		}
	}
	return false
}

// The same material on every token, with what its identity must be.
var fixed = map[hsm.MaterialSpec][]byte{
	hsm.AES256: []byte("32 bytes, the same on each token"),
	hsm.SM4:    []byte("16 bytes as well"),
}

func testImport(t *testing.T, c *candidate, token *hsm.Token, alg hsm.Algorithm) {
	pair, err := token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, alg)
	require.NoError(t, err)
	other, err := token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, alg)
	require.NoError(t, err)
	defer func() {
		require.NoError(t, token.DestroyPair(ctx, pair.ID))
		require.NoError(t, token.DestroyPair(ctx, other.ID))
	}()
	wrap := func(p hsm.PairInfo, material []byte) []byte {
		blob, err := byok.Wrap(string(alg), p.SPKI, material)
		require.NoError(t, err)
		return blob
	}
	const keyID = "1234abcd-12ab-34cd-56ef-1234567890ab"
	request := func(spec hsm.MaterialSpec, blob []byte) hsm.ImportRequest {
		return hsm.ImportRequest{Pair: pair.ID, Algorithm: alg, Wrapped: blob, Spec: spec, Context: []byte(keyID)}
	}
	for spec, material := range fixed {
		out, err := token.Import(ctx, request(spec, wrap(pair, material)))
		require.NoError(t, err)
		id, err := byok.MaterialID(keyID, material)
		require.NoError(t, err)
		require.Equal(t, id, out.Identity.MaterialID)
		kcv, err := byok.KCV("Aliyun_AES_256", fixed[hsm.AES256])
		require.NoError(t, err)
		if spec == hsm.AES256 {
			require.Equal(t, kcv, out.Identity.KCV)
		}
		if c.usable[spec] {
			testUse(t, token, out.Material)
		} else {
			_, err := token.OpenMaterial(ctx, out.Material)
			require.ErrorIs(t, err, hsm.ErrUnsupported)
		}
	}
	// Every other length, and every other blob, is answered alike.
	for _, n := range c.lengths() {
		for spec := range fixed {
			if n == spec.Len() {
				continue
			}
			_, err := token.Import(ctx, request(spec, wrapAny(t, alg, pair, random(n))))
			require.Equal(t, hsm.ErrInvalidMaterial, err, "%d bytes as %s", n, spec)
		}
	}
	good := wrap(pair, random(32))
	for name, blob := range map[string][]byte{
		"empty": nil, "short": good[1:], "long": append(append([]byte(nil), good...), 0), "zeros": make([]byte, len(good)),
		"random": random(len(good)), "damaged": append([]byte{good[0] ^ 1}, good[1:]...), "another pair's": wrap(other, random(32)),
	} {
		_, err := token.Import(ctx, request(hsm.AES256, blob))
		require.Equal(t, hsm.ErrInvalidMaterial, err, name)
	}
	_, err = token.Import(ctx, request(hsm.AES256, good))
	require.NoError(t, err, "the pair is as good as before")
}

func testUse(t *testing.T, token *hsm.Token, m hsm.Material) {
	key, err := token.OpenMaterial(ctx, m)
	require.NoError(t, err)
	sealed, err := key.Encrypt(ctx, nil, []byte("text"), []byte("data"))
	require.NoError(t, err)
	plain, err := key.Decrypt(ctx, nil, sealed, []byte("data"))
	require.NoError(t, err)
	require.Equal(t, "text", string(plain))
	_, err = key.Decrypt(ctx, nil, sealed, []byte("other"))
	require.ErrorIs(t, err, hsm.ErrAuthentication)
	sealed[len(sealed)-1] ^= 1
	_, err = key.Decrypt(ctx, nil, sealed, []byte("data"))
	require.ErrorIs(t, err, hsm.ErrAuthentication)
	require.NoError(t, key.Close())
	_, err = key.Encrypt(ctx, nil, nil, nil)
	require.ErrorIs(t, err, hsm.ErrKeyLost)

	m.Ref = append([]byte(nil), m.Ref...)
	m.Ref[0] ^= 1
	_, err = token.OpenMaterial(ctx, m)
	require.ErrorIs(t, err, hsm.ErrUntrusted)
}

func testPairs(t *testing.T, c *candidate, token *hsm.Token) {
	info, err := token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, c.offers[0])
	require.NoError(t, err)
	again, err := token.Pair(ctx, info.ID)
	require.NoError(t, err)
	require.Equal(t, info, again)
	list, err := token.Pairs(ctx, instance)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, info.ID, list[0].ID)
	_, err = token.Import(ctx, hsm.ImportRequest{Pair: info.ID, Algorithm: hsm.SM2PKE, Wrapped: []byte{4}, Spec: hsm.AES256})
	require.ErrorIs(t, err, hsm.ErrUnsupported)
	require.NoError(t, token.DestroyPair(ctx, info.ID))
	require.NoError(t, token.DestroyPair(ctx, info.ID))
	_, err = token.Pair(ctx, info.ID)
	require.ErrorIs(t, err, hsm.ErrPairNotFound)
}

func testMAC(t *testing.T, token *hsm.Token) {
	a, err := token.MAC(ctx, "domain", []byte("part"))
	require.NoError(t, err)
	require.NoError(t, token.VerifyMAC(ctx, a[:], "domain", []byte("part")))
	require.ErrorIs(t, token.VerifyMAC(ctx, a[:], "domain", []byte("par"), []byte("t")), hsm.ErrUntrusted)
	x, err := token.Random(ctx, 16)
	require.NoError(t, err)
	y, err := token.Random(ctx, 16)
	require.NoError(t, err)
	require.NotEqual(t, x, y)
}

// What was sealed opens again, under the pinned keys and no others.
func testOpenAgain(t *testing.T, c *candidate) {
	token := open(t, c.Config)
	pair, err := token.GeneratePair(ctx, instance, time.Now(), hsm.RSA2048, c.offers[0])
	require.NoError(t, err)
	blob, err := byok.Wrap(string(c.offers[0]), pair.SPKI, fixed[hsm.AES256])
	require.NoError(t, err)
	out, err := token.Import(ctx, hsm.ImportRequest{Pair: pair.ID, Algorithm: c.offers[0], Wrapped: blob, Spec: hsm.AES256})
	require.NoError(t, err)
	require.NoError(t, token.DestroyPair(ctx, pair.ID))
	require.NoError(t, token.Close())
	_, err = token.MAC(ctx, "domain")
	require.ErrorIs(t, err, hsm.ErrClosed)

	token = open(t, c.Config)
	if c.usable[hsm.AES256] {
		testUse(t, token, out.Material)
	}
	require.NoError(t, token.Close())
	for name, change := range map[string]func(*hsm.Config){
		"vault":  func(c *hsm.Config) { c.Pins.VaultAES[0] ^= 1 },
		"MAC":    func(c *hsm.Config) { c.Pins.MACKey[0] ^= 1 },
		"serial": func(c *hsm.Config) { c.Pins.Serial = "another" },
		"PIN":    func(c *hsm.Config) { c.PIN = func() ([]byte, error) { return []byte("wrong, and long enough"), nil } },
	} {
		cfg := c.Config
		change(&cfg)
		_, err := hsm.Open(ctx, cfg)
		if name == "PIN" {
			require.ErrorIs(t, err, hsm.ErrPIN)
		} else {
			require.True(t, errors.Is(err, hsm.ErrUntrusted) || errors.Is(err, hsm.ErrUnavailable), "%s: %v", name, err)
		}
	}
}

// random answers n random bytes; crypto/rand ends the program rather than fail.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}
