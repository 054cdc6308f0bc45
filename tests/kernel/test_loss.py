"""Counts stay exact, and bodies whole, when segments are lost, doubled, late or overlapping."""

from __future__ import annotations

import itertools
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from random import Random

import pytest

from tests.kernel.direct import GET, OK, Direct, Exchange
from tests.pods import DIRECT_PORT, Pod, RemoteSocket, needs_kernel, until

pytestmark = needs_kernel

LOSS_PERCENT = 5
FIN, SYN, PSH, ACK = 1, 2, 8, 16


# ---- a lossy link ----------------------------------------------------------------------------


def tc(pod: Pod, inside: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    where = ["-n", pod.name] if inside else []
    return subprocess.run(["tc", *where, *arguments], capture_output=True, text=True, check=False)


def drop_by_netem(pod: Pod, inside: bool, device: str) -> str | None:
    """None, or why it can't be done."""
    loss = ("root", "netem", "loss", f"{LOSS_PERCENT}%")
    return tc(pod, inside, "qdisc", "add", "dev", device, *loss).stderr.strip() or None


def drop_by_filter(pod: Pod, inside: bool, device: str) -> str | None:
    """The same by a classic BPF filter, for kernels without netem: A = random; drop or not.
    On arrival: what is dropped on departure TCP is told of, and never counts as sent."""
    share = LOSS_PERCENT * (1 << 32) // 100
    random, shot, ok = 0xFFFFF000 + 56, 2, 0
    program = f"4,32 0 0 {random},53 1 0 {share},6 0 0 {shot},6 0 0 {ok}"
    tc(pod, inside, "qdisc", "add", "dev", device, "clsact")
    ingress = ("ingress", "bpf", "da", "bytecode", program)
    return tc(pod, inside, "filter", "add", "dev", device, *ingress).stderr.strip() or None


def keep_neighbours(pod: Pod) -> None:
    """Loss is for TCP: three ARP packets lost in a row would make the host unreachable."""
    host = pod.host_address
    ours = mac_of(["ip", "-o", "link", "show", pod.host_interface])
    theirs = mac_of(["ip", "-n", pod.name, "-o", "link", "show", pod.interface])
    permanent = ["nud", "permanent", "dev"]
    there = ["neigh", "replace", host, "lladdr", ours, *permanent, pod.interface]
    here = ["neigh", "replace", pod.address, "lladdr", theirs, *permanent, pod.host_interface]
    subprocess.run(["ip", "-n", pod.name, *there], check=True)
    subprocess.run(["ip", *here], check=True)


@pytest.fixture
def lossy(direct: Direct) -> Iterator[Direct]:
    pod = direct.pod
    sides = ((False, pod.host_interface), (True, pod.interface))
    keep_neighbours(pod)
    for inside, device in sides:
        reason = drop_by_netem(pod, inside, device)
        other = reason and drop_by_filter(pod, inside, device)
        if other:
            pytest.skip(f"needs netem ({reason}) or cls_bpf ({other})")
    yield direct
    for inside, device in sides:
        tc(pod, inside, "qdisc", "del", "dev", device, "root")
        tc(pod, inside, "qdisc", "del", "dev", device, "clsact")


def test_counts_and_bodies_are_exact_on_a_lossy_link(lossy: Direct) -> None:
    connections, requests, size = 6, 5, 30_000
    exchanges = [lossy.connect() for _ in range(connections)]
    random = Random(5)
    for _ in range(requests):
        for exchange in exchanges:
            exchange.client.settimeout(60)
            body = random.randbytes(size)
            message = b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size + body
            sender = threading.Thread(target=send_in_pieces, args=(exchange.client, message))
            sender.start()
            assert exchange.server.recv_exactly(len(message)) == message
            sender.join()
            exchange.answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body)
    total = connections * requests
    lossy.expect(0, total, total, 0)
    assert lossy.since("out_of_order") > 0, "the link loses nothing"


