package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/keyferry/keyferry/engine/byok"
	"github.com/keyferry/keyferry/engine/store/postgres/pgtest"
	"github.com/keyferry/keyferry/softhsm"
)

// sharedPostgres is a PostgreSQL server for all tests that do not kill it.
var sharedPostgres struct {
	sync.Once
	server *pgtest.Server
	err    error
}

func postgresServer(t testing.TB) *pgtest.Server {
	t.Helper()
	sharedPostgres.Do(func() { sharedPostgres.server, sharedPostgres.err = pgtest.Start(pgtest.FastSettings...) })
	pgtest.Need(t, sharedPostgres.err)
	return sharedPostgres.server
}

func stopPostgres() error {
	if sharedPostgres.server == nil {
		return nil
	}
	return sharedPostgres.server.Stop()
}

// onPostgres has a site keep its rows in a database without tables.
func (s *site) onPostgres(t testing.TB) *site {
	t.Helper()
	server := postgresServer(t)
	database, err := server.EmptyDatabase(t.Context())
	require.NoError(t, err)
	s.write(t, "dsn", server.DSN(database)+"\n")
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	s.write(t, "keyferryd.yaml", strings.Replace(string(text), "sqlite: keyferry.db # beside this file", "postgres: {dsn_file: dsn}", 1))
	return s
}

// The first day on a PostgreSQL: each step says which is the next one.
func TestMigrateAndServe(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, "").onPostgres(t)
	require.Contains(t, s.init(t, "--init-token", "--so-pin-file", s.file("so-pin")), `with "keyferryd migrate"`)
	_, stderr, err := s.keyferryd(t, "serve")
	require.Error(t, err)
	require.Regexp(t, `\Akeyferryd: the database has no tables yet: run "keyferryd migrate" once\n\z`, stderr)
	d, _ := s.doctor(t, statusProblem)
	require.Equal(t, []advice{{"the database has no tables yet", `run "keyferryd migrate" once`}}, d.Problems)

	stdout, stderr, err := s.keyferryd(t, "migrate")
	require.NoError(t, err, stderr)
	require.Regexp(t, `\AMade the tables, schema version \d+\. `, stdout)
	stdout, stderr, err = s.keyferryd(t, "migrate")
	require.NoError(t, err, stderr)
	require.Contains(t, stdout, "Nothing was changed")

	server := startTestServer(t, s.dir, "serve", "--config", s.config)
	newCustomer(t, s.client(server, nil))
	require.NoError(t, server.stop())

	pg := postgresServer(t)
	dsn, err := os.ReadFile(s.file("dsn"))
	require.NoError(t, err)
	_, database, _ := strings.Cut(strings.TrimSpace(string(dsn)), "dbname=")
	require.NoError(t, pg.Exec(t.Context(), database, `DELETE FROM keyferry_schema WHERE version_id = (SELECT max(version_id) FROM keyferry_schema)`))
	_, stderr, err = s.keyferryd(t, "serve")
	require.Error(t, err)
	require.Regexp(t, `\Akeyferryd: the database has schema version [1-9]\d* and this program needs version \d+: back it up and run "keyferryd migrate" once[^\n]*\n\z`, stderr)
	require.NoError(t, pg.Exec(t.Context(), database, `INSERT INTO keyferry_schema (version_id, is_applied) VALUES (4711, true)`))
	for _, command := range []string{"serve", "migrate"} {
		_, stderr, err = s.keyferryd(t, command)
		require.Error(t, err)
		require.Contains(t, stderr, "a newer Keyferry has migrated it, run that one or restore the backup")
	}
}

func TestMigrateSQLite(t *testing.T) {
	t.Parallel()
	s := newSite(t, "")
	_, stderr, err := s.keyferryd(t, "migrate")
	require.Error(t, err)
	require.Contains(t, stderr, "there is no database at "+s.file("keyferry.db"))
}

// Every client goes through the whole life of a key, on PostgreSQL.
func TestLifeOnPostgres(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, "").onPostgres(t)
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	_, stderr, err := s.keyferryd(t, "migrate")
	require.NoError(t, err, stderr)
	server := startTestServer(t, s.dir, "serve", "--config", s.config)
	cred := credentials{Region: "local", AccessKeyID: "tester", AccessKeySecret: "a secret of the tests"}
	clients := sdks(t, server.endpoint, cred)
	for _, name := range []string{"v1", "tea"} {
		t.Run(name, func(t *testing.T) { live(t, clients[name], voyage{"Aliyun_AES_256", "RSA_2048", "RSAES_OAEP_SHA_1"}) })
	}
	require.NoError(t, server.stop())
}

