"""The command line ``layerfs``."""

from layerfs.cli.app import main

__all__ = ["main"]
