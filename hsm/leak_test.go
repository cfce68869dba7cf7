package hsm_test

import (
	"bytes"
	"os"
	"runtime/debug"
	"strconv"
	"testing"

	"github.com/miekg/pkcs11"
	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/softhsm"
)

// Our SoftHSM2 frees what is destroyed, of which stock keeps 246 bytes each.
func TestDestroyedObjectsAreFreed(t *testing.T) {
	soft := softhsm.New(t, softhsm.WithKeys())
	if !hasSM(soft) {
		t.Skipf("%s is not ours, which alone is held to this: run \"make softhsm\" and name it in KEYFERRY_SOFTHSM_MODULE", soft.Module)
	}
	p, s := user(t, soft)
	at := pkcs11.NewAttribute
	value := []*pkcs11.Attribute{
		at(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), at(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
		at(pkcs11.CKA_TOKEN, false), at(pkcs11.CKA_VALUE, random(32)),
	}
	const objects = 50_000
	churn := func() {
		for range objects {
			h, err := p.CreateObject(s, value)
			require.NoError(t, err)
			require.NoError(t, p.DestroyObject(s, h))
		}
	}
	churn()
	before := resident(t)
	churn()
	require.Less(t, resident(t)-before, objects*246/2)
}

// resident is how much of this process is in memory, in bytes, without what Go
// could give back.
func resident(t *testing.T) int {
	t.Helper()
	debug.FreeOSMemory()
	text, err := os.ReadFile("/proc/self/statm") // size, resident, …, in pages
	require.NoError(t, err)
	pages, err := strconv.Atoi(string(bytes.Fields(text)[1]))
	require.NoError(t, err)
	return pages * os.Getpagesize()
}
