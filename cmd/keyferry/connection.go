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
	plainHTTP   bool
}

func (c *connection) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.endpoint, "endpoint", "", "`HOST[:PORT]` of the KMS (default: Alibaba Cloud's in the region)")
	f.StringVar(&c.region, "region", "", "region `NAME`, such as cn-hangzhou")
	f.StringVar(&c.accessKeyID, "access-key-id", "", "access key `ID`")
	f.StringVar(&c.secretFile, "access-key-secret-file", "", "`FILE` with the secret of the access key")
	f.StringVar(&c.credentials, "credentials", "", "`FILE` with all of these, as keyferryd dev writes it (default: $"+credentialsVariable+")")
	f.StringVar(&c.caFile, "ca-file", "", "`FILE` with the certificates, in PEM, to trust instead of the system's")
	f.BoolVar(&c.plainHTTP, "plain-http", false, "use HTTP without TLS, as is done with this machine itself unless --ca-file is given")
	cmd.MarkFlagsMutuallyExclusive("plain-http", "ca-file")
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
	if c.caFile != "" {
		if transport.TLSClientConfig.RootCAs, err = readCertificates(c.caFile); err != nil {
			return nil, err
		}
	}
	scheme, loopback := "https", isLoopback(settings.Endpoint)
	if c.plainHTTP || c.caFile == "" && loopback {
		scheme = "http"
	}
	if scheme == "http" && !loopback {
		fmt.Fprintln(std.err, "keyferry: warning: without TLS, who is on the way to the KMS can swap its public key and read what is wrapped under it")
	}
	return &client{
		url:  scheme + "://" + settings.Endpoint + "/",
		cred: acs.Credential{AccessKeyID: settings.AccessKeyID, Secret: acs.NewSecret([]byte(settings.AccessKeySecret))},
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
		if json.Unmarshal(data, &s) != nil { // its error would quote the file
			return s, withHint(fmt.Errorf("%s is no credentials file", name),
				"it is a JSON object with endpoint, region, access_key_id and access_key_secret, as keyferryd dev writes it")
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
