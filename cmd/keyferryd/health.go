package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// healthPath answers whoever asks, unsigned. The first line says yes or no, and
// those after it what a person has to see to, in sentences that are always the
// same.
const healthPath = "/healthz"

const healthTimeout = 5 * time.Second

type healthy interface {
	Health(ctx context.Context) error
	Advice() []string
}

func healthHandler(e healthy, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), healthTimeout)
		defer cancel()
		w.Header().Set("Content-Type", "text/plain;charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		answer := "ok\n"
		err := e.Health(ctx)
		if err != nil {
			log.WarnContext(ctx, "not healthy", slog.Any("error", err))
			answer = "unavailable\n"
		}
		for _, line := range e.Advice() {
			answer += line + "\n"
		}
		if err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_, _ = io.WriteString(w, answer)
	})
}

func healthCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "health --config FILE",
		Short: "Ask the server of that configuration whether it is well",
		Long: `Asks the server of that configuration, on this machine, whether store and
token answer, and writes what a person has to see to. Exits with 0 if they do;
for health checks of containers.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(path)
			if err != nil {
				return err
			}
			if err := cfg.validateListen(); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return askHealth(cmd.Context(), &cfg, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&path, "config", "", "the configuration file")
	requireFlag(cmd, "config")
	return cmd
}

func askHealth(ctx context.Context, cfg *config, out io.Writer) error {
	listen, err := net.ResolveTCPAddr("tcp", cfg.Listen)
	if err != nil {
		return err
	}
	transport := &http.Transport{Proxy: nil} // it is on this machine
	url := "http://" + endpointOf(cfg.Listen, listen.Port) + healthPath
	if cfg.TLS != nil {
		url = "https" + url[len("http"):]
		if transport.TLSClientConfig, err = cfg.ownCertificateOnly(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*healthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	res, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return fmt.Errorf("the server does not answer: %w", err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(res.Body, 4<<10))
	if err != nil {
		return fmt.Errorf("the server does not finish its answer: %w", err)
	}
	_, advice, _ := strings.Cut(string(body), "\n")
	if _, err := io.WriteString(out, advice); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("the server is not well (status %d): see its log", res.StatusCode)
	}
	return nil
}

// ownCertificateOnly accepts the server's own certificate and no other,
// whatever name it is for: it is asked by its address.
func (c *config) ownCertificateOnly() (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(c.TLS.CertFile, c.TLS.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tls: cannot use %s with %s: %w", c.TLS.CertFile, c.TLS.KeyFile, err)
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // VerifyConnection is stricter
		VerifyConnection: func(state tls.ConnectionState) error {
			if !bytes.Equal(state.PeerCertificates[0].Raw, own.Certificate[0]) {
				return errors.New("another server's certificate")
			}
			return nil
		},
	}, nil
}
