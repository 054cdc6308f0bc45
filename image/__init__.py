"""Weir's container image, assembled from this machine without a Docker daemon (docs/cluster.md)."""
