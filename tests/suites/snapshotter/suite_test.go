// containerd's own test suite for snapshotters, through its proxy, on `layerfs serve containerd`.
//
// LAYERFS_COMMAND is layerfs's command line (words separated by newlines), LAYERFS_DRIVER the driver.
package snapshotter

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

func TestSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, "layerfs", served)
}

// served starts a server on a store of its own; the suite wants a fresh one for each test.
func served(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(root, "s")
	words := strings.Split(os.Getenv("LAYERFS_COMMAND"), "\n")
	words = append(words, "serve", "containerd", "--root", filepath.Join(root, "store"),
		"--driver", os.Getenv("LAYERFS_DRIVER"), "--socket", socket)
	command := exec.Command(words[0], words[1:]...)
	log := &strings.Builder{}
	command.Stdout, command.Stderr = log, log
	if err := command.Start(); err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	stop := func() error {
		_ = command.Process.Signal(syscall.SIGTERM)
		if err := <-ended; err != nil {
			return fmt.Errorf("the server ended with %w: %s", err, log)
		}
		return nil
	}
	for until := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if probe, err := net.Dial("unix", socket); err == nil {
			probe.Close()
			break
		}
		if time.Now().After(until) {
			return nil, nil, fmt.Errorf("the server does not listen: %w", stop())
		}
	}
	connection, err := grpc.Dial("unix://"+socket, grpc.WithInsecure())
	if err != nil {
		return nil, nil, err
	}
	cleanup := func() error {
		connection.Close()
		return stop()
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "layerfs"), cleanup, nil
}
