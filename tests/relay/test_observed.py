"""What the metrics say of requests that went through the relay (contract section 7)."""

import re

import pytest

from tests.relay.rig import Hold, get, ok, post, request
from tests.relay.watched import Start


def scope(name: str, version: str = "") -> str:
    return f'otel_scope_name="{name}",otel_scope_schema_url="",otel_scope_version="{version}"'


OTELHTTP = scope("go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp", "0.72.0")


async def test_a_request_is_in_every_metric_with_the_labels_of_the_queue_proxy(
    watch: Start,
) -> None:
    watched = await watch()
    watched.rig.user.on("/orders", ok(b"hello", status="201 Created"))
    client = await watched.rig.client()
    sent = post("/orders", b"0123456789").replace(b"example.com", b"example.com:8080")
    assert (await client.ask(sent)).status == 201
    await watched.lines()
    server = (
        'http_request_method="POST",http_response_status_code="201",kn_route_tag="kn:disabled",'
        f'network_protocol_name="http",network_protocol_version="1.1",{OTELHTTP},'
        'server_address="example.com",server_port="8080",url_scheme="http"'
    )
    user = (
        'http_request_method="POST",http_response_status_code="201",'
        f'network_protocol_name="http",network_protocol_version="1.1",{OTELHTTP},'
        f'server_address="127.0.0.1",server_port="{watched.rig.user.port}",url_scheme="http"'
    )
    queue = scope("knative.dev/serving/pkg/queue")
    app = f'http_response_status_code="201",{queue}'
    assert watched.counts("http_server_request_duration_seconds_count") == {server: 1}
    assert watched.counts("http_server_request_body_size_bytes_sum") == {server: 10}
    assert watched.counts("http_server_response_body_size_bytes_sum") == {server: 5}
    assert watched.counts("http_client_request_duration_seconds_count") == {user: 1}
    assert watched.counts("http_client_request_body_size_bytes_sum") == {user: 10}
    assert watched.counts("kn_serving_invocation_duration_seconds_count") == {app: 1}
    bucket = "http_server_request_body_size_bytes_bucket"
    edges = [labels.rpartition('le="')[2].rstrip('"') for labels in watched.counts(bucket)]
    assert " ".join(edges) == "0 5 10 25 50 75 100 250 500 750 1000 2500 5000 7500 10000 +Inf"
    assert list(watched.counts(bucket).values()) == [0, 0, *[1] * 14]
    bucket = "kn_serving_invocation_duration_seconds_bucket"
    edges = [labels.rpartition('le="')[2].rstrip('"') for labels in watched.counts(bucket)]
    assert " ".join(edges) == "0.005 0.01 0.025 0.05 0.075 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 +Inf"
    assert watched.counts("kn_serving_queue_depth") == {}


async def test_before_v1_19_a_request_has_the_names_of_opencensus(watch: Start) -> None:
    watched = await watch(container_concurrency=1)
    client = await watched.rig.client()
    tag = "Knative-Serving-Tag: v1"
    assert (await client.get("/", tag, "Knative-Serving-Default-Route: false")).status == 200
    await watched.lines()
    common = (
        'configuration_name="hello",container_name="queue-proxy",namespace_name="default",'
        'pod_name="pod-1",'
    )
    code = 'response_code="200",response_code_class="2xx",revision_name="hello-00001",'
    served = f'{common}{code}route_tag="v1",service_name="hello"'
    app = f'{common}{code}service_name="hello"'
    none = 'response_code="",response_code_class="",revision_name="hello-00001",'
    assert watched.counts("revision_request_count") == {served: 1}
    assert watched.counts("revision_request_latencies_count") == {served: 1}
    assert watched.counts("revision_app_request_count") == {app: 1}
    assert watched.counts("revision_app_request_latencies_count") == {app: 1}
    assert watched.counts("revision_queue_depth") == {f'{common}{none}service_name="hello"': 1}
    edges = re.findall(
        r'latencies_bucket\{.*route_tag.*le="(.*?)"', "\n".join(watched.before.lines())
    )
    assert " ".join(edges) == (
        "5 10 20 40 60 80 100 150 200 250 300 350 400 450 500 600 700 800 900 1000 2000 5000"
        " 10000 20000 50000 100000 +Inf"
    )


@pytest.mark.parametrize(
    ("fields", "current", "before"),
    [
        ([], "kn:disabled", "DISABLED"),
        (["Knative-Serving-Default-Route: true"], "kn:default", "DEFAULT"),
        (
            ["Knative-Serving-Tag: v1", "Knative-Serving-Default-Route: true"],
            "kn:undefined",
            "UNDEFINED",
        ),
        (["Knative-Serving-Tag: v1", "Knative-Serving-Default-Route: false"], "v1", "v1"),
        (["Knative-Serving-Tag: v1"], "v1", "v1"),
        (['Knative-Serving-Tag: a"b\\c'], 'a\\"b\\\\c', 'a\\"b\\\\c'),
    ],
)
async def test_the_route_tag_of_a_request(
    watch: Start, fields: list[str], current: str, before: str
) -> None:
    watched = await watch()
    client = await watched.rig.client()
    await client.get("/", *fields)
    await watched.lines()
    (labels,) = watched.counts("http_server_request_duration_seconds_count")
    assert f'kn_route_tag="{current}",network' in labels
    (labels,) = watched.counts("revision_request_count")
    assert f'route_tag="{before}",service' in labels


