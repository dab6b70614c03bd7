"""layerfs beside the programs that do the same, in one run on one machine."""
