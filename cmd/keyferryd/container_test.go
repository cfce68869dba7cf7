//go:build container

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
)

// TestContainer sets keyferryd up as softhsm/compose.yaml says, from the image
// that softhsm/test-container.sh built, and uses it from outside with Alibaba
// Cloud's clients, before and after it is killed.
func TestContainer(t *testing.T) {
	t.Parallel() // both wait for containers most of the time
	b := newBox(t, "compose.yaml")
	b.compose(t, "up", "-d")
	b.waitUntilHealthy(t)
	b.readSecret(t)

	t.Run("is an ordinary user on a read-only root", func(t *testing.T) {
		require.Equal(t, "10001\n", docker(t, "exec", b.id(t), "id", "-u"))
		for _, dir := range []string{"/", "/etc/keyferry", "/run/secrets", "/run/officer", "/usr/local/bin", "/tmp"} {
			out, err := exec.CommandContext(t.Context(), "docker", "exec", b.id(t), "touch", dir+"/written").CombinedOutput()
			require.Error(t, err, "%s: %s", dir, out)
		}
		out, err := exec.CommandContext(t.Context(), "docker", "exec", b.id(t), "cat", "/run/officer/so-pin").CombinedOutput()
		require.Error(t, err, "the server has the security officer's PIN: %s", out)
	})

	voyages := offered(t, b.client(t))
	for _, v := range []voyage{
		{byok.AES256, "RSA_2048", byok.OAEPSHA1},
		{byok.AES256, "RSA_2048", byok.OAEPSHA256},
		{byok.AES256, "EC_SM2", byok.SM2PKE},
		{byok.SM4, "RSA_2048", byok.OAEPSHA256},
		{byok.SM4, "EC_SM2", byok.SM2PKE},
	} {
		require.Contains(t, voyages, v)
	}
	before := map[string]kept{}
	for how, client := range b.clients(t) {
		for _, v := range voyages {
			t.Run(how+"/"+v.keySpec+"/"+v.algorithm, func(t *testing.T) { live(t, client, v) })
		}
		before[how] = keep(t, client, voyages[len(voyages)-1])
	}
	require.NotEmpty(t, before)

	b.killDuringImports(t, voyages)

	// Everything goes but the volumes.
	b.compose(t, "down")
	b.compose(t, "up", "-d")
	b.waitUntilHealthy(t)
	for how, client := range b.clients(t) {
		t.Run(how+", in other containers", func(t *testing.T) {
			plaintext, keyID, err := client.decrypt(before[how].blob, nil)
			require.NoError(t, err)
			require.Equal(t, before[how].plaintext, plaintext)
			require.Equal(t, before[how].keyID, keyID)
			live(t, client, voyages[0])
		})
	}
}

// killDuringImports kills the server while customers import and encrypt, each
// time after another number of answers. What was answered is there afterwards.
func (b *box) killDuringImports(t *testing.T, voyages []voyage) {
	const kills = 5
	far := time.Now().Add(1000 * time.Hour).Unix()
	var all []*ledger
	for kill := range kills {
		c := b.client(t)
		var working []*ledger
		blobs := map[*ledger]string{}
		for _, v := range voyages {
			l := &ledger{customer: newCustomerBy(t, c, v), attempted: far, ciphertexts: map[string]string{}, unchecked: map[string]string{}}
			blobs[l] = wrapped(t, v.algorithm, l.publicKey, l.material)
			working = append(working, l)
		}
		all = append(all, working...)

		var answers atomic.Int32
		enough := make(chan struct{})
		answered := func() {
			if answers.Add(1) == int32(1+10*kill) {
				close(enough)
			}
		}
		ctx, hangUp := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		errs := make([]error, len(working))
		for i, l := range working {
			wg.Go(func() { errs[i] = l.work(ctx, blobs[l], answered) })
		}
		<-enough
		docker(t, "kill", "-s", "KILL", b.id(t))
		hangUp() // whoever the engine has not told that its server is gone
		wg.Wait()
		require.NoError(t, errors.Join(errs...))

		docker(t, "start", b.id(t))
		b.waitUntilHealthy(t)
		for _, l := range all {
			l.client = b.client(t)
			l.check(t, l.unchecked)
			clear(l.unchecked)
		}
	}
	opened := 0
	for _, l := range all {
		l.check(t, l.ciphertexts)
		opened += len(l.ciphertexts)
	}
	t.Logf("%d kills: %d keys and %d ciphertexts were there", kills, len(all), opened)
}

