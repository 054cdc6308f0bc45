"""Templates of request logs, rendered by Go's text/template and by ours, byte for byte the same."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.pods import go_command, why_no_go
from weir.proxy.environment import DEFAULT_REQUEST_LOG_TEMPLATE
from weir.proxy.observe.gorequest import Entry, Request, Response, Revision
from weir.proxy.observe.gotemplate import Template
from weir.proxy.observe.govalues import TemplateError, Unsupported, octets, text
from weir.proxy.wire.head import RequestHead

WITNESS = Path(__file__).parent / "gotemplate"

REQUESTS = {
    "plain": b"GET /a/b?x=1&y=a+b&x=2 HTTP/1.1\r\nHost: example.com:8080\r\n"
    b"User-Agent: curl/8\r\nX-Two: one\r\nx-two: two\r\nReferer: http://r/\"<'&=>\r\n"
    b"Accept: */*\r\nCookie: a=1; session=abc\r\n\r\n",
    "odd path": b'GET //a%2Fb/%7Ec;d,e:f@g!h\'(i)*[j]"k\xc3\xa9\xff?q="<&empty=&;bad=1&%zz=3'
    b' HTTP/1.1\r\nHost: h\r\nx-UPPER-lower: v\xc3\xa9\xff"\\\r\n\r\n',
    "chunked 1.1": b"POST /p? HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: close\r\n\r\n0\r\n\r\n",
    "length 1.0": b"PUT /p HTTP/1.0\r\nContent-Length: 12\r\n\r\n",
    "no fields": b"DELETE / HTTP/1.1\r\nHost: \r\n\r\n",
}

COMMON = [
    DEFAULT_REQUEST_LOG_TEMPLATE,
    DEFAULT_REQUEST_LOG_TEMPLATE.replace(
        "{{.TraceID}}", '{{index .Request.Header "X-B3-Traceid"}}'
    ),
    "TLS: {{if .Request.TLS}}yes{{else}}no{{end}}",
    "{{.Request.Method}} {{.Request.URL}} {{.Request.Proto}} {{.Request.ProtoMajor}}"
    "{{.Request.ProtoMinor}} {{.Request.ContentLength}} {{.Request.TransferEncoding}}"
    " {{.Request.Host}} {{.Request.RemoteAddr}} {{.Request.RequestURI}} {{.Request.Close}}",
    "{{.Request.UserAgent}}|{{.Request.Referer}}|{{.Request.Header}}",
    '{{.Request.Header.Get "x-two"}} {{.Request.Header.Values "X-Two"}}'
    ' {{index .Request.Header "X-Two"}} {{index .Request.Header "x-two"}}',
    '{{index .Request.Header "X-Two" 0}}',
    "{{.Request.Header.Accept}} {{.Request.Header.Nope}} {{.Request.Header.Nope.Nope}}",
    "{{.Request.URL.Path}} {{.Request.URL.RawQuery}} {{.Request.URL.RawPath}}"
    " {{.Request.URL.EscapedPath}} {{.Request.URL.RequestURI}} {{.Request.URL.Host}}"
    " {{.Request.URL.User}} {{.Request.URL.ForceQuery}} {{.Request.URL.IsAbs}}",
    '{{.Request.URL.Query}} {{.Request.URL.Query.Get "x"}} {{.Request.URL.Query.Encode}}'
    ' {{.Request.URL.Query.Has "y"}} {{.Request.URL.Query.x}}',
    '{{.Request.FormValue "x"}} {{.Request.ProtoAtLeast 1 1}} {{.Request.PathValue "x"}}',
    '{{(.Request.Cookie "session").Value}}',
    "{{.Response.Code}} {{.Response.Size}} {{.Response.Latency}} {{.Response}} {{.Revision}}",
    "{{.Revision.Name}} {{.Revision.Namespace}} {{.Revision.Service}}"
    " {{.Revision.Configuration}} {{.Revision.PodName}} {{.Revision.PodIP}} {{.TraceID}}",
    "{{js .Request.RequestURI}} {{html .Request.RequestURI}} {{urlquery .Request.RequestURI}}",
    '{{js (.Request.Header.Get "X-Upper-Lower")}} {{.Request.Header | js}} {{js .Request.URL}}',
    '{{html .Request.Header.Nope 1 2 "a" true}} {{js}} {{urlquery 1 2}}',
    '{{printf "%s %q %v %x" .Request.Method .Request.RequestURI .Request.Header .Request.Host}}',
    '{{printf "%d %5d %-5d| %05d %x %c" .Response.Code .Response.Size 7 42 255 65}}',
    '{{printf "%.3f %8.2f %e %g %v" .Response.Latency .Response.Latency 1.5 1e21 100000.0}}',
    '{{printf "%v %+v %s" .Response .Revision .Request.URL}}',
    '{{printf "%T %T" .Request.ContentLength .Request.Header}}',
    '{{printf "%d %s" "a" 1}} {{printf "%!"}} {{printf "x" 1 nil}} {{printf "%[2]d %[1]d" 1 2}}',
    '{{printf "%t %v %q" true nil .Request.TransferEncoding}} {{print 1 2 "a" 3 nil}}',
    '{{print "a" "b" 1 2}} {{println "x" 1}}',
    "{{len .Request.Method}} {{len .Request.Header}} {{len .Request.RequestURI}}",
    '{{slice .Request.Method 1}} {{slice .Request.Method 0 2}} {{slice "a\\u00e9b" 1 2 | len}}',
    '{{index "abc" 1}} {{slice (index .Request.Header "X-Two") 1}}',
]

LOGIC = [
    "{{if eq .Response.Code 200 201}}ok{{else if lt .Response.Code 500}}bad{{else}}worse{{end}}",
    '{{if and (ge .Response.Code 200) (lt .Response.Code 300)}}2xx{{end}}{{if not ""}}!{{end}}',
    '{{or .Request.Header.Nope "" 0 "last"}} {{and 1 "" 2}} {{or 1 .Nope}} {{and}}',
    '{{with .Request.Header.Get "X-Two"}}[{{.}}]{{else}}none{{end}}',
    '{{with .Request.Header.Get "No"}}a{{else with $.Request.Method}}{{.}}{{end}}',
    "{{range $k, $v := .Request.Header}}{{$k}}="
    "{{range $i, $x := $v}}{{if $i}},{{end}}{{$x}}{{end}};{{end}}",
    "{{range .Request.TransferEncoding}}{{.}}{{else}}identity{{end}}",
    "{{range $i, $v := .Request.Header.Accept}}{{$i}}{{$v}}{{end}}{{range 3}}{{.}}{{end}}",
    "{{range $x := 5}}{{if eq $x 1}}{{continue}}{{end}}{{if eq $x 3}}{{break}}{{end}}{{$x}}{{end}}",
    '{{$m := .Request.Method}}{{if true}}{{$m = "changed"}}{{$m := "inner"}}{{$m}}{{end}}{{$m}}',
    "{{$x := 1}}{{range 3}}{{$x = .}}{{end}}{{$x}} {{$.Response.Code}}",
    "a  {{- 1 -}}  b {{2 -}}\n c {{- /* note */ -}} d {{/* one */}} e",
    '{{"\\u00e9\\n\\x41\\101\\"" | printf "%q"}} {{`raw\\n"`}} {{\'x\'}} {{\'\\n\'}}',
    "{{0x1F}} {{0b11}} {{0o17}} {{017}} {{1_000}} {{-3}} {{+3}} {{1.5}} {{.5}} {{1e3}} {{1e6}}",
    "{{eq 1 1.0}}", "{{eq `a` 1}}",
    "{{lt `a` `b`}} {{le 2 2}} {{gt 1.5 1.0}} {{ge 1 2}} {{ne 1 2}}",
    "{{eq .Request.TLS nil}} {{eq .Request.TransferEncoding nil}} {{eq .Request.Header.Nope nil}}",
    "{{eq .Request.Header .Request.Header}}", "{{lt nil 1}}", "{{eq 1}}", "{{eq true true}}",
    '{{index "abc" 0 | eq 97}} {{eq (index "abc" 0) 97}} {{lt true false}}',
    '{{define "t"}}<{{.}}{{$}}>{{end}}{{template "t" .Request.Method}}{{template "t"}}',
    '{{block "b" .Response}}{{.Code}}{{end}} {{template "nope"}}',
    '{{define "r"}}{{template "r" .}}{{end}}{{with $x := 1}}{{$x}}{{end}}',
    "{{true}} {{false}} {{nil | printf}}", "{{(1)}} {{(printf `%d` 3)}} {{(.Request).Method}}",
    "{{.Request.Nope}}", "{{.Request.Method.Nope}}", "{{.Request.Method 1}}",
    "{{.Request.UserAgent 1}}", "{{1 2}}", "{{.Request.Header.Get}}", "{{.Request.Header.Get 1}}",
    "{{len 3}}", "{{len nil}}", "{{index 1 2}}", "{{index `a` `b`}}", "{{index `a` 7}}",
    "{{index}}",
    '{{slice "abc" 2 1}}', '{{slice "abc" 1 9}}', "{{slice 1}}", "{{call 1}}", "{{printf 1}}",
    '{{index .Request.Header 1}}', "{{.Request.TLS.Version}}", "{{range 1.5}}{{end}}",
    "{{range $a, $b := 3}}{{end}}", '{{.Request.Cookie "nope"}}', "{{.Nope}}", "{{$.Nope}}",
    "{{not 1 2}}", "{{printf `%-8s|%8s|%.2s` .Request.Method .Request.Method .Request.Method}}",
    "{{.Request.Header.Get `x-two` | len | printf `%03d`}}", "{{len (len `a`)}}",
    '{{.Request.Header.Get "X-Two" | printf "%s %s" "v:"}} {{"a" | len}} {{1 | eq 1}}',
]  # fmt: skip

SYNTAX = [
    "{{", "}}", "{{}}", "{{ }}", "{{.Request", "{{end}}", "{{else}}", "{{if}}{{end}}", "{{if 1}}",
    "{{range}}", "{{nope}}", "{{$x}}", "{{$x := }}", "{{1 | 2}}", "{{nil}}", '{{"a}}', "{{`a}}",
    "{{'ab'}}", "{{'}}", "{{break}}", "{{range 1}}{{define `x`}}{{end}}{{end}}", "{{/* a }}",
    "{{/* a */ 1}}", "{{1 /* a */}}", "{{(1}}", "{{1)}}", '{{"a"."b"}}', "{{1.Foo}}", "{{3x}}",
    "{{.A.}}", "{{..}}", "{{.A|}}", "{{|}}", "{{,}}", "{{$x, $y := 1}}", "{{x := 1}}", "{{$x=1}}",
    "{{if 1}}{{else}}{{else}}{{end}}", "{{with 1}}{{else if 1}}{{end}}", "{{template}}", "{{#}}",
    "{{template 1}}", "{{define 1}}{{end}}", "{{block `a`}}{{end}}", "{{99999999999999999999}}",
    "{{1e999}}", "{{0x}}", "{{'\\q'}}", '{{"\\q"}}', "{{continue}}", "{{:}}", "{{-}}", "{{- 1}}",
    "{{-1}}", "{{1-}}", "{{$}}{{end}}", "{{if 1}}{{end}} }} {", "{{range $i, 3}}{{end}}", "text",
    "", "{{.Request.Method}}\n", "{{ .Request.Method\n}}", "{ {{1}} }", "{{{1}}}", "{{else if 1}}",
    "{{if 1}}a{{else if 0}}b{{else if 1}}c{{else}}d{{end}}",
    "{{with $x := 3}}{{$x}}{{end}}{{$x}}",
    "{{/*a*/}}{{/* b */ -}} c", "{{if (eq 1 1) }}y{{end}}", "{{ print  1   2 }}", "{{print(1)}}",
    "{{print 1(2)}}", "{{.Request.Header.Get(`a`)}}", "{{true.x}}", "{{(1).x}}",
    "{{$x := 1}}{{$x}}",
]  # fmt: skip


def ours(template: str, request: bytes, tls: bool = False) -> tuple[str, bytes]:
    """How far it got, and what came out."""
    end = request.index(b"\r\n\r\n") + 4
    head = RequestHead(request[:end])
    data = Entry(
        Request(
            head.method,
            head.target,
            head.version,
            head.seen.get(b"host", b""),
            head.fields(),
            head.length,
            "10.1.2.3:4567",
            tls,
        ),
        Response(201, 5, 0.041670486),
        Revision("hello-00001", "default", "hello", "hello", "pod-1", "10.0.0.1"),
        "0af7651916cd43dd8448eb211c80319c",
    )
    try:
        parsed = Template(template)
    except TemplateError:
        return "parse", b""
    try:
        return "", octets(parsed.render(data))
    except Unsupported:
        return "refused", b""
    except TemplateError:
        return "render", b""


@cache
def cases() -> list[tuple[str, str]]:
    found = [(template, name) for template in COMMON for name in REQUESTS]
    return found + [(template, "plain") for template in (*LOGIC, *SYNTAX)]


class Witness:
    """The program of Go, asked one template at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(go_command()), "run", "."],
            cwd=WITNESS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "GOFLAGS": "-mod=mod", "GOWORK": "off"},
        )

    def render(self, template: str, request: bytes) -> tuple[str, bytes]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        question = {"Template": octets(template), "Request": request}
        encoded = {name: base64.b64encode(data).decode() for name, data in question.items()}
        stdin.write(json.dumps(encoded).encode() + b"\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        out = base64.b64decode(answer["out"] or "")
        return answer["stage"], out.replace(b"main.response", b"http.RequestLogResponse")

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def witness() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.close()


needs_go = pytest.mark.skipif(why_no_go() is not None, reason=why_no_go() or "")


@needs_go
@pytest.mark.parametrize("number", range(len(cases())))
def test_a_template_renders_as_in_go(witness: Witness, number: int) -> None:
    template, name = cases()[number]
    assert ours(template, REQUESTS[name]) == witness.render(template, REQUESTS[name])


def agree(witness: Witness, template: str) -> None:
    here = ours(template, REQUESTS["plain"])
    assume(here[0] != "refused")
    assert here == witness.render(template, REQUESTS["plain"])


_SHARED = [HealthCheck.function_scoped_fixture]  # the witness is asked again and again

PIECES = [
    *("{{", "}}", "{{-", "-}}", " ", " ", "(", ")", "|", "\n", "{{end}}", "{{else}}", "text"),
    *("if ", "with ", "range ", "$x := ", "$x", "$", ".", ".Request.Method", ".Response.Code"),
    *('"a\\n"', "`b`", "1", "-2", "1.5", "'c'", "nil", "true", "{{break}}", "{{$x := 1}}"),
    *("eq ", "lt ", "and ", "or ", "not ", "len ", "index ", "slice ", "js ", "html ", "print "),
    *('printf "%v %d" ', 'printf "%-5s|%q" ', ".Request.Header", '.Request.Header.Get "X-Two"'),
    *("{{.Response.Latency}}", "{{if .TraceID}}", "{{range $i, $x := .Request.Header}}", "/* c */"),
]


@needs_go
@settings(max_examples=300, deadline=None, suppress_health_check=_SHARED)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_what_go_makes_of_pieces_of_templates_we_make_of_them(
    witness: Witness, pieces: list[str]
) -> None:
    agree(witness, "".join(pieces))


ARGUMENTS = ["1", "-42", "255", "1.5", "0.00001", "123456789.5", '"a\\"b"', "true", "nil", '"é"']
ARGUMENTS += [".Request.Header", ".Request.TransferEncoding", ".Response"]


@needs_go
@settings(max_examples=300, deadline=None, suppress_health_check=_SHARED)
@given(
    flags=st.text("+-0 ", max_size=2),
    width=st.sampled_from(["", "3", "8", "*", "[2]"]),
    precision=st.sampled_from(["", ".", ".0", ".2", ".*"]),
    verb=st.sampled_from([*"vdsqxXobcUeEfgGtz%", "O", "!", ""]),
    arguments=st.lists(st.sampled_from(ARGUMENTS), max_size=3),
)
def test_printf_prints_as_in_go(
    witness: Witness, flags: str, width: str, precision: str, verb: str, arguments: list[str]
) -> None:
    template = f'{{{{printf "<%{flags}{width}{precision}{verb}>" {" ".join(arguments)}}}}}'
    agree(witness, template)


def test_tls_is_nil_on_the_plaintext_port_and_something_in_braces_on_the_other() -> None:
    assert ours("TLS: {{.Request.TLS}}", REQUESTS["plain"]) == ("", b"TLS: <nil>")
    _, line = ours("TLS: {{.Request.TLS}}", REQUESTS["plain"], tls=True)
    assert line.startswith(b"TLS: {") and line.endswith(b"}")


def test_bytes_that_are_no_text_come_out_as_they_came_in() -> None:
    assert ours("{{.Request.RequestURI}}", REQUESTS["odd path"])[1].count(b"\xff") == 1
    assert text(b"\xff") == "\udcff"


def test_what_go_prints_as_an_address_is_refused() -> None:
    assert ours("{{.}}", REQUESTS["plain"]) == ("refused", b"")
