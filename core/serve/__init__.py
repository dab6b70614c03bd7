"""Servers by which container engines use a store: containerd's snapshots service and Docker's graph-driver plugin."""
