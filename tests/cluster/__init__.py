"""A real Kubernetes with Knative Serving on one machine, without Docker, and what needs it.

docs/cluster.md explains how it is put together; `python -m tests.cluster` is its command.
"""
