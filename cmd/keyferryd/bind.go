package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/net/netutil"
)

// boundPort is an address that is taken but does not answer yet. The port is
// known, also where it was asked for as 0, and can be written down before
// anybody can connect to it, which net.Listen does not allow.
type boundPort struct {
	fd   int
	addr *net.TCPAddr
}

// bind takes an address, host:port.
func bind(address string) (*boundPort, error) {
	want, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, cannotListen(address, err)
	}
	p, err := bindTCP(want)
	if want.IP == nil && err != nil && !errors.Is(err, syscall.EADDRINUSE) {
		want.IP = net.IPv4zero // a machine without IPv6
		p, err = bindTCP(want)
	}
	return p, cannotListen(address, err)
}

// cannotListen says what to do about an error; nil stays nil.
func cannotListen(address string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("cannot listen on %s: the port is in use: stop the program that uses it or choose another port", address)
	}
	return fmt.Errorf("cannot listen on %s: %w", address, err)
}

func bindTCP(want *net.TCPAddr) (_ *boundPort, err error) {
	family, to := socketAddress(want)
	syscall.ForkLock.RLock() // a child started now must not inherit the socket
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	p := &boundPort{fd: fd}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	// As net.Listen does, so that a port that was just left can be taken again.
	// Until it listens, it could then be taken by another program, too; a port
	// that the system picks needs none of that.
	if want.Port != 0 {
		if err := syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1); err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if family == syscall.AF_INET6 && want.IP == nil {
		if err := syscall.SetsockoptInt(fd, syscall.IPPROTO_IPV6, syscall.IPV6_V6ONLY, 0); err != nil {
			return nil, os.NewSyscallError("setsockopt", err)
		}
	}
	if err := syscall.Bind(fd, to); err != nil {
		return nil, os.NewSyscallError("bind", err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		return nil, os.NewSyscallError("getsockname", err)
	}
	p.addr = &net.TCPAddr{IP: want.IP}
	switch name := name.(type) {
	case *syscall.SockaddrInet4:
		p.addr.Port = name.Port
	case *syscall.SockaddrInet6:
		p.addr.Port = name.Port
	}
	return p, nil
}

// socketAddress is an address as the system takes it; no address at all is
// that of every interface, IPv4 and IPv6.
func socketAddress(a *net.TCPAddr) (family int, to syscall.Sockaddr) {
	if ip := a.IP.To4(); ip != nil {
		return syscall.AF_INET, &syscall.SockaddrInet4{Port: a.Port, Addr: [4]byte(ip)}
	}
	to6 := &syscall.SockaddrInet6{Port: a.Port}
	copy(to6.Addr[:], a.IP)
	return syscall.AF_INET6, to6
}

// maxConnections are served at a time, idle ones too; further ones wait. One
// costs up to 200 KB while its headers arrive.
const maxConnections = 512

// listen lets the port answer. It uses p up.
func (p *boundPort) listen() (net.Listener, error) {
	defer p.close()
	if err := syscall.SetNonblock(p.fd, true); err != nil {
		return nil, os.NewSyscallError("setnonblock", err)
	}
	const backlog = 4096 // the system cuts it to what it allows
	if err := syscall.Listen(p.fd, backlog); err != nil {
		return nil, cannotListen(p.addr.String(), os.NewSyscallError("listen", err))
	}
	f := os.NewFile(uintptr(p.fd), "tcp:"+p.addr.String())
	p.fd = -1
	l, err := net.FileListener(f) // with a descriptor of its own
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return netutil.LimitListener(l, maxConnections), nil
}

// close gives the address back. It may be called again and after listen.
func (p *boundPort) close() {
	if p.fd >= 0 {
		_ = syscall.Close(p.fd)
		p.fd = -1
	}
}
