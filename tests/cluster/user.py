"""The user container of the cluster tests: an HTTP server that says what it sees, on $PORT.

It stops at once on SIGTERM, as careless programs do: whoever finishes requests, it is not this.
"""

import http.server
import json
import os
import signal
import socket
import time
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    alive = True

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/die":
            Handler.alive = False
        time.sleep(float(query.get("seconds", 0)))
        facts = {
            "version": os.environ.get("VERSION", ""),
            "pod": socket.gethostname(),
            "headers": {name.lower(): value for name, value in self.headers.items()},
        }
        body = json.dumps(facts).encode()
        self.send_response(200 if Handler.alive or url.path != "/alive" else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Server(("", int(os.environ["PORT"])), Handler).serve_forever()
