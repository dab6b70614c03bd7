"""Which driver suits a given work, by what was measured: `layerfs advise`."""
