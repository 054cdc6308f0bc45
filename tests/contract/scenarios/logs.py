"""The request log on stdout (contract section 3.13) and what goes to stderr (3.14).

Templates are those that users write; what differs from run to run is left out of them or blurred.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass

from tests.contract.scenario import Scenario, add, scenario
from tests.contract.scenarios.probes import HASH, probe
from tests.contract.user import HELLO, ok
from tests.contract.world import World
from tests.relay.rig import get, post

DEFAULT = (
    '{"httpRequest": {"requestMethod": "{{.Request.Method}}", "requestUrl": '
    '"{{js .Request.RequestURI}}", "requestSize": "{{.Request.ContentLength}}", "status": '
    '{{.Response.Code}}, "responseSize": "{{.Response.Size}}", "userAgent": '
    '"{{js .Request.UserAgent}}", "remoteIp": "{{js .Request.RemoteAddr}}", "serverIp": '
    '"{{.Revision.PodIP}}", "referer": "{{js .Request.Referer}}", "latency": '
    '"{{.Response.Latency}}s", "protocol": "{{.Request.Proto}}"}, "traceId": '
    '"{{index .Request.Header "X-B3-Traceid"}}"}'
)
TEMPLATES = {
    "the_default_template": DEFAULT,
    "plain_words": "a line",
    "words_with_a_newline": "a line\n",
    "the_request": "{{.Request.Method}} {{.Request.Host}} {{.Request.RequestURI}}"
    " {{.Request.Proto}} {{.Request.ProtoMajor}} {{.Request.ContentLength}} {{.Request.UserAgent}}"
    " {{.Request.Referer}} {{.Request.TransferEncoding}}",
    "its_URL": "{{.Request.URL}} {{.Request.URL.Path}} {{.Request.URL.RawQuery}}"
    " {{.Request.URL.Host}}",
    "its_headers": '{{.Request.Header.Get "x-a"}} {{index .Request.Header "X-A"}}'
    ' {{.Request.Header.Get "Forwarded"}} {{.Request.Header.Get "K-Original-Host"}}'
    ' {{.Request.Header.Get "Knative-Serving-Revision"}} {{.Request.Header.Get "None"}}',
    "no_TLS": "TLS: {{.Request.TLS}}",
    "the_response": "{{.Response.Code}} {{.Response.Size}}",
    "the_revision": "{{.Revision.Name}} {{.Revision.Namespace}} {{.Revision.Service}}"
    " {{.Revision.Configuration}} {{.Revision.PodName}} {{.Revision.PodIP}}",
    "decisions": "{{if eq .Response.Code 200}}fine{{else}}bad{{end}}"
    ' {{with .Request.Header.Get "X-A"}}has {{.}}{{end}}'
    "{{range .Request.Header}}.{{end}}",
    "functions": '{{printf "%d|%5d|%q" .Response.Code .Response.Size .Request.Method}}'
    " {{js .Request.RequestURI}} {{html .Request.RequestURI}} {{len .Request.Method}}"
    " {{and true .Response.Code}} {{not false}} {{gt .Response.Code 199}}",
    "a_pipe": "{{.Request.Method | printf `%s-%s` `x` | html}}",
    "variables": "{{$code := .Response.Code}}{{$code}}",
    "trimmed": "a {{- .Response.Code -}} b",
}


@dataclass(frozen=True)
class Template:
    """Three requests, logged by this template."""

    async def play(self, world: World) -> None:
        world.user.on("/none", ok(b"none", status="404 Not Found"))
        fields = (
            "X-A: 1",
            "X-A: 2",
            "K-Original-Host: orig",
            "Knative-Serving-Revision: r",
            "X-Forwarded-For: 10.0.0.1",
            "X-B3-TraceId: 80f198ee56343ba8",
            "Referer: http://a/<b>",
        )
        client = await world.client()
        await world.ask("first", get("/a/%3Cb%3E?c=<d>&e='f'", *fields), client=client)
        await world.ask("second", post("/none", b"abc"), client=client)
        await world.ask("third", get("/"), client=client)
        await logged(world, 3)


async def logged(world: World, lines: int) -> None:
    await world.until(lambda: world.stdout.count("\n") >= lines, f"{lines} lines of log")
    for number, line in enumerate(world.stdout.splitlines()):
        line = re.sub(r'(?<="latency": ")[0-9.e-]+s', "some seconds", line)
        line = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:port", line)
        world.note(f"line {number}", line)


for name, template in TEMPLATES.items():
    add(
        Scenario(
            f"a_request_log_of_{name}",
            "3.13",
            Template().play,
            {"SERVING_ENABLE_REQUEST_LOG": "true", "SERVING_REQUEST_LOG_TEMPLATE": template},
        )
    )


@scenario("3.13", SERVING_REQUEST_LOG_TEMPLATE=DEFAULT)
async def no_request_log_without_its_switch(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("stdout", world.stdout)


@scenario("3.13", SERVING_ENABLE_REQUEST_LOG="true")
async def no_request_log_without_a_template(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("stdout", world.stdout)


PROBES = "{{.Request.UserAgent}} {{.Response.Code}}"


@scenario("3.13", SERVING_ENABLE_REQUEST_LOG="true", SERVING_REQUEST_LOG_TEMPLATE=PROBES)
async def probes_are_not_logged(world: World) -> None:
    await world.ask("health check", probe())
    await world.ask("network probe", probe("probe", "curl/8", HASH))
    await world.ask("traffic", get("/"))
    await logged(world, 1)


@scenario(
    "3.13",
    SERVING_ENABLE_REQUEST_LOG="true",
    SERVING_ENABLE_PROBE_REQUEST_LOG="true",
    SERVING_REQUEST_LOG_TEMPLATE=PROBES,
)
async def probes_are_logged_when_asked_to(world: World) -> None:
    await world.ask("health check", probe())
    await world.ask("unknown probe", probe("nonsense"))
    await world.ask("network probe", probe("probe", "curl/8", HASH))
    await world.ask("traffic", get("/"))
    await logged(world, 4)


@scenario("3.13", SERVING_ENABLE_REQUEST_LOG="true", SERVING_REQUEST_LOG_TEMPLATE="{{.Nothing")
async def a_template_that_is_none(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("stdout", world.stdout)


@scenario(
    "3.13",
    SERVING_ENABLE_REQUEST_LOG="true",
    SERVING_REQUEST_LOG_TEMPLATE="{{.Response.Code}} {{.Request.Nothing}}",
)
async def a_template_that_fails_when_it_is_used(world: World) -> None:
    await world.ask("answer", get("/a"))
    await world.until(lambda: "\n" in world.stdout, "a line")
    line = re.sub(r"latency: [0-9.e-]+", "latency: some", world.stdout.splitlines()[0])
    world.note("line", line)


@scenario(
    "3.13",
    REVISION_TIMEOUT_SECONDS="1",
    CONTAINER_CONCURRENCY="1",
    SERVING_ENABLE_REQUEST_LOG="true",
    SERVING_REQUEST_LOG_TEMPLATE="{{.Request.RequestURI}} {{.Response.Code}} {{.Response.Size}}",
)
async def failures_are_logged_as_they_were_answered(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    await world.ask("times out", get("/hang"), due=1.0)
    await world.ask("fine", get("/fine"))
    await world.user.stop()
    world.user.abort()
    await world.ask("refused", get("/refused"))
    await logged(world, 3)


@scenario("3.14")
async def its_own_log_is_JSON_by_line(world: World) -> None:
    world.user.on("/", HELLO)
    await world.user.stop()
    await world.ask("answer", get("/"))
    await world.until(lambda: "error reverse proxying" in world.stderr, "a line about it")
    line = next(line for line in world.stderr.splitlines() if "error reverse proxying" in line)
    said = json.loads(line)
    world.note("keys", sorted(said))
    for key in ("severity", "logger", "knative.dev/key", "knative.dev/pod", "error"):
        world.note(key, said.get(key))
    world.note("message", said["message"].partition(";")[0])


@scenario("3.14", REVISION_TIMEOUT_SECONDS="1")
async def a_timeout_is_a_warning(world: World) -> None:
    world.user.on("/hang", world.user.hang)
    await world.ask("answer", get("/hang"), due=1.0)
    with contextlib.suppress(AssertionError):
        await world.until(lambda: "imeout: 1s" in world.stderr, "a line about it", 1.0)
    lines = [json.loads(line) for line in world.stderr.splitlines() if "imeout: 1s" in line]
    world.note("said", [(line["severity"], line["message"]) for line in lines])


@scenario("3.14", SERVING_LOGGING_LEVEL="error")
async def a_level_of_the_log(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("infos", [line for line in world.stderr.splitlines() if '"INFO"' in line])
