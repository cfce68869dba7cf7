package hsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	p11 "github.com/keyferry/keyferry/hsm/internal/cryptoki"
)

// ObjectID is the CKA_ID of a resident material: 16 random bytes, which the
// caller draws and writes down before there is an object.
type ObjectID [16]byte

// String is the identifier in hexadecimal.
func (id ObjectID) String() string { return hex.EncodeToString(id[:]) }

// maxResidentContext bounds ImportRequest.Context where it stands in a label.
const maxResidentContext = 128

// ResidentRequest is wrapped material to unwrap into an object that stays.
type ResidentRequest struct {
	ImportRequest
	ID       ObjectID  // never used before
	Instance string    // 16 hexadecimal digits, by which Residents finds the object
	Now      time.Time // by the caller's clock, for Residents
}

// ResidentObject is an object as Residents lists it, unverified.
type ResidentObject struct {
	ID        ObjectID
	Context   []byte    // of its import
	CreatedAt time.Time // as its label says
}

// Keeps reports whether the token can keep material of that spec in that
// custody. The error is ErrUnsupported and names what is missing.
//
// Resident material is never extractable, so the length of what was unwrapped
// shows in CKA_VALUE_LEN or not at all: the token must have proved that it
// reports that truly. SM4 is never resident: its material id is measured by
// AES, and an object that cannot be copied or extracted has one key type, so
// nothing would prove that what is used as SM4 is what was measured.
func (t *Token) Keeps(custody Custody, spec MaterialSpec) error {
	switch {
	case spec.Len() == 0:
		return fmt.Errorf("%w: material spec %q", ErrUnsupported, spec)
	case custody == Sealed:
		return nil
	case custody != Resident:
		return fmt.Errorf("%w: %s", ErrUnsupported, custody)
	case spec == SM4:
		return fmt.Errorf("%w: resident SM4 material, which would have to be measured as an AES key and used as an SM4 key by one object", ErrUnsupported)
	}
	return t.caps.Load().resident
}

// ImportResident unwraps material into an object of the token that stays, and
// measures it there. The object is not extractable, never was, and can be
// neither copied nor changed. It is on the token before its length and
// identity are known: whoever calls writes the ID down first, so that the
// object of a crash is found.
//
// When an error is returned the object may still be on the token;
// DestroyResident sees to it. Errors are those of Import, and ErrFull.
func (t *Token) ImportResident(ctx context.Context, req ResidentRequest) (Imported, error) {
	if err := t.Keeps(Resident, req.Spec); err != nil {
		return Imported{}, err
	}
	if len(req.Context) > maxResidentContext {
		return Imported{}, fmt.Errorf("%w: a context of %d bytes", ErrUnsupported, len(req.Context))
	}
	var out Imported
	again := false
	err := t.do(ctx, "import key material", func(c *connection, s *session) error {
		p, err := c.pair(ctx, s.Session, req.Pair)
		if err != nil {
			return err
		}
		if err := p.isFor(Resident, req.Algorithm); err != nil {
			return err
		}
		if again { // the last attempt may have taken effect
			if err := c.destroyResident(s.Session, req.Instance, req.ID); err != nil {
				return err
			}
		}
		again = true
		out, err = c.admit(s, p, func() (Imported, error) { return c.unwrapMeasureKeep(s, p, req) })
		return err
	})
	if err != nil {
		return Imported{}, err
	}
	return out, nil
}

// isFor refuses a pair that was not made for a custody and an algorithm.
func (p *pair) isFor(custody Custody, alg Algorithm) error {
	switch {
	case p.Algorithm != alg:
		return fmt.Errorf("%w: the pair is not for %s", ErrUnsupported, alg)
	case p.Custody != custody:
		return fmt.Errorf("%w: the pair is for %s material, not for %s", ErrUnsupported, p.Custody, custody)
	}
	return nil
}

