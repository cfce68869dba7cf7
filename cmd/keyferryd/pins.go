package main

import (
	"bytes"
	"errors"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/keyferry/keyferry/hsm"
)

// withPins returns the text of a configuration with pins as its token.pins.
// Every other line, comment and space stays as it is, which a decoder and an
// encoder of YAML would not grant.
func withPins(text []byte, pins hsm.Pins) ([]byte, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, err
	}
	var token *yaml.Node
	if len(doc.Content) == 1 {
		_, token = child(doc.Content[0], "token")
	}
	if token == nil || token.Kind != yaml.MappingNode || token.Style&yaml.FlowStyle != 0 || len(token.Content) == 0 {
		return nil, errors.New("its section token is not written one line for each field")
	}
	indent := strings.Repeat(" ", token.Content[0].Column-1)
	block, err := pinsBlock(pins, indent)
	if err != nil {
		return nil, err
	}
	lines := strings.SplitAfter(string(text), "\n")
	from, to := lastLine(token), lastLine(token) // line numbers begin with 1: insert after it
	if key, value := child(token, "pins"); key != nil {
		from, to = key.Line-1, max(key.Line, lastLine(value))
	}
	if last := lines[to-1]; !strings.HasSuffix(last, "\n") {
		lines[to-1] = last + "\n"
	}
	updated := []byte(strings.Join(slices.Replace(lines, from, to, block), ""))

	// Line arithmetic on a language like YAML has to be checked.
	cfg, err := parseConfig(updated)
	if err != nil || cfg.Token.Pins.pins() != pins {
		return nil, errors.Join(errors.New("its section token is laid out in a way that this program cannot edit"), err)
	}
	return updated, nil
}

// pinsBlock is token.pins as lines of YAML, each indented.
func pinsBlock(pins hsm.Pins, indent string) (string, error) {
	var text bytes.Buffer
	encoder := yaml.NewEncoder(&text)
	encoder.SetIndent(2)
	err := encoder.Encode(map[string]pinsConfig{"pins": pinsOf(pins)})
	if err = errors.Join(err, encoder.Close()); err != nil {
		return "", err
	}
	var block strings.Builder
	for line := range strings.Lines(text.String()) {
		block.WriteString(indent + line)
	}
	return block.String(), nil
}

// child returns the key and the value of a mapping's field, nil if there is
// none.
func child(mapping *yaml.Node, name string) (key, value *yaml.Node) {
	if mapping.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == name {
			return mapping.Content[i], mapping.Content[i+1]
		}
	}
	return nil, nil
}

// lastLine is the last line of a node, as far as nodes begin on it.
func lastLine(n *yaml.Node) int {
	last := n.Line
	for _, c := range n.Content {
		last = max(last, lastLine(c))
	}
	return last
}
