// Docker's own tests for graph drivers, through its plugin protocol, on `layerfs serve docker`.
//
// SOCKET is where the server listens. QUOTA says that the driver limits sizes.
package graphdriver

import (
	"os"
	"testing"

	"github.com/docker/docker/daemon/graphdriver"
	"github.com/docker/docker/daemon/graphdriver/graphtest"
	"github.com/docker/docker/pkg/idtools"
	"github.com/docker/docker/pkg/plugingetter"
	"github.com/docker/docker/pkg/plugins"
	"github.com/docker/docker/pkg/reexec"
)

const driver = "layerfs"

// plugin is what Docker makes of a plugin's socket.
type plugin struct{ client *plugins.Client }

func (p plugin) Name() string               { return driver }
func (p plugin) ScopedPath(s string) string { return s }
func (p plugin) IsV1() bool                 { return true }
func (p plugin) Client() *plugins.Client    { return p.client }

// getter finds that plugin.
type getter struct{ plugin }

func (g getter) Get(string, string, int) (plugingetter.CompatPlugin, error)   { return g.plugin, nil }
func (g getter) GetAllByCap(string) ([]plugingetter.CompatPlugin, error)      { return nil, nil }
func (g getter) GetAllManagedPluginsByCap(string) []plugingetter.CompatPlugin { return nil }
func (g getter) Handle(string, func(string, *plugins.Client))                 {}

// begin makes Docker's proxy of the plugin a driver with a name, as the tests take drivers by name.
func begin(root string, options []string, _, _ []idtools.IDMap) (graphdriver.Driver, error) {
	client, err := plugins.NewClient("unix://"+os.Getenv("SOCKET"), nil)
	if err != nil {
		return nil, err
	}
	given := graphdriver.Options{Root: root, DriverOptions: options, ExperimentalEnabled: true}
	return graphdriver.GetDriver("plugin", getter{plugin{client}}, given)
}

func TestMain(m *testing.M) {
	if reexec.Init() {
		return
	}
	if err := graphdriver.Register(driver, begin); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func TestSetup(t *testing.T)       { graphtest.GetDriver(t, driver) }
func TestCreateEmpty(t *testing.T) { graphtest.DriverTestCreateEmpty(t, driver) }
func TestCreateBase(t *testing.T)  { graphtest.DriverTestCreateBase(t, driver) }
func TestCreateSnap(t *testing.T)  { graphtest.DriverTestCreateSnap(t, driver) }
func TestDeepLayers(t *testing.T)  { graphtest.DriverTestDeepLayerRead(t, 128, driver) }
func TestDiffApply(t *testing.T)   { graphtest.DriverTestDiffApply(t, 10, driver) }
func TestChanges(t *testing.T)     { graphtest.DriverTestChanges(t, driver) }

func TestQuota(t *testing.T) {
	if os.Getenv("QUOTA") == "" {
		t.Skip("the driver cannot limit sizes on this backing")
	}
	graphtest.DriverTestSetQuota(t, driver, true)
}

func TestTeardown(t *testing.T) { graphtest.PutDriver(t) }
