package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/keyferry/keyferry/engine/acs"
	"github.com/keyferry/keyferry/engine/kmsapi"
)

// client calls a server on this machine, for the demo.
type client struct {
	url  string
	cred acs.Credential
	http *http.Client
}

// newClient takes what "keyferryd dev" wrote for clients.
func newClient(credentialsFile string) (*client, error) {
	var c credentials
	if err := readAnnounced(credentialsFile, &c); err != nil {
		return nil, err
	}
	return clientOf(c), nil
}

func clientOf(c credentials) *client {
	return &client{
		url:  "http://" + c.Endpoint + "/",
		cred: acs.Credential{AccessKeyID: c.AccessKeyID, Secret: acs.NewSecret([]byte(c.AccessKeySecret))},
		http: &http.Client{Transport: &http.Transport{Proxy: nil}, Timeout: time.Minute},
	}
}

// readAnnounced reads a file that "keyferryd dev" wrote.
func readAnnounced(path string, into any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s is not what keyferryd dev writes", path)
	}
	return nil
}

// apiError is an error that the server answered.
type apiError struct {
	Code, Message, Recommend string
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

// call does one action; answer may be nil.
func (c *client) call(ctx context.Context, action string, params map[string]string, answer any) error {
	query := url.Values{}
	for name, value := range params {
		query.Set(name, value)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url+"?"+query.Encode(), http.NoBody)
	if err != nil {
		return err
	}
	req.Header.Set("X-Acs-Action", action)
	req.Header.Set("X-Acs-Version", kmsapi.Version)
	if err := acs.SignV3(req, nil, c.cred, time.Now(), rand.Text()); err != nil {
		return err
	}
	res, err := c.http.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) { // which quotes every parameter
			err = u.Err
		}
		return fmt.Errorf("%s: %w", action, err)
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	if res.StatusCode != http.StatusOK {
		refusal := &apiError{}
		if err := json.Unmarshal(body, refusal); err != nil {
			return fmt.Errorf("%s: HTTP status %s", action, res.Status)
		}
		return fmt.Errorf("%s: %w", action, refusal)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(body, answer)
}
