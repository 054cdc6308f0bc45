"""MQTT in, CloudEvents out: acknowledged to the broker only after the sink took the event.

Pure rules: topics, templates, document, endpoints, routes, mapping, events, retry, gate, acks,
outgoing. Edges: address, session, session311, websocket, publisher, sinks, quarantine,
subscriptions, knative. delivery composes them into one pipeline per sink, with deadletter for what
a sink does not take; service owns the pipelines, backward is the other direction; operations, logs,
tryout and the commands are for people.
"""
