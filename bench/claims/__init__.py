"""What others have claimed of storage drivers, tested here: `layerfs claims`."""
