"""MQTT in, CloudEvents out: acknowledged to the broker only after the sink took the event.

topics, templates, routes, mapping, events, retry, acks: pure rules. session, session311, sinks,
quarantine: edges. delivery composes them into one pipeline per sink; service owns the pipelines.
"""
