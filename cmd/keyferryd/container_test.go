//go:build container

package main

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
)

// containerImage is what softhsm/test-container.sh built before it runs this.
const containerImage = "keyferry/keyferryd"

// TestContainer sets keyferryd up in containers as an operator does, and uses
// it from outside with Alibaba Cloud's clients, before and after it is killed.
func TestContainer(t *testing.T) {
	b := newBox(t, "keyferry-test-"+strings.ToLower(rand.Text()))
	b.initialise(t)
	b.serve(t)

	t.Run("is an ordinary user on a read-only root", func(t *testing.T) {
		require.Equal(t, "10001\n", docker(t, nil, "exec", b.name, "id", "-u"))
		for _, dir := range []string{"/", "/etc/keyferry", "/run/secrets", "/usr/local/bin", "/tmp"} {
			out, err := exec.CommandContext(t.Context(), "docker", "exec", b.name, "touch", dir+"/written").CombinedOutput()
			require.Error(t, err, "%s: %s", dir, out)
		}
	})
	before := map[string]kept{}
	for how, client := range b.clients(t) {
		t.Run(how, func(t *testing.T) {
			live(t, client, voyage{byok.AES256, byok.OAEPSHA1})
			before[how] = keep(t, client)
		})
	}
	require.NotEmpty(t, before)

	docker(t, nil, "kill", b.name)
	docker(t, nil, "start", b.name)
	b.waitUntilHealthy(t)
	for how, client := range b.clients(t) {
		t.Run(how+", after a kill", func(t *testing.T) {
			plaintext, keyID, err := client.decrypt(before[how].blob, nil)
			require.NoError(t, err)
			require.Equal(t, before[how].plaintext, plaintext)
			require.Equal(t, before[how].keyID, keyID)
			live(t, client, voyage{byok.AES256, byok.OAEPSHA1})
		})
	}
}

// kept is what must outlive the server.
type kept struct{ keyID, plaintext, blob string }

// keep imports a key and encrypts under it.
func keep(t *testing.T, client sdk) kept {
	t.Helper()
	keyID, _, err := client.createKey("Aliyun_AES_256")
	require.NoError(t, err)
	publicKey, token, err := client.parameters(keyID, byok.OAEPSHA1)
	require.NoError(t, err)
	require.NoError(t, client.importMaterial(keyID, wrapped(t, byok.OAEPSHA1, publicKey, randomMaterial(32)), token, 0))
	plaintext := base64.StdEncoding.EncodeToString([]byte("kept through a kill"))
	blob, err := client.encrypt(keyID, plaintext, nil)
	require.NoError(t, err)
	return kept{keyID, plaintext, blob}
}

// box is keyferryd in a container, with what it keeps in volumes.
type box struct {
	name  string
	keys  credentials
	soPIN string
}

func newBox(t *testing.T, name string) *box {
	b := &box{
		name:  name,
		soPIN: rand.Text(),
		keys:  credentials{Region: "local", AccessKeyID: "keyferry", AccessKeySecret: rand.Text()},
	}
	for _, volume := range []string{"config", "data", "secrets"} {
		docker(t, nil, "volume", "create", b.volume(volume))
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := exec.Command("docker", "logs", b.name).CombinedOutput()
			t.Logf("the log of the server:\n%s", out)
		}
		_ = exec.Command("docker", "rm", "-f", "-v", b.name).Run()
		require.NoError(t, exec.Command("docker", "volume", "rm", b.volume("config"), b.volume("data"), b.volume("secrets")).Run())
	})
	return b
}

func (b *box) volume(name string) string { return b.name + "-" + name }

// confinement is how the container runs. Only the volume of token and database
// can be written, and for init the configuration.
func (b *box) confinement(config string) []string {
	return []string{
		"--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
		"-v", b.volume("config") + ":/etc/keyferry:" + config,
		"-v", b.volume("data") + ":/var/lib/keyferry",
		"-v", b.volume("secrets") + ":/run/secrets:ro",
	}
}

// initialise puts the secrets into their volume, as files of keyferryd's user,
// and holds the ceremony in a container that is gone afterwards, and the
// security officer's PIN with it.
func (b *box) initialise(t *testing.T) {
	carrier := strings.TrimSpace(docker(t, nil, "create", "-v", b.volume("secrets")+":/run/secrets", containerImage))
	defer docker(t, nil, "rm", "-v", carrier)
	docker(t, archive(t, map[string]string{
		"user-pin": rand.Text(), "access-key-secret": b.keys.AccessKeySecret,
	}), "cp", "-", carrier+":/run/secrets")

	args := append([]string{"run", "--rm", "-i", "--network", "none"}, b.confinement("rw")...)
	docker(t, strings.NewReader(b.soPIN), append(args, containerImage,
		"init", "--config", "/etc/keyferry/keyferryd.yaml", "--init-token", "--so-pin-file", "-")...)
}

// archive is a tar archive of files for keyferryd's user alone.
func archive(t *testing.T, files map[string]string) io.Reader {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, text := range files {
		require.NoError(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o400, Uid: 10001, Gid: 10001, Size: int64(len(text))}))
		_, err := io.WriteString(w, text)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return &out
}

func (b *box) serve(t *testing.T) {
	args := append([]string{"run", "-d", "--name", b.name, "-p", "127.0.0.1::8080", "--health-interval", "1s"}, b.confinement("ro")...)
	docker(t, nil, append(args, containerImage)...)
	b.waitUntilHealthy(t)
}

func (b *box) waitUntilHealthy(t *testing.T) {
	require.Eventually(t, func() bool {
		return docker(t, nil, "inspect", "-f", "{{.State.Health.Status}}", b.name) == "healthy\n"
	}, time.Minute, 200*time.Millisecond)
}

// clients are Alibaba Cloud's. The port may change with a start.
func (b *box) clients(t *testing.T) map[string]sdk {
	return sdks(t, strings.TrimSpace(docker(t, nil, "port", b.name, "8080/tcp")), b.keys)
}

// docker runs the docker command to its end and answers what it printed.
func docker(t *testing.T, stdin io.Reader, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "docker", args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	require.NoError(t, cmd.Run(), "docker %s: %s", args[0], &stderr)
	return stdout.String()
}
