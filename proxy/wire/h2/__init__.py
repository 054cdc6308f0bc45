"""HTTP/2 on the wire: header compression, frames, flow control, and the two ends of a relay.

Knows no policy. `server` is the connection of a client, `user` the one to the user container.
"""