func (c *connection) unwrapMeasureKeep(s *session, p *pair, req ResidentRequest) (_ Imported, err error) {
	params, wrapped, err := p.unwrapParams(req.Wrapped)
	if err != nil {
		return Imported{}, err
	}
	attrs := c.rules.keep(residentObject(req.ID, residentLabel{req.Instance, req.Now, req.Context}))
	tmpl := p11.NewTemplate(attrs...)
	key, err := s.Unwrap(params, p.handle, wrapped, tmpl)
	switch {
	case errors.Is(err, p11.DeviceMemory):
		return Imported{}, fmt.Errorf("%w (%v)", ErrFull, err) // and so not lost
	case err != nil:
		// Reasons that are none may hide that it took effect.
		if _, unwell := failed(err); !unwell || worst(err) > p11.NoFault {
			return Imported{}, err // where the session is gone the next attempt looks
		}
		if gone := c.destroyResident(s.Session, req.Instance, req.ID); gone != nil {
			return Imported{}, fmt.Errorf("%w: %w", p11.SessionClosed, gone)
		}
		return Imported{}, err
	}
	stays := false
	defer func() {
		if stays {
			return
		}
		if gone := s.DestroyObject(key); gone != nil {
			// Tried again, before anything else, by the next attempt.
			err = fmt.Errorf("%w: %w", p11.SessionClosed, gone)
		}
	}()
	if a, differs, err := s.Differs(key, tmpl); err != nil {
		return Imported{}, err
	} else if differs {
		return Imported{}, fmt.Errorf("%w: %s of an unwrapped key is not what was asked for", ErrUntrusted, attributeName(a))
	}
	if err := hasLength(s.Session, key, req.Spec.Len()); err != nil {
		return Imported{}, err
	}
	out := Imported{
		Material:   Material{Custody: Resident, Spec: req.Spec, Ref: append([]byte(nil), req.ID[:]...)},
		Attributes: describe(attrs), // it reads back so
	}
	if out.Identity, err = c.measure(s.Session, key, req.Context); err != nil {
		return Imported{}, c.own("measuring", err)
	}
	out.CheckValue = CheckValue{Algorithm: CheckValueAES, Value: out.Identity.KCV}
	c.residents.Store(req.ID, &verifiedResident{key, out.Identity, string(req.Context)})
	stays = true
	return out, nil
}

// hasLength returns errLength unless the token reports that an object's value
// has n bytes.
func hasLength(s *p11.Session, key p11.Handle, n int) error {
	values, err := s.Attributes(key, p11.ValueLen)
	if err != nil {
		return err
	}
	if got, ok := values.ULong(p11.ValueLen); !ok || got != uint64(n) {
		return errLength
	}
	return nil
}

func (c *connection) measure(s *p11.Session, key p11.Handle, context []byte) (id Identity, err error) {
	if id.KCV, err = measureKCV(s, p11.AESECB, key); err != nil {
		return id, err
	}
	id.MaterialID, err = c.measureID(s, key, context)
	return id, err
}

// residentLabel is the CKA_LABEL of a resident material:
//
//	keyferry material 0123456789abcdef 1795445221 CONTEXT
type residentLabel struct {
	instance string
	made     time.Time
	context  []byte
}

func (l residentLabel) String() string {
	return fmt.Sprintf("%s%s %d %s", labelResident, l.instance, l.made.Unix(), l.context)
}

func parseResidentLabel(label []byte) (l residentLabel, ok bool) {
	rest, ok := strings.CutPrefix(string(label), labelResident)
	fields := strings.SplitN(rest, " ", 3)
	if !ok || len(fields) != 3 {
		return l, false
	}
	unix, err := strconv.ParseInt(fields[1], 10, 64)
	return residentLabel{fields[0], time.Unix(unix, 0).UTC(), []byte(fields[2])}, err == nil
}

// passing is the template of a public constant that is unwrapped as resident
// material would be. Residents lists it, should a crash leave it behind.
func (r rules) passing(of pairLabel) (*p11.Template, error) {
	var id ObjectID
	if _, err := rand.Read(id[:]); err != nil {
		return nil, err
	}
	return r.template(residentObject(id, residentLabel{instance: of.instance, made: time.Now()})...), nil
}

// verifiedResident is a resident material that was found to be what it should
// be, on one connection.
type verifiedResident struct {
	handle   p11.Handle
	identity Identity
	context  string
}

