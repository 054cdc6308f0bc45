"""Heads of requests: what the user container gets of them (contract sections 3.3 to 3.5).

All of them are data: the request as the client says it. What has to come out of it, the
queue-proxy says.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.contract.scenario import Scenario, add
from tests.contract.world import World

USUAL = ("Host: bench.example.com", "User-Agent: curl/8")


@dataclass(frozen=True)
class Case:
    """The lines of a head; if it is not `bare`, Host and User-Agent come first."""

    name: str
    section: str
    head: str
    body: str = ""
    bare: bool = False

    async def play(self, world: World) -> None:
        first, *lines = self.head.split("\n")
        usual = () if self.bare else USUAL
        data = "\r\n".join([first, *usual, *lines, "", self.body]).encode("latin-1")
        client = await world.client()
        await world.ask("answer", data, client=client)
        world.note("the rest", await world.rest(client))


CASES = [
    Case("a_plain_GET", "3.3", "GET / HTTP/1.1"),
    Case("HEAD_has_no_body", "3.3", "HEAD / HTTP/1.1"),
    Case("a_POST_with_a_length", "3.3", "POST / HTTP/1.1\nContent-Length: 7", '{"a":1}'),
    Case("a_POST_with_length_0", "3.3", "POST / HTTP/1.1\nContent-Length: 0"),
    Case("a_POST_without_a_body", "3.3", "POST / HTTP/1.1"),
    Case(
        "a_chunked_POST",
        "3.11",
        "POST / HTTP/1.1\nTransfer-Encoding: chunked",
        "4\r\nabcd\r\n1;x=y\r\ne\r\n0\r\n\r\n",
    ),
    Case(
        "trailers_of_a_request_that_were_announced",
        "3.9",
        "POST / HTTP/1.1\nTransfer-Encoding: chunked\nTrailer: X-T",
        "4\r\nabcd\r\n0\r\nX-T: v\r\n\r\n",
    ),
    Case(
        "trailers_of_a_request_that_were_not_announced",
        "3.9",
        "POST / HTTP/1.1\nTransfer-Encoding: chunked",
        "4\r\nabcd\r\n0\r\nX-T: v\r\n\r\n",
    ),
    Case("a_GET_with_a_body", "3.3", "GET / HTTP/1.1\nContent-Length: 2", "ab"),
    Case("a_method_nobody_has_heard_of", "3.3", "FETCH-ALL / HTTP/1.1"),
    Case("Connection_close_stays_here", "3.3", "GET / HTTP/1.1\nConnection: close"),
    # --- versions and targets
    Case("an_HTTP_1_0_client_is_served", "3.3", "GET / HTTP/1.0"),
    Case("an_HTTP_1_0_client_may_keep_alive", "3.3", "GET / HTTP/1.0\nConnection: keep-alive"),
    Case("an_HTTP_1_0_client_needs_no_Host", "3.3", "GET / HTTP/1.0", bare=True),
    Case("the_target_is_kept_byte_for_byte", "3.3", "GET /a%2Fb//c/../d?x=%zz;y=1&z HTTP/1.1"),
    Case("a_query_that_is_empty_stays", "3.3", "GET /a? HTTP/1.1"),
    Case("the_host_of_an_absolute_target_wins", "3.3", "GET http://other.example.com/p?q HTTP/1.1"),
    Case("CONNECT_is_a_request_like_others", "3.3", "CONNECT host:443 HTTP/1.1"),
    Case("OPTIONS_of_the_server_itself", "3.12", "OPTIONS * HTTP/1.1"),
    # --- Forwarded (3.5)
    Case("Forwarded_needs_an_input", "3.5", "GET / HTTP/1.1\nX-Forwarded-Port: 80"),
    Case(
        "Forwarded_from_all_three",
        "3.5",
        "GET / HTTP/1.1\nX-Forwarded-For: 127.0.0.1, ::1\nX-Forwarded-Host: h\n"
        "X-Forwarded-Proto: p",
    ),
    Case("Forwarded_from_For_alone", "3.5", "GET / HTTP/1.1\nX-Forwarded-For: 127.0.0.1, ::1"),
    Case(
        "Forwarded_from_Host_and_Proto",
        "3.5",
        "GET / HTTP/1.1\nX-Forwarded-Host: h\nX-Forwarded-Proto: p",
    ),
    Case("Forwarded_from_Proto_alone", "3.5", "GET / HTTP/1.1\nX-Forwarded-Proto: https"),
    Case("Forwarded_from_commas", "3.5", "GET / HTTP/1.1\nX-Forwarded-For: ,,,"),
    Case("Forwarded_from_blanks", "3.5", "GET / HTTP/1.1\nX-Forwarded-For:  a ,\tb  ,c"),
    Case(
        "Forwarded_from_two_lines_of_For",
        "3.5",
        "GET / HTTP/1.1\nX-Forwarded-For: 10.0.0.1\nX-Forwarded-For: 10.0.0.2",
    ),
    Case(
        "a_Forwarded_that_is_there_stays",
        "3.5",
        "GET / HTTP/1.1\nForwarded: for=1.2.3.4\nX-Forwarded-For: 10.1.2.3",
    ),
    Case(
        "a_Forwarded_that_is_empty_is_none",
        "3.5",
        "GET / HTTP/1.1\nForwarded:\nX-Forwarded-For: 10.1.2.3",
    ),
    # --- Knative's own
    Case(
        "the_activators_headers",
        "3.3",
        "GET / HTTP/1.1\nHost:\nUser-Agent: curl/8\nK-Proxy-Request: activator\n"
        "K-Original-Host: orig.example.com\nKnative-Serving-Namespace: default\n"
        "Knative-Serving-Revision: bench-00001\nK-Passthrough-Lb: true\nK-Network-Hash: abc",
        bare=True,
    ),
    Case(
        "an_Original_Host_replaces_the_Host",
        "3.3",
        "GET / HTTP/1.1\nK-Original-Host: orig.example.com",
    ),
    Case("an_empty_Original_Host", "3.3", "GET / HTTP/1.1\nK-Original-Host:"),
    Case("a_tag", "7.2", "GET / HTTP/1.1\nKnative-Serving-Tag: blue"),
    Case(
        "a_tag_of_the_default_route",
        "7.2",
        "GET / HTTP/1.1\nKnative-Serving-Tag: blue\nKnative-Serving-Default-Route: true",
    ),
    Case("the_default_route", "7.2", "GET / HTTP/1.1\nKnative-Serving-Default-Route: true"),
    Case(
        "a_tag_that_is_not_the_default_route",
        "7.2",
        "GET / HTTP/1.1\nKnative-Serving-Tag: blue\nKnative-Serving-Default-Route: false",
    ),
    # --- everything else
    Case(
        "hop_by_hop_headers_stay_here",
        "3.3",
        "GET / HTTP/1.1\nConnection: keep-alive, X-Hop\nX-Hop: 1\nKeep-Alive: timeout=5\n"
        "Proxy-Authorization: Basic x\nProxy-Authenticate: x\nProxy-Connection: keep-alive",
    ),
    Case("TE_trailers_stays", "3.3", "GET / HTTP/1.1\nTE: trailers"),
    Case("TE_trailers_among_others", "3.3", "GET / HTTP/1.1\nTE: gzip, trailers;q=0.5"),
    Case("TE_without_trailers_goes", "3.3", "GET / HTTP/1.1\nTE: gzip"),
    Case("Accept_Encoding_is_not_ours", "3.3", "GET / HTTP/1.1\nAccept-Encoding: br"),
    Case(
        "traces_are_passed_on",
        "3.3",
        "GET / HTTP/1.1\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\n"
        "tracestate: a=b\nbaggage: c=d\nX-B3-TraceId: 80f198ee56343ba8",
    ),
    Case("no_User_Agent_is_invented", "3.3", "GET / HTTP/1.1\nHost: x", bare=True),
    Case("an_empty_User_Agent", "3.3", "GET / HTTP/1.1\nHost: x\nUser-Agent:", bare=True),
    Case("the_same_header_twice", "3.3", "GET / HTTP/1.1\nX-A: 1\nX-B: 2\nx-a: 3"),
    Case("blanks_around_a_value", "3.3", "GET / HTTP/1.1\nX-A: \t a b \t "),
    Case("bytes_beyond_ASCII", "3.3", "GET / HTTP/1.1\nX-A: \xe4\xf6\xfc"),
    Case("cookies_on_several_lines", "3.3", "GET / HTTP/1.1\nCookie: a=1\nCookie: b=2"),
    Case("an_Upgrade_without_Connection", "3.10", "GET / HTTP/1.1\nUpgrade: websocket"),
    Case("a_head_of_20_kB", "3.12", f"GET / HTTP/1.1\nX-Big: {'a' * 20000}"),
]
for case in CASES:
    add(Scenario(case.name, case.section, case.play))
