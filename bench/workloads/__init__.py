"""One file for each workload, found by `layerfs.bench.workload.discover`."""
