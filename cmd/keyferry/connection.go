package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyferry/keyferry/engine/acs"
)

// credentialsVariable names the file that --credentials names, for scripts.
const credentialsVariable = "KEYFERRY_CREDENTIALS"

// connection says which KMS to talk to, and as whom. Flags win over the
// credentials file.
type connection struct {
	endpoint    string
	region      string
	accessKeyID string
	secretFile  string
	credentials string
	caFile      string
	plainHTTP   *bool // nil: HTTP for this machine itself unless caFile is given
}

func (c *connection) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.endpoint, "endpoint", "", "`HOST[:PORT]` of the KMS (default: that of the credentials file; without such a file, Alibaba Cloud's in the region)")
	f.StringVar(&c.region, "region", "", "region `NAME`, such as cn-hangzhou")
	f.StringVar(&c.accessKeyID, "access-key-id", "", "access key `ID`")
	f.StringVar(&c.secretFile, "access-key-secret-file", "", "`FILE` with the secret of the access key")
	f.StringVar(&c.credentials, "credentials", "", "`FILE` with endpoint, region, access key id and secret, as keyferryd dev writes it; flags win (default: $"+credentialsVariable+")")
	f.StringVar(&c.caFile, "ca-file", "", "`FILE` with the certificates, in PEM, to trust instead of the system's")
	f.BoolFunc("plain-http", "use HTTP without TLS, as is done with this machine itself unless --ca-file or --plain-http=false is given", func(s string) error {
		plain, err := strconv.ParseBool(s)
		c.plainHTTP = &plain
		return err
	})
}

// credentialsFile is what keyferryd dev writes for its clients.
type credentialsFile struct {
	Endpoint        string `json:"endpoint"`
	Region          string `json:"region"`
	AccessKeyID     string `json:"access_key_id"`
	AccessKeySecret string `json:"access_key_secret"`
}

// client reads what the flags name and makes a client of it.
func (c *connection) client(std *streams) (*client, error) {
	if c.plainHTTP != nil && *c.plainHTTP && c.caFile != "" {
		return nil, usage("--plain-http and --ca-file exclude each other")
	}
	settings, err := c.settings()
	if err != nil {
		return nil, err
	}
	if strings.Contains(settings.Endpoint, "/") {
		return nil, withHint(usage("endpoint %q is not HOST or HOST:PORT", settings.Endpoint),
			"leave the scheme out; HTTPS is used, or HTTP with --plain-http")
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	transport.MaxIdleConnsPerHost = maxParallel
	if c.caFile != "" {
		if transport.TLSClientConfig.RootCAs, err = readCertificates(c.caFile); err != nil {
			return nil, err
		}
	}
	scheme, loopback := "https", isLoopback(settings.Endpoint)
	plain := c.caFile == "" && loopback
	if c.plainHTTP != nil {
		plain = *c.plainHTTP
	}
	if plain {
		scheme = "http"
	}
	if plain && !loopback {
		fmt.Fprintln(std.err, "keyferry: warning: without TLS, who is on the way to the KMS can swap its public key and read what is wrapped under it")
	}
	return &client{
		plain:  plain,
		caFile: c.caFile,
		url:    scheme + "://" + settings.Endpoint + "/",
		cred:   acs.Credential{AccessKeyID: settings.AccessKeyID, Secret: acs.NewSecret([]byte(settings.AccessKeySecret))},
		http: &http.Client{
			Transport: transport,
			Timeout:   time.Minute,
			// A signature is for one host: what is elsewhere could not verify it.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// settings are complete, or an error says what is missing.
func (c *connection) settings() (credentialsFile, error) {
	var s credentialsFile
	name := c.credentials
	if name == "" {
		name = os.Getenv(credentialsVariable)
	}
	if name != "" {
		data, err := readSmall(name)
		if err != nil {
			return s, fmt.Errorf("reading credentials: %w", err)
		}
		if s, err = parseCredentials(name, data); err != nil {
			return s, err
		}
		// A file without an endpoint must not send a key to whoever is the default.
		if s.Endpoint == "" && c.endpoint == "" {
			return s, withHint(fmt.Errorf("%s names no endpoint", name), "add \"endpoint\": \"HOST:PORT\" to it, or give --endpoint")
		}
	}
	if c.secretFile != "" {
		secret, err := readSmall(c.secretFile)
		if err != nil {
			return s, fmt.Errorf("reading the access key secret: %w", err)
		}
		s.AccessKeySecret = string(bytes.TrimSpace(secret))
		if s.AccessKeySecret == "" {
			return s, fmt.Errorf("%s holds no access key secret", c.secretFile)
		}
	}
	override(&s.Endpoint, c.endpoint)
	override(&s.Region, c.region)
	override(&s.AccessKeyID, c.accessKeyID)
	if s.Endpoint == "" && s.Region != "" {
		s.Endpoint = "kms." + s.Region + ".aliyuncs.com"
	}
	if s.Endpoint == "" || s.AccessKeyID == "" || s.AccessKeySecret == "" {
		return s, withHint(usage("which KMS to talk to, or as whom, is not said"),
			"give --credentials FILE (or %s=FILE), or --endpoint or --region, --access-key-id and --access-key-secret-file", credentialsVariable)
	}
	return s, nil
}

// parseCredentials takes no field that it does not know: a misspelt one would
// silently leave its place to a default.
func parseCredentials(name string, data []byte) (credentialsFile, error) {
	const form = "it is a JSON object with endpoint, region, access_key_id and access_key_secret, as keyferryd dev writes it"
	var s credentialsFile
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	err := d.Decode(&s)
	if err == nil {
		if _, err = d.Token(); errors.Is(err, io.EOF) {
			return s, nil
		}
		err = errors.New("more than one JSON value")
	}
	if field, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
		return credentialsFile{}, withHint(fmt.Errorf("%s has an unknown field %s", name, field), form)
	}
	// Any other error might quote the file.
	return credentialsFile{}, withHint(fmt.Errorf("%s is no credentials file", name), form)
}

func override(value *string, flag string) {
	if flag != "" {
		*value = flag
	}
}

// readSmall reads a file that should be a few hundred bytes.
func readSmall(name string) ([]byte, error) {
	const limit = 1 << 20
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%s is too long", name)
	}
	return data, err
}

func readCertificates(name string) (*x509.CertPool, error) {
	data, err := readSmall(name)
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, withHint(errors.New(name+" holds no certificate in PEM"), "a certificate begins with -----BEGIN CERTIFICATE-----")
	}
	return pool, nil
}

// isLoopback reports whether an endpoint is this machine itself by its name,
// so that nobody can listen on the way.
func isLoopback(endpoint string) bool {
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		host = strings.Trim(endpoint, "[]")
	}
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback()
}

// isCertificateError reports whether TLS failed for the server's certificate.
func isCertificateError(err error) bool {
	var e *tls.CertificateVerificationError
	return errors.As(err, &e)
}

// isNameError reports whether that was because it is for another host.
func isNameError(err error) bool {
	var e x509.HostnameError
	return errors.As(err, &e)
}