func TestStoreConfig(t *testing.T) {
	for text, says := range map[string]string{
		"{}":                                    "store.sqlite is missing: name the database file, or a PostgreSQL in store.postgres",
		"{sqlite: x, postgres: {dsn: host=/x}}": "store has both",
		"{postgres: {}}":                        "needs dsn or dsn_file",
		"{postgres: {dsn: host=/x, dsn_file: y}}":                                                                "needs dsn or dsn_file",
		"{postgres: {dsn: 'postgres://a:hunter2@b/c'}}":                                                          "store.postgres.dsn holds a password",
		"{postgres: {dsn: 'host=b password=hunter2'}}":                                                           "store.postgres.dsn holds a password",
		"{postgres: {dsn: 'postgres://b?password=hunter2'}}":                                                     "store.postgres.dsn holds a password",
		"{postgres: {dsn: host=/x, connections: -1}}":                                                            "connections is negative",
		"{postgres: {dsn: host=/x, password: hunter2}}":                                                          "field password is unknown",
		"{postgres: {dsn: 'postgres://keyferry@db/kf', password_file: z, connections: 4, allow_insecure: true}}": "",
	} {
		cfg, err := parseConfig(fmt.Appendf(nil, "store: %s\n", text))
		if err == nil {
			err = cfg.Store.validate()
		}
		if says == "" {
			require.NoError(t, err, text)
			continue
		}
		require.ErrorContains(t, err, says)
		require.NotContains(t, err.Error(), "hunter2")
	}
}

// Two servers on one database and one token: what one of them stops, both
// stop, and when one is killed the other goes on with everything.
func TestTwoServers(t *testing.T) {
	softhsm.Once(t)
	t.Parallel()
	s := newSite(t, "").onPostgres(t)
	s.init(t, "--init-token", "--so-pin-file", s.file("so-pin"))
	_, stderr, err := s.keyferryd(t, "migrate")
	require.NoError(t, err, stderr)
	first := startTestServer(t, s.dir, "serve", "--config", s.config)
	second := startTestServer(t, s.dir, "serve", "--config", s.config)
	one, two := s.client(first, nil), s.client(second, nil)

	owner := newCustomer(t, one)
	require.NoError(t, two.call(t.Context(), "ImportKeyMaterial", owner.params(wrapped(t, byok.OAEPSHA1, owner.publicKey, owner.material)), nil))
	var sealed struct{ CiphertextBlob string }
	require.NoError(t, one.call(t.Context(), "Encrypt", map[string]string{"KeyId": owner.keyID, "Plaintext": "YQ=="}, &sealed))
	decrypt := func(c *client) error {
		return c.call(context.Background(), "Decrypt", map[string]string{"CiphertextBlob": sealed.CiphertextBlob}, nil)
	}
	require.NoError(t, decrypt(two))
	require.NoError(t, one.call(t.Context(), "DisableKey", map[string]string{"KeyId": owner.keyID}, nil))
	for began := time.Now(); decrypt(two) == nil; {
		require.Less(t, time.Since(began), time.Second, "it is still used")
	}
	require.NoError(t, one.call(t.Context(), "EnableKey", map[string]string{"KeyId": owner.keyID}, nil))
	require.NoError(t, decrypt(two))

	// A request is good once, whichever server it is sent to.
	query := one.rpcQuery(t, "DescribeKey", map[string]string{"KeyId": owner.keyID})
	_, code := post(t, first.endpoint, query)
	require.Empty(t, code)
	_, code = post(t, second.endpoint, query)
	require.Equal(t, "SignatureNonceUsed", code)

	first.kill(t)
	require.NoError(t, decrypt(two))
	for range 4 { // more than the pool holds
		other := newCustomer(t, two)
		require.NoError(t, two.call(t.Context(), "ImportKeyMaterial", other.params(wrapped(t, byok.OAEPSHA1, other.publicKey, other.material)), nil))
	}
	require.NoError(t, second.stop())
}
