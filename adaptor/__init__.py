"""MQTT in, CloudEvents out: acknowledged to the broker only after the sink took the event.

Pure rules: topics, templates, document, endpoints, sending, routes, mapping, events and its
encodings (jsonformat, httpbinding, mqttbinding), retry, gate, acks, outgoing. Edges: address,
session, session311, websocket, publisher, sinks, quarantine, subscriptions, knative. delivery
composes them into one pipeline per sink, with batches before the sink, replies behind it, and
deadletter for what it does not take; service owns the pipelines, backward is the other direction;
operations, logs, tryout and the commands are for people.
"""