// OpenResident returns a Key for resident material. The first time in a
// connection the object is searched for, its attributes are read back, and its
// length and identity are measured again: an object's name proves nothing, and
// whoever has the PIN can put another in its place. Later calls ask nothing of
// the token.
//
// It is searched for once. A key that another process has just made may not be
// visible at once, and one that is gone may have been replaced: whoever gets
// ErrMaterialGone looks at what there is to open, and asks again, for
// SearchPatience or so.
//
// Errors: ErrMaterialGone, ErrUntrusted (an object of that name is another),
// ErrUnsupported, ErrUnavailable.
func (t *Token) OpenResident(ctx context.Context, m Material, instance string, context []byte, want Identity) (*Key, error) {
	if m.Custody != Resident || len(m.Ref) != len(ObjectID{}) {
		return nil, fmt.Errorf("%w: no resident material", ErrUntrusted)
	}
	if err := t.Keeps(Resident, m.Spec); err != nil {
		return nil, err
	}
	id := ObjectID(m.Ref)
	var key *Key
	err := t.do(ctx, "find key material", func(c *connection, s *session) error {
		if known, ok := c.residents.Load(id); ok {
			if v := known.(*verifiedResident); v.identity.Equal(want) && v.context == string(context) {
				key = newResidentKey(c, v.handle, id)
				return nil
			}
		}
		h, err := c.searchResident(s.Session, m, instance, context, want)
		if err != nil {
			return err
		}
		c.residents.Store(id, &verifiedResident{h, want, string(context)})
		key = newResidentKey(c, h, id)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return key, nil
}

func newResidentKey(c *connection, h p11.Handle, id ObjectID) *Key {
	k := newKey(c, h, aesNumbers)
	k.resident = &id
	return k
}

// searchResident finds an object of that name which is the material. Several
// that are it are one key; lookalikes beside it are passed over.
func (c *connection) searchResident(s *p11.Session, m Material, instance string, context []byte, want Identity) (p11.Handle, error) {
	id := ObjectID(m.Ref)
	tmpl := residentSearch(p11.Bytes(p11.ID, id[:]))
	handles, err := s.FindObjects(tmpl)
	if err != nil {
		return 0, err
	}
	var gone []p11.Handle
	var refused error
	for _, h := range handles {
		err := c.verifyResident(s, h, m, instance, context, want)
		switch {
		case err == nil:
			return h, nil
		case errors.Is(err, ErrUntrusted):
			refused = fmt.Errorf("object %s: %w", id, err)
		case worst(err) == p11.HandleFault: // destroyed since it was found
			gone = append(gone, h)
		default:
			return 0, err
		}
	}
	if refused != nil {
		return 0, refused
	}
	if err := errors.Join(vanished(s, tmpl, gone), c.absent(s)); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%w: %s", ErrMaterialGone, id)
}

func (c *connection) verifyResident(s *p11.Session, h p11.Handle, m Material, instance string, context []byte, want Identity) error {
	values, err := s.Attributes(h, p11.Label)
	if err != nil {
		return err
	}
	label, ok := parseResidentLabel(values[p11.Label])
	if !ok || label.instance != instance || !bytes.Equal(label.context, context) {
		return fmt.Errorf("%w: its label is of no kind that we make", ErrUntrusted)
	}
	if err := c.rules.readBack(s, h, residentObject(ObjectID(m.Ref), label)); err != nil {
		return err
	}
	if err := hasLength(s, h, m.Spec.Len()); err != nil {
		if worst(err) > p11.NoFault {
			return err
		}
		return fmt.Errorf("%w: it has another length", ErrUntrusted)
	}
	got, err := c.measure(s, h, context)
	if err != nil {
		return err
	}
	if !got.Equal(want) {
		return fmt.Errorf("%w: it is another key", ErrUntrusted)
	}
	return nil
}

// residentSearch finds secret keys that could be resident material.
func residentSearch(more ...p11.Attr) *p11.Template {
	return p11.NewTemplate(join([]p11.Attr{
		p11.ULong(p11.Class, p11.ClassSecretKey),
		p11.Bool(p11.OnToken, true),
		p11.Bool(p11.Private, true), // anyone can make one that is not
	}, more)...)
}

// findResidents makes a search, and sure of one that finds nothing.
func (c *connection) findResidents(s *p11.Session, more ...p11.Attr) ([]p11.Handle, error) {
	handles, err := s.FindObjects(residentSearch(more...))
	if err == nil && len(handles) == 0 {
		err = c.absent(s)
	}
	return handles, err
}

// Residents lists the resident materials of an instance that are on the token,
// for whoever destroys those that nobody knows.
func (t *Token) Residents(ctx context.Context, instance string) ([]ResidentObject, error) {
	var out []ResidentObject
	err := t.do(ctx, "list the resident key material", func(c *connection, s *session) error {
		out = nil
		handles, err := c.findResidents(s.Session, p11.Bool(p11.Encrypt, true))
		if err != nil {
			return err
		}
		for _, h := range handles {
			values, err := s.Attributes(h, p11.ID, p11.Label)
			if worst(err) == p11.HandleFault {
				continue // destroyed since it was found
			}
			if err != nil {
				return err
			}
			label, ok := parseResidentLabel(values[p11.Label])
			if id := values[p11.ID]; ok && label.instance == instance && len(id) == len(ObjectID{}) {
				out = append(out, ResidentObject{ObjectID(id), label.context, label.made})
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// DestroyResident destroys a resident material in the token. It is no error if
// it is gone.
func (t *Token) DestroyResident(ctx context.Context, instance string, id ObjectID) error {
	return t.do(ctx, "destroy key material", func(c *connection, s *session) error {
		c.residents.Delete(id)
		return c.destroyResident(s.Session, instance, id)
	})
}

// destroyResident destroys every object of that name, and goes on past those
// that it cannot: a thief may have put one in the way.
func (c *connection) destroyResident(s *p11.Session, instance string, id ObjectID) error {
	handles, err := c.findResidents(s, p11.Bytes(p11.ID, id[:]))
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range handles {
		values, err := s.Attributes(h, p11.Label)
		if worst(err) > p11.HandleFault {
			return err
		}
		if label, ok := parseResidentLabel(values[p11.Label]); err != nil || !ok || label.instance != instance {
			continue // gone, or none of ours
		}
		if err := s.DestroyObject(h); worst(err) > p11.HandleFault {
			return err
		} else if worst(err) == p11.NoFault {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