@pytest.mark.parametrize(
    ("host", "labels"),
    [
        ("example.com", 'server_address="example.com",url'),
        ("example.com:80", 'server_address="example.com",url'),
        ("EXAMPLE.com:81", 'server_address="EXAMPLE.com",server_port="81",url'),
        ("[::1]:80", 'server_address="::1",url'),
        ("[::1]", 'server_address="::1",url'),
        ("a:b:c", 'server_address="",url'),
    ],
)
async def test_the_server_address_is_the_host_that_was_asked_for(
    watch: Start, host: str, labels: str
) -> None:
    watched = await watch()
    client = await watched.rig.client()
    await client.ask(get().replace(b"example.com", host.encode()))
    await watched.lines()
    (found,) = watched.counts("http_server_request_duration_seconds_count")
    assert labels in found


async def test_by_the_activator_the_server_address_is_the_host_it_wrote(watch: Start) -> None:
    watched = await watch(template="{{.Request.Host}} {{.Request.Header}}")
    client = await watched.rig.client()
    response = await client.get("/", "K-Original-Host: hello.default", "X-Forwarded-For: 1.2.3.4")
    assert b"Host: hello.default" in response.body
    await watched.rig.settled(lambda: bool(watched.said))
    (found,) = watched.counts("http_server_request_duration_seconds_count")
    assert 'server_address="example.com"' in found
    assert watched.said == [
        "example.com map[Forwarded:[for=1.2.3.4] User-Agent:[curl/8] X-Forwarded-For:[1.2.3.4]]\n"
    ]


async def test_an_odd_method_is_other(watch: Start) -> None:
    watched = await watch()
    client = await watched.rig.client()
    for method in ("get", "FOO"):
        assert (await client.ask(request(method, "/"))).status == 200
    await watched.lines(2)
    assert watched.transport("http_request_method") == {"GET": 1, "_OTHER": 1}


async def test_who_makes_up_hosts_and_tags_makes_no_more_than_so_many_series(watch: Start) -> None:
    watched = await watch()
    client = await watched.rig.client()
    for number in range(300):
        host = f"h{number}.example.com" if number % 2 else f"{number}" * 100
        await client.ask(
            get("/", f"Knative-Serving-Tag: t{number}").replace(b"example.com", host.encode())
        )
    await client.get()
    await watched.lines(301)
    series = watched.counts("http_server_request_duration_seconds_count")
    assert sum(series.values()) == 301
    assert len(series) < 100
    assert any('server_address="_OTHER"' in labels for labels in series)
    assert all(len(labels) < 1000 for labels in series)
    assert len(watched.counts("revision_request_count")) <= 33


async def test_the_queue_depth_is_what_ran_or_waited_when_a_request_started(watch: Start) -> None:
    watched = await watch(container_concurrency=1)
    hold = Hold()
    watched.rig.user.on("/hold", hold)

    def depth() -> float:
        (value,) = watched.counts("kn_serving_queue_depth").values()
        return value

    clients = [await watched.rig.client() for _ in range(3)]
    for number, client in enumerate(clients):
        await client.send(get("/hold"))
        await watched.rig.counted(number + 1)
    await watched.rig.settled(lambda: hold.waiting == 1)
    assert depth() == 1  # the others have not started yet
    hold.release()
    assert (await clients[0].response()).status == 200
    await watched.rig.settled(lambda: hold.waiting == 1)
    assert depth() == 2
    hold.release()
    assert (await clients[1].response()).status == 200
    await watched.rig.settled(lambda: hold.waiting == 1)
    assert depth() == 1


# --- probes ------------------------------------------------------------------------------------
PROBES = [
    get("/", "K-Network-Probe: queue").replace(b"curl/8", b"kube-probe/1.30"),
    get("/healthz", "K-Network-Probe: probe", "K-Network-Hash: h"),
    get("/", "K-Network-Probe: queue"),
    get("/", "K-Kubelet-Probe: x"),
]


async def test_probes_are_in_no_metric_but_those_that_the_user_container_saw(watch: Start) -> None:
    watched = await watch()
    client = await watched.rig.client()
    for probe in PROBES:
        assert (await client.ask(probe)).status == 200
    await watched.rig.settled(lambda: sum(watched.transport().values()) == 2)
    assert watched.served() == watched.invocations() == {}
    assert watched.served_before() == watched.app_before() == {}
    assert watched.said == []


async def test_probes_are_logged_when_that_is_asked_for(watch: Start) -> None:
    watched = await watch(probes=True)
    client = await watched.rig.client()
    for probe in PROBES:
        await client.ask(probe)
    lines = [line["httpRequest"] for line in await watched.lines(4)]
    assert [line["userAgent"] for line in lines] == [
        "kube-probe/1.30",
        "curl/8",
        "curl/8",
        "curl/8",
    ]
    assert lines[0]["responseSize"] == "5"
