"""Metrics, logs and traces of a sidecar: observers of the relay (contract section 7, 3.13, 3.14).

`observability.observers_for` is the way in. Nothing here is on the path of a request unless it was
asked for, and nothing decides what becomes of one.
"""
