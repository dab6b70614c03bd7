"""One module per storage backend; `layerfs.registry` finds them by name and imports them when they are needed."""