// kept is what must outlive the server.
type kept struct{ keyID, plaintext, blob string }

// keep imports a key and encrypts under it.
func keep(t *testing.T, client sdk, v voyage) kept {
	t.Helper()
	keyID, _, err := client.createKey(v.keySpec)
	require.NoError(t, err)
	publicKey, token, err := client.parameters(keyID, v.pairSpec, v.algorithm)
	require.NoError(t, err)
	require.NoError(t, client.importMaterial(keyID, wrapped(t, v.algorithm, publicKey, randomMaterial(byok.MaterialLen(v.keySpec))), token, 0))
	plaintext := base64.StdEncoding.EncodeToString([]byte("kept through a kill"))
	blob, err := client.encrypt(keyID, plaintext, nil)
	require.NoError(t, err)
	return kept{keyID, plaintext, blob}
}

// box is a project of softhsm/compose.yaml, seen from one of its servers.
type box struct {
	command []string // of Compose, with the project's own arguments
	project string
	service string      // the server
	keys    credentials // without the endpoint, which changes
}

// newBox makes a project of files in softhsm.
func newBox(t *testing.T, files ...string) *box {
	// The plugin of today, or the program that Debian 12 has.
	command := []string{"docker", "compose"}
	if exec.CommandContext(t.Context(), "docker", "compose", "version").Run() != nil {
		command = []string{"docker-compose"}
	}
	b := &box{
		project: "keyferry-test-" + strings.ToLower(rand.Text()[:8]), service: "keyferryd",
		keys: credentials{Region: "local", AccessKeyID: "keyferry"},
	}
	b.command = slices.Concat(command, []string{"-p", b.project})
	for _, file := range files {
		b.command = append(b.command, "-f", "../../softhsm/"+file)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := b.run(context.Background(), "logs")
			t.Logf("the logs:\n%s", out)
		}
		out, err := b.run(context.Background(), "down", "-v")
		require.NoError(t, err, out)
	})
	return b
}

// at is the same project, seen from another server.
func (b *box) at(service string) *box {
	other := *b
	other.service = service
	return &other
}

func (b *box) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, b.command[0], append(slices.Clip(b.command[1:]), args...)...)
	cmd.Env = append(os.Environ(), "KEYFERRY_PORT=0", "KEYFERRY_PORT_2=0") // any that are free
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return stderr.String(), err
	}
	return string(out), nil
}

func (b *box) compose(t *testing.T, args ...string) string {
	t.Helper()
	out, err := b.run(t.Context(), args...)
	require.NoError(t, err, "%s %v: %s", b.command, args, out)
	return out
}

// id is that of the server's container.
func (b *box) id(t *testing.T) string {
	t.Helper()
	id := strings.TrimSpace(docker(t, "ps", "-aq",
		"--filter", "label=com.docker.compose.project="+b.project, "--filter", "label=com.docker.compose.service="+b.service))
	require.NotEmpty(t, id)
	return id
}

// readSecret reads the access key's secret where init put it, as the head of
// the compose file says.
func (b *box) readSecret(t *testing.T) {
	t.Helper()
	b.keys.AccessKeySecret = strings.TrimSpace(b.compose(t, "exec", "-T", "keyferryd", "cat", "/run/secrets/access-key-secret"))
	require.Len(t, b.keys.AccessKeySecret, 32)
}

func (b *box) waitUntilHealthy(t *testing.T) {
	t.Helper()
	require.Eventually(t, func() bool {
		return docker(t, "inspect", "-f", "{{.State.Health.Status}}", b.id(t)) == "healthy\n"
	}, time.Minute, 100*time.Millisecond)
}

// credentials have the port of now, which may change with a start.
func (b *box) credentials(t *testing.T) credentials {
	t.Helper()
	c := b.keys
	// An engine with IPv6 prints a line for each address.
	c.Endpoint, _, _ = strings.Cut(strings.TrimSpace(docker(t, "port", b.id(t), "8080/tcp")), "\n")
	return c
}

// clients are Alibaba Cloud's.
func (b *box) clients(t *testing.T) map[string]sdk {
	c := b.credentials(t)
	return sdks(t, c.Endpoint, c)
}

func (b *box) client(t *testing.T) *client { return clientOf(b.credentials(t)) }

// docker runs the docker command to its end and answers what it printed.
func docker(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "docker", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(t, cmd.Run(), "docker %s: %s", args[0], &stderr)
	return stdout.String()
}
