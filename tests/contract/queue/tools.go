//go:build tools

// Package queue pins the real queue-proxy that the contract tests compare Weir with.
package queue

import _ "knative.dev/serving/cmd/queue"
