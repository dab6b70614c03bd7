"""The benchmark suite: what a storage driver costs, measured so that the figure can be believed.

A *workload* (one file in `layerfs.bench.workloads`) is run on a layer that is fresh for each *sample*; a *run* is all
samples of one invocation. `layerfs.bench.runner` takes them, `layerfs.bench.runfile` keeps them.
"""
