"""``python -m layerfs.bench.peers``: every comparison with other programs, one after the other."""

from layerfs.bench.peers import apply_diff, containerd, docker, union

for comparison in (apply_diff, union, containerd, docker):
    comparison.main(standalone_mode=False, args=[])
