"""Templates of Go: errors say where, and nothing that is written in one hangs or breaks us."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weir.proxy.environment import DEFAULT_REQUEST_LOG_TEMPLATE
from weir.proxy.observe.gorequest import Entry, Request, Response, Revision
from weir.proxy.observe.gotemplate import Template
from weir.proxy.observe.govalues import TemplateError


def entry(target: bytes = b"/", *fields: tuple[bytes, bytes]) -> Entry:
    request = Request(
        b"GET", target, b"HTTP/1.1", b"example.com", list(fields), 0, "10.1.2.3:4567", False
    )
    revision = Revision("hello-00001", "default", "hello", "hello", "pod-1", "10.0.0.1")
    return Entry(request, Response(200, 5, 0.0123), revision, "")


def test_the_default_template_is_one_line_of_json() -> None:
    line = Template(DEFAULT_REQUEST_LOG_TEMPLATE).render(
        entry(b'/a"b?<c>', (b"User-Agent", b"curl/8"), (b"Referer", b"http://x/"))
    )
    assert line == (
        '{"httpRequest": {"requestMethod": "GET", "requestUrl": "/a\\"b?\\u003Cc\\u003E",'
        ' "requestSize": "0", "status": 200, "responseSize": "5", "userAgent": "curl/8",'
        ' "remoteIp": "10.1.2.3:4567", "serverIp": "10.0.0.1", "referer": "http://x/",'
        ' "latency": "0.0123s", "protocol": "HTTP/1.1"}, "traceId": ""}'
    )


@pytest.mark.parametrize(
    ("template", "where"),
    [
        ("{{.Request", "line 1, column 11: unclosed action"),
        ("a\nb {{nope}}", "line 2, column 5: function 'nope' not defined"),
        ("{{if 1}}x", "line 1, column 10: unexpected EOF: an {{end}} is missing"),
        ("{{$x}}", "line 1, column 3: undefined variable '$x'"),
        ("{{end}}", "line 1, column 3: unexpected {{end}}"),
        ('{{"\\q"}}', 'line 1, column 3: "\\q": invalid syntax'),
    ],
)
def test_a_template_that_cannot_be_parsed_says_where(template: str, where: str) -> None:
    with pytest.raises(TemplateError) as error:
        Template(template)
    assert str(error.value) == where


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{.Request.Nope}}", "can't evaluate field Nope in type *http.Request"),
        ("{{index .Request.Header `X` 0}}", "error calling index: index out of range: 0"),
        ("{{.Request.TLS.Version}}", "nil pointer evaluating *tls.ConnectionState.Version"),
    ],
)
def test_a_template_that_cannot_be_rendered_says_why(template: str, why: str) -> None:
    parsed = Template(template)
    with pytest.raises(TemplateError) as error:
        parsed.render(entry())
    assert str(error.value) == why


@pytest.mark.parametrize(
    "template",
    [
        "{{range 1000000000}}{{end}}",
        "{{range 60000}}{{range 60000}}{{end}}{{end}}",
        '{{range 1000}}{{printf "%99999d" 1}}{{end}}',
        '{{define "a"}}{{template "a"}}{{end}}{{template "a"}}',
        '{{define "a"}}{{template "b"}}{{template "b"}}{{end}}'
        '{{define "b"}}{{template "a"}}{{template "a"}}{{end}}{{template "a"}}',
    ],
)
def test_a_template_that_would_not_end_is_ended(template: str) -> None:
    parsed = Template(template)
    with pytest.raises(TemplateError):
        parsed.render(entry())


@pytest.mark.parametrize("opening", ["{{if 1}}", "{{", '{{block "a" 1}}'])
def test_a_template_nested_without_end_is_refused(opening: str) -> None:
    inner = "(" if opening == "{{" else opening
    with pytest.raises(TemplateError):
        Template(opening + inner * 100_000)


PIECES = ["{{", "}}", "{{-", "-}}", "/*", "*/", ".", "$", "|", ":=", "=", "(", ")", ",", '"', "'"]
PIECES += [
    "`",
    "\\",
    "end",
    "if ",
    "range ",
    "with ",
    "else ",
    "define ",
    "printf ",
    "%d",
    "1",
    " ",
]


@settings(deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=30).map("".join)))
def test_no_text_does_anything_but_render_or_say_what_is_wrong(template: str) -> None:
    try:
        assert isinstance(Template(template).render(entry()), str)
    except TemplateError as error:
        assert str(error)


EVERYTHING = Template(
    "{{with .Request}}{{.Method}}{{.URL}}{{.URL.Query}}{{.URL.Query.Encode}}{{.URL.EscapedPath}}"
    "{{.URL.RawPath}}{{.Proto}}{{.ProtoMajor}}{{.ProtoMinor}}{{.Header}}{{.ContentLength}}"
    "{{.TransferEncoding}}{{.Close}}{{.Host}}{{.Form}}{{.Trailer}}{{.RemoteAddr}}{{.RequestURI}}"
    '{{.TLS}}{{.UserAgent}}{{.Referer}}{{.FormValue "a"}}{{js .Header}}{{html .RequestURI}}'
    '{{urlquery .RequestURI}}{{printf "%q %x" .RequestURI .Host}}{{end}}{{.Response}}{{.Revision}}'
)


@settings(deadline=None)
@given(
    st.binary(max_size=40),
    st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=30)), max_size=5),
)
def test_no_request_breaks_a_line(target: bytes, fields: list[tuple[bytes, bytes]]) -> None:
    data = entry(b"/" + target, *fields, (b"Cookie", target))
    assert EVERYTHING.render(data)
    assert Template(DEFAULT_REQUEST_LOG_TEMPLATE).render(data)
    with contextlib.suppress(TemplateError):  # there may be no such cookie
        Template('{{(.Request.Cookie "a").Value}}').render(data)
