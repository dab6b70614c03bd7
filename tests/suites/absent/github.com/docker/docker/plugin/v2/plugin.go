// Package v2 stands in for Docker's managed plugins, which Debian's golang-github-docker-docker-dev leaves out and which
// graphdriver only looks at to tell them from others. No test has one.
package v2

import "github.com/docker/docker/pkg/plugins"

// Plugin has what graphdriver's source mentions.
type Plugin struct {
	PluginObj struct {
		Config struct{ PropagatedMount string }
	}
}

func (*Plugin) Name() string               { return "" }
func (*Plugin) ScopedPath(s string) string { return s }
func (*Plugin) IsV1() bool                 { return false }
func (*Plugin) Client() *plugins.Client    { return nil }
