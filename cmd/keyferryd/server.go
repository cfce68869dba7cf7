package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"
)

// Bounds of the server. Everything of a request may be in its URL: 6 KiB of
// plaintext and 8,192 characters of encryption context come to some 100 KiB
// when every character takes nine.
const (
	maxHeaderBytes    = 128 << 10
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 30 * time.Second
	requestTimeout    = 30 * time.Second // then the engine gives up, with an answer
	writeTimeout      = readTimeout + requestTimeout + 5*time.Second
	idleTimeout       = 2 * time.Minute
	shutdownTimeout   = 20 * time.Second // for requests under way at the end
)

// serve serves a valid configuration until the context ends. announce, if
// there is one, is called with the endpoint, host:port, when all is open and
// before the port answers. The last thing to happen before requests are
// answered is a line on out.
func serve(ctx context.Context, cfg *config, out io.Writer, log *slog.Logger, announce func(endpoint string) error) (err error) {
	tlsConfig, err := cfg.serverTLS()
	if err != nil {
		return err
	}
	port, err := bind(cfg.Listen)
	if err != nil {
		return err
	}
	defer port.close()
	var metricsPort *boundPort
	if cfg.Metrics.Listen != "" {
		if metricsPort, err = bind(cfg.Metrics.Listen); err != nil {
			return fmt.Errorf("metrics: %w", err)
		}
		defer metricsPort.close()
	}
	s, err := openService(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }()

	endpoint := endpointOf(cfg.Listen, port.addr.Port)
	if announce != nil {
		if err := announce(endpoint); err != nil {
			return err
		}
	}
	listener, err := port.listen()
	if err != nil {
		return err
	}
	scheme := "http"
	if tlsConfig != nil {
		scheme, listener = "https", tls.NewListener(listener, tlsConfig)
	} else if host, _, _ := net.SplitHostPort(cfg.Listen); !isLoopback(host) {
		log.WarnContext(ctx, "serving without TLS beyond loopback: plaintexts can be read on the way", slog.String("listen", cfg.Listen))
	}
	everywhere := ""
	if host, _, _ := net.SplitHostPort(cfg.Listen); host == "" || net.ParseIP(host).IsUnspecified() {
		everywhere = ", and on every other address of this machine"
	}
	if metricsPort != nil {
		stop, err := s.metrics.serve(metricsPort, log)
		if err != nil {
			return errors.Join(err, listener.Close())
		}
		defer stop()
		log.InfoContext(ctx, "serving metrics", slog.String("url", "http://"+endpointOf(cfg.Metrics.Listen, metricsPort.addr.Port)+metricsPath))
	}
	if _, err := fmt.Fprintf(out, "keyferryd listening on %s://%s%s\n", scheme, endpoint, everywhere); err != nil {
		return errors.Join(err, listener.Close())
	}
	return serveHTTP(ctx, listener, s.handler, log)
}

// serveHTTP serves until the context ends, then lets requests under way
// finish.
func serveHTTP(ctx context.Context, listener net.Listener, handler http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           withTimeout(handler, requestTimeout),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		// "OPTIONS *" is the handler's to answer, too.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(listener) }()
	select {
	case err := <-ended:
		return fmt.Errorf("the server ended: %w", err)
	case <-ctx.Done():
	}
	log.InfoContext(ctx, "shutting down")
	// The context that ended must not cut short what is under way.
	shutdown, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(shutdown); err != nil {
		return errors.Join(fmt.Errorf("requests were still under way after %s: %w", shutdownTimeout, err), srv.Close())
	}
	return nil
}

// withTimeout gives each request a context that ends before its connection is
// cut off, so that it gets an answer.
func withTimeout(next http.Handler, timeout time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// serverTLS is nil where plain HTTP is served.
func (c *config) serverTLS() (*tls.Config, error) {
	if c.TLS == nil {
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.TLS.CertFile, c.TLS.KeyFile)
	if err != nil {
		return nil, fmt.Errorf("tls: cannot use %s with %s: %w", c.TLS.CertFile, c.TLS.KeyFile, err)
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, NextProtos: []string{"http/1.1"}}, nil
}

// endpointOf is where a client on this machine reaches a server that listens
// on address: the host as it was given, or loopback for all interfaces.
func endpointOf(address string, port int) string {
	host, _, _ := net.SplitHostPort(address) // was validated
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}
