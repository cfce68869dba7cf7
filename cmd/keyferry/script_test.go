package main

import (
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(suite{m}, map[string]func(){"keyferry": main})
}

// suite is all tests, and the server that some of them build.
type suite struct{ *testing.M }

func (s suite) Run() int {
	var err error
	if buildDir, err = os.MkdirTemp("", "keyferry-test-"); err != nil {
		panic(err)
	}
	status := s.M.Run()
	if err := os.RemoveAll(buildDir); err != nil {
		panic(err)
	}
	return status
}

// TestScripts runs the program as its users do. Beside testscript's own, the
// scripts know these commands:
//
//	unhex FILE HEX      write bytes to a file
//	server [QUIRK...]   start a fake KMS with quirks (see fakeKMS) and write
//	                    credentials.json, which $KEYFERRY_CREDENTIALS names;
//	                    with tls, also ca.pem
//	keyferryd           start a real keyferryd dev on a real token instead
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("NO_COLOR", "1")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"unhex":  unhex,
			"server": server,

			"keyferryd": keyferryd,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

func unhex(ts *testscript.TestScript, _ bool, args []string) {
	data, err := hex.DecodeString(args[1])
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), data, 0o600))
}

func server(ts *testscript.TestScript, _ bool, quirks []string) {
	pair, err := fakePair()
	ts.Check(err)
	s := httptest.NewUnstartedServer(newFakeKMS(pair, quirks))
	if slices.Contains(quirks, "tls") {
		s.StartTLS()
		ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
		ts.Check(os.WriteFile(ts.MkAbs("ca.pem"), ca, 0o600))
	} else {
		s.Start()
	}
	ts.Defer(s.Close)
	_, endpoint, _ := strings.Cut(s.URL, "://")
	credentials, err := json.Marshal(credentialsFile{
		Endpoint: endpoint, Region: "cn-hangzhou", AccessKeyID: fakeKeyID, AccessKeySecret: fakeSecret,
	})
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs("credentials.json"), credentials, 0o600))
	ts.Setenv(credentialsVariable, ts.MkAbs("credentials.json"))
	ts.Setenv("ENDPOINT", endpoint)
}