def send_in_pieces(client: socket.socket, message: bytes) -> None:
    for start in range(0, len(message), 700):
        client.sendall(message[start : start + 700])


# ---- segments made by hand -------------------------------------------------------------------


class Crafted:
    """A TCP connection from an address that is nobody's: every segment is what a test says.

    Positions are relative to the first byte of the stream.
    """

    _ports = itertools.count(40_000)

    def __init__(self, wire: Wire, listener: RemoteSocket, *, first: bytes = b"") -> None:
        """`first` travels with the ACK that completes the handshake."""
        self._wire, self._port, self._initial = wire, next(self._ports), 1000
        self._theirs = 0
        self.send(-1, b"", SYN)
        self._theirs = wire.await_synack(self._port) + 1
        self.send(0, first, PSH | ACK if first else ACK)
        self.server = listener.accept()

    def send(self, position: int, data: bytes, flags: int = PSH | ACK) -> None:
        self._wire.send(self._port, self._initial + 1 + position, self._theirs, data, flags)


class Wire:
    def __init__(self, pod: Pod) -> None:
        self._device = pod.host_interface
        self.source = pod.address6.rpartition(":")[0] + ":77"
        self._source = socket.inet_pton(socket.AF_INET6, self.source)
        self._destination = socket.inet_pton(socket.AF_INET6, pod.address6)
        ours = mac_of(["ip", "-o", "link", "show", pod.host_interface])
        theirs = mac_of(["ip", "-n", pod.name, "-o", "link", "show", pod.interface])
        neighbour = ["neigh", "replace", self.source, "lladdr", ours, "dev", pod.interface]
        subprocess.run(["ip", "-n", pod.name, *neighbour], check=True)
        self._ethernet = packed(theirs) + packed(ours) + b"\x86\xdd"
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x86DD))
        self._socket.bind((self._device, 0))
        self._socket.settimeout(10)

    def send(self, port: int, sequence: int, acknowledged: int, data: bytes, flags: int) -> None:
        fixed = struct.pack("!HHII", port, DIRECT_PORT, sequence, acknowledged)
        header = fixed + struct.pack("!BBHHH", 5 << 4, flags, 65000, 0, 0)
        length = len(header) + len(data)
        pseudo = self._source + self._destination + struct.pack("!II", length, socket.IPPROTO_TCP)
        check = struct.pack("!H", checksum(pseudo + header + data))
        segment = header[:16] + check + header[18:] + data
        ip = struct.pack("!IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64)
        self._socket.send(self._ethernet + ip + self._source + self._destination + segment)

    def await_synack(self, port: int) -> int:
        while True:
            frame = self._socket.recv(4096)
            if frame[20] != socket.IPPROTO_TCP or frame[38:54] != self._source:
                continue
            _, to, sequence = struct.unpack_from("!HHI", frame, 54)
            if to == port and frame[54 + 13] & (SYN | ACK) == SYN | ACK:
                return int(sequence)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def wire(direct: Direct) -> Iterator[Wire]:
    made = Wire(direct.pod)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def crafted(direct: Direct, wire: Wire) -> Iterator[Crafted]:
    connection = Crafted(wire, direct.listener)
    yield connection
    connection.server.reset()


HALF = len(GET) // 2
BODY = b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n"


def received(connection: Crafted, wanted: bytes) -> bool:
    return connection.server.recv_exactly(len(wanted)) == wanted


def test_a_segment_that_comes_twice_counts_once(direct: Direct, crafted: Crafted) -> None:
    crafted.send(0, GET)
    crafted.send(0, GET)
    assert received(crafted, GET)
    direct.expect(1, 1, 0, 0)
    crafted.server.sendall(OK)
    direct.expect(0, 1, 1, 0)
    crafted.send(0, GET)
    crafted.send(len(GET), GET)
    assert received(crafted, GET)
    direct.expect(1, 2, 1, 0)
    crafted.server.sendall(OK)
    direct.expect(0, 2, 2, 0)


def test_overlapping_segments_are_followed_where_they_are_new(
    direct: Direct, crafted: Crafted
) -> None:
    stream = GET + GET
    crafted.send(0, stream[:60])
    crafted.send(30, stream[30:90])
    crafted.send(10, stream[10:])
    assert received(crafted, stream)
    crafted.server.sendall(OK + OK)
    direct.expect(0, 2, 2, 0)
    assert direct.since("framing_lost") == 0


def test_body_bytes_out_of_order_lose_nothing(direct: Direct, crafted: Crafted) -> None:
    crafted.send(0, BODY)
    crafted.send(len(BODY) + 50, b"b" * 50)
    crafted.send(len(BODY), b"a" * 50)
    assert received(crafted, BODY + b"a" * 50 + b"b" * 50)
    crafted.server.sendall(OK)
    direct.expect(0, 1, 1, 0)
    crafted.send(len(BODY) + 100, GET)
    assert received(crafted, GET)
    crafted.server.sendall(OK)
    direct.expect(0, 2, 2, 0)
    assert (direct.since("out_of_order"), direct.since("framing_lost")) == (1, 0)


def test_a_head_out_of_order_is_one_request_and_framing_resumes_when_it_is_answered(
    direct: Direct, crafted: Crafted
) -> None:
    crafted.send(HALF, GET[HALF:])
    crafted.send(0, GET[:HALF])
    assert received(crafted, GET)
    direct.expect(1, 1, 0, 0)
    crafted.server.sendall(OK)
    direct.expect(0, 1, 1, 0)
    crafted.send(len(GET), GET)
    assert received(crafted, GET)
    crafted.server.sendall(OK)
    direct.expect(0, 2, 2, 0)
    assert direct.since("framing_lost") == 1


def test_a_whole_request_out_of_order_is_counted(direct: Direct, crafted: Crafted) -> None:
    crafted.send(len(GET), GET)
    crafted.send(0, GET)
    assert received(crafted, GET + GET)
    crafted.server.sendall(OK + OK)
    direct.expect(0, 2, 2, 0)


def test_data_with_the_fin_is_counted(direct: Direct, crafted: Crafted) -> None:
    crafted.send(0, GET, PSH | ACK | FIN)
    assert received(crafted, GET)
    direct.expect(1, 1, 0, 0)
    crafted.server.sendall(OK)
    direct.expect(0, 1, 1, 0)


def test_a_request_on_the_ack_that_completes_the_handshake_is_counted(
    direct: Direct, wire: Wire
) -> None:
    connection = Crafted(wire, direct.listener, first=GET)
    assert received(connection, GET)
    direct.expect(1, 1, 0, 0)
    assert direct.since("framing_lost") == 1
    connection.server.sendall(OK)
    direct.expect(0, 1, 1, 0)
    connection.send(len(GET), GET)
    assert received(connection, GET)
    connection.server.sendall(OK)
    direct.expect(0, 2, 2, 0)
    connection.server.reset()


def test_a_listener_that_defers_accept_is_counted_exactly(direct: Direct) -> None:
    """Apache's default: the first request comes with the handshake, as far as TCP tells."""
    direct.listener.close()
    deferring = direct.backend.listen("::", defer_accept=True)
    try:
        client = socket.create_connection((direct.pod.address, DIRECT_PORT), 10)
        client.sendall(GET)
        exchange = Exchange(client, deferring.accept())
        assert exchange.server.recv_exactly(len(GET)) == GET
        direct.expect(1, 1, 0, 0)
        exchange.answer(OK)
        direct.expect(0, 1, 1, 0)
        exchange.ask(GET)
        exchange.answer(OK)
        direct.expect(0, 2, 2, 0)
        exchange.close()
        until(lambda: direct.counters.open_connections == 0)
    finally:
        deferring.close()
        direct.listener = direct.backend.listen("::")


def mac_of(command: list[str]) -> str:
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return shown.split("link/ether ")[1].split()[0]


def packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
