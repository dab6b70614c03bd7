"""Tar streams: header blocks, a reader for every dialect found in image layers, and the canonical writer."""
