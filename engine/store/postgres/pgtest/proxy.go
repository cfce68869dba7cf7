package pgtest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync"

	"github.com/jackc/pgx/v5"
)

// Proxy stands between a client and its server, as a network that loses
// things. Its methods are safe for concurrent use.
type Proxy struct {
	listener net.Listener
	socket   string
	ended    sync.WaitGroup

	mu    sync.Mutex
	last  []byte // as soon as a client has sent this, nothing comes back; nil: never
	deaf  bool   // it has
	mute  bool   // nothing arrives either way
	conns []net.Conn
}

// CleanupTB is what NewProxy needs of a testing.TB.
type CleanupTB interface {
	TB
	Cleanup(fn func())
}

// NewProxy starts a proxy, which ends with the test, and returns the DSN by
// which a database is reached through it.
func NewProxy(tb CleanupTB, server *Server, dsn string) (*Proxy, string) {
	tb.Helper()
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	p := &Proxy{socket: server.Socket()}
	if p.listener, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0"); err != nil {
		tb.Fatalf("pgtest: %v", err)
	}
	p.ended.Go(p.serve)
	tb.Cleanup(func() {
		_ = p.listener.Close()
		p.Cut()
		p.ended.Wait()
	})
	return p, fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", cfg.User, p.listener.Addr(), cfg.Database)
}

func (p *Proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := (&net.Dialer{}).DialContext(context.Background(), "unix", p.socket)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, client, server)
		p.mu.Unlock()
		p.ended.Go(func() {
			p.carry(server, client, func(sent []byte) bool {
				p.deaf = p.deaf || p.last != nil && bytes.Contains(sent, p.last)
				return p.mute
			})
		})
		p.ended.Go(func() { p.carry(client, server, func([]byte) bool { return p.mute || p.deaf }) })
	}
}

// carry copies what lost does not lose.
func (p *Proxy) carry(to, from net.Conn, lost func([]byte) bool) {
	defer func() { _, _ = to.Close(), from.Close() }()
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		p.mu.Lock()
		drop := lost(b[:n])
		p.mu.Unlock()
		if drop {
			continue
		}
		if _, err := to.Write(b[:n]); err != nil {
			return
		}
	}
}

// LoseAnswersAfter has what the server answers get lost from the moment at which
// a client has sent these bytes, which arrive.
func (p *Proxy) LoseAnswersAfter(sent string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = []byte(sent)
}

// LoseEverything has nothing arrive on either side, while connections stay.
func (p *Proxy) LoseEverything() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute = true
}

// LoseNothing ends what the others began.
func (p *Proxy) LoseNothing() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.deaf, p.mute = nil, false, false
}

// Cut breaks every connection. New ones can be made.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}
