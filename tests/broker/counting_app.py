"""A function for tests: `python counting_app.py PORT FILE`. Notes the body of every request in a
line of the file and then answers 204, so that what it has answered is noted even if it is killed.
"""

import os
import socket
import sys
import threading


def serve(connection: socket.socket, notes: int) -> None:
    rest = b""
    with connection:
        while True:
            while b"\r\n\r\n" not in rest:
                data = connection.recv(65536)
                if not data:
                    return
                rest += data
            head, _, rest = rest.partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            found = [line for line in lines if line.startswith(b"content-length:")]
            length = int(found[0].partition(b":")[2]) if found else 0
            while len(rest) < length:
                data = connection.recv(65536)
                if not data:
                    return
                rest += data
            body, rest = rest[:length], rest[length:]
            if lines[0].startswith(b"post"):
                os.write(notes, body + b"\n")
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def main() -> None:
    notes = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=512)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, notes), daemon=True).start()


if __name__ == "__main__":
    main()
