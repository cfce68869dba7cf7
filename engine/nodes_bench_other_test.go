//go:build !linux

package engine_test

// beNode needs Linux: where else can a process be kept on a core?
func beNode() {}
