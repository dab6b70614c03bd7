"""``python -m layerfs.bench.peers``: every comparison with other programs, one after the other."""

from layerfs.bench.peers import apply_diff, union

apply_diff.main(standalone_mode=False, args=[])
union.main(standalone_mode=False, args=[])
