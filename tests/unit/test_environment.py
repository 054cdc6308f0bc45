"""A sidecar's variables (contract section 1.1, 1.3, 1.4), read as the queue-proxy reads them."""

import json
import subprocess
import sys

import pytest

from weir.proxy.contract import Probe
from weir.proxy.environment import (
    DEFAULT_REQUEST_LOG_TEMPLATE,
    EnvironmentFault,
    Observability,
    PrometheusServer,
    RequestLog,
    RequestMetrics,
    Tracing,
    read_environment,
)
from weir.proxy.tls_settings import TlsSettings

REQUIRED = {
    "CONTAINER_CONCURRENCY": "0",
    "QUEUE_SERVING_PORT": "8012",
    "QUEUE_SERVING_TLS_PORT": "8112",
    "USER_PORT": "8080",
    "REVISION_TIMEOUT_SECONDS": "300",
    "SERVING_LOGGING_CONFIG": "",
    "SERVING_LOGGING_LEVEL": "",
    "SERVING_NAMESPACE": "default",
    "SERVING_CONFIGURATION": "",
    "SERVING_REVISION": "hello-00001",
    "SERVING_POD": "hello-00001-deployment-7f79c74b9c-rhtfx",
    "SERVING_POD_IP": "10.244.0.17",
}
"""In the order in which the queue-proxy misses them."""


def fault(**variables: str) -> str:
    with pytest.raises(EnvironmentFault) as caught:
        read_environment({**REQUIRED, **variables})
    return str(caught.value)


def test_the_required_variables_are_enough() -> None:
    settings = read_environment(REQUIRED)
    assert (settings.data_port, settings.tls_port) == (8012, 8112)
    assert settings.pod_ip == "10.244.0.17"
    revision = settings.revision
    assert revision.pod == "hello-00001-deployment-7f79c74b9c-rhtfx"
    assert (revision.namespace, revision.revision) == ("default", "hello-00001")
    assert (revision.service, revision.configuration) == ("", "")
    assert (revision.user_host, revision.user_port) == ("127.0.0.1", 8080)
    assert revision.container_concurrency == 0
    assert revision.timeout == 300.0
    assert (revision.response_start_timeout, revision.idle_timeout) == (0.0, 0.0)
    assert revision.probes == ()
    assert not settings.full_duplex
    assert not settings.http2_auto_detection
    assert not settings.multi_container_probes
    assert settings.tls == TlsSettings(min_version="1.3")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_variable_that_is_missing_is_named(name: str) -> None:
    with pytest.raises(EnvironmentFault, match=f"^required key {name} missing value$"):
        read_environment({key: value for key, value in REQUIRED.items() if key != name})


def test_of_several_missing_variables_the_first_is_named() -> None:
    left = dict(REQUIRED)
    for name in REQUIRED:
        with pytest.raises(EnvironmentFault, match=f"required key {name} "):
            read_environment({key: value for key, value in REQUIRED.items() if key not in left})
        del left[name]


@pytest.mark.parametrize(
    "name", ["SERVING_NAMESPACE", "SERVING_REVISION", "SERVING_POD", "SERVING_POD_IP"]
)
def test_a_required_string_may_be_empty(name: str) -> None:
    read_environment({**REQUIRED, name: ""})


@pytest.mark.parametrize(
    "name",
    [
        "CONTAINER_CONCURRENCY",
        "REVISION_TIMEOUT_SECONDS",
        "REVISION_RESPONSE_START_TIMEOUT_SECONDS",
        "REVISION_IDLE_TIMEOUT_SECONDS",
        "SERVING_REQUEST_METRICS_REPORTING_PERIOD_SECONDS",
        "ENABLE_HTTP_FULL_DUPLEX",
        "ENABLE_HTTP2_AUTO_DETECTION",
        "ENABLE_MULTI_CONTAINER_PROBES",
        "ENABLE_PROFILING",
        "SERVING_ENABLE_REQUEST_LOG",
        "SERVING_ENABLE_PROBE_REQUEST_LOG",
        "TRACING_CONFIG_DEBUG",
        "TRACING_CONFIG_SAMPLE_RATE",
    ],
)
def test_an_empty_number_or_boolean_is_a_fault(name: str) -> None:
    assert fault(**{name: ""}).startswith(f"{name}: ''")


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", 7), ("+7", 7), ("0x1F", 31), ("017", 15), ("0o17", 15), ("0b101", 5), ("1_000", 1000)],
)
def test_integers_are_written_as_in_go(text: str, number: int) -> None:
    settings = read_environment({**REQUIRED, "CONTAINER_CONCURRENCY": text})
    assert settings.revision.container_concurrency == number


@pytest.mark.parametrize(
    "text", [" 7", "7 ", "7.0", "1e3", "ten", "08", "1__0", "_1", "9223372036854775808", "٣"]
)
def test_what_go_takes_for_no_integer_is_a_fault(text: str) -> None:
    assert fault(REVISION_TIMEOUT_SECONDS=text) == (
        f"REVISION_TIMEOUT_SECONDS: {text!r} is not an integer"
    )


def test_negative_limits_are_a_fault() -> None:
    assert "0 or more" in fault(CONTAINER_CONCURRENCY="-1")
    assert "0 or more" in fault(REVISION_TIMEOUT_SECONDS="-1")


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_true_is_written_in_six_ways(text: str) -> None:
    assert read_environment({**REQUIRED, "ENABLE_HTTP_FULL_DUPLEX": text}).full_duplex


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_false_is_written_in_six_ways(text: str) -> None:
    assert not read_environment({**REQUIRED, "ENABLE_HTTP_FULL_DUPLEX": text}).full_duplex


@pytest.mark.parametrize("text", ["yes", "on", "tRUE", " true", "2"])
def test_other_booleans_are_a_fault_that_lists_what_is_allowed(text: str) -> None:
    message = fault(ENABLE_HTTP_FULL_DUPLEX=text)
    assert message.startswith(f"ENABLE_HTTP_FULL_DUPLEX: {text!r} is not a boolean")
    assert message.endswith("1 t T TRUE true True 0 f F FALSE false False")


@pytest.mark.parametrize("name", ["QUEUE_SERVING_PORT", "QUEUE_SERVING_TLS_PORT", "USER_PORT"])
@pytest.mark.parametrize("text", ["", "0", "65536", "http", "-1", " 80"])
def test_a_port_is_a_number_from_1_to_65535(name: str, text: str) -> None:
    assert fault(**{name: text}) == f"{name}: {text!r} is not a port; 1 to 65535 is allowed"


def test_the_revision_is_read_whole() -> None:
    settings = read_environment(
        {
            **REQUIRED,
            "SERVING_SERVICE": "hello",
            "SERVING_CONFIGURATION": "hello",
            "CONTAINER_CONCURRENCY": "10",
            "REVISION_TIMEOUT_SECONDS": "45",
            "REVISION_RESPONSE_START_TIMEOUT_SECONDS": "30",
            "REVISION_IDLE_TIMEOUT_SECONDS": "5",
            "QUEUE_SERVING_PORT": "8013",
            "SERVING_LOGGING_CONFIG": '{"level": "info"}',
            "SERVING_LOGGING_LEVEL": "debug",
            "SYSTEM_NAMESPACE": "knative-serving",
            "HOST_IP": "192.0.2.4",
            "ROOT_CA": "-----BEGIN CERTIFICATE-----",
        }
    )
    revision = settings.revision
    assert (revision.service, revision.configuration) == ("hello", "hello")
    assert revision.container_concurrency == 10
    timeouts = (revision.timeout, revision.response_start_timeout, revision.idle_timeout)
    assert timeouts == (45.0, 30.0, 5.0)
    assert settings.data_port == 8013
    assert (settings.logging.config, settings.logging.level) == ('{"level": "info"}', "debug")
    assert settings.system_namespace == "knative-serving"
    assert settings.host_ip == "192.0.2.4"
    assert settings.root_ca.startswith("-----BEGIN")


def test_an_empty_readiness_probe_is_none() -> None:
    assert read_environment({**REQUIRED, "SERVING_READINESS_PROBE": ""}).revision.probes == ()


def test_a_readiness_probe_is_parsed_with_the_flags_that_concern_it() -> None:
    probe = '{"tcpSocket":{"port":8080,"host":"127.0.0.1"},"successThreshold":1}'
    settings = read_environment({**REQUIRED, "SERVING_READINESS_PROBE": probe})
    assert settings.revision.probes == (Probe(port=8080),)
    several = f'[{probe}, {{"httpGet": {{"port": 9000}}}}]'
    settings = read_environment(
        {
            **REQUIRED,
            "SERVING_READINESS_PROBE": several,
            "ENABLE_MULTI_CONTAINER_PROBES": "true",
            "ENABLE_HTTP2_AUTO_DETECTION": "true",
        }
    )
    first, second = settings.revision.probes
    assert first == Probe(port=8080)
    assert second.http is not None and second.http.detect_http2


def test_a_broken_readiness_probe_names_the_variable_and_the_field() -> None:
    assert fault(SERVING_READINESS_PROBE="{").startswith("SERVING_READINESS_PROBE: not JSON")
    broken = '{"httpGet": {"port": true}}'
    assert fault(SERVING_READINESS_PROBE=broken).startswith("SERVING_READINESS_PROBE: httpGet.port")


class TestObservability:
    """OBSERVABILITY_CONFIG, v1.19 and later."""

    def test_the_controllers_default_switches_everything_off(self) -> None:
        config = (
            '{"tracing":{"protocol":"none"},"metrics":{"protocol":"none"},"runtime":{"profiling":'
            '"disabled","exportInterval":15000000000},"requestMetrics":{"protocol":"none"},'
            '"requestLogTemplate":"x"}'
        )
        seen = read_environment({**REQUIRED, "OBSERVABILITY_CONFIG": config}).observability
        assert seen.names == "current"
        assert seen.request_metrics == RequestMetrics()
        assert seen.tracing == Tracing()
        assert seen.request_log == RequestLog(enabled=False, template="x", probes=False)
        assert not seen.profiling
        assert seen.runtime_interval == 15.0

    def test_everything_can_be_switched_on(self) -> None:
        config = {
            "requestMetrics": {
                "protocol": "http/protobuf",
                "endpoint": "http://collector:4318",
                "exportInterval": 30_000_000_000,
            },
            "metrics": {"protocol": "the control plane's"},
            "tracing": {"protocol": "grpc", "endpoint": "collector:4317", "samplingRate": 0.25},
            "runtime": {"profiling": "enabled", "exportInterval": 1_500_000_000},
            "enableRequestLog": True,
            "requestLogTemplate": "{{.TraceID}}",
            "enableProbeRequestLog": True,
            "EnableVarLogCollection": True,
            "LoggingURLTemplate": "http://logs",
        }
        env = {**REQUIRED, "OBSERVABILITY_CONFIG": json.dumps(config)}
        seen = read_environment(env).observability
        assert seen.request_metrics == RequestMetrics(
            protocol="http/protobuf", endpoint="http://collector:4318", interval=30.0
        )
        assert seen.tracing == Tracing("grpc", "collector:4317", 0.25)
        assert seen.request_log == RequestLog(True, "{{.TraceID}}", True)
        assert seen.profiling
        assert seen.runtime_interval == 1.5

    def test_without_a_template_the_default_one_holds_and_an_empty_one_stays_empty(self) -> None:
        env = {**REQUIRED, "OBSERVABILITY_CONFIG": "{}"}
        log = read_environment(env).observability.request_log
        assert log.template == DEFAULT_REQUEST_LOG_TEMPLATE
        env["OBSERVABILITY_CONFIG"] = '{"requestLogTemplate": ""}'
        assert read_environment(env).observability.request_log.template == ""

    def test_the_default_template_is_json_once_its_actions_are_filled(self) -> None:
        filled = DEFAULT_REQUEST_LOG_TEMPLATE.replace("{{.Response.Code}}", "200")
        logged = json.loads(filled)
        assert list(logged["httpRequest"]) == [
            "requestMethod",
            "requestUrl",
            "requestSize",
            "status",
            "responseSize",
            "userAgent",
            "remoteIp",
            "serverIp",
            "referer",
            "latency",
            "protocol",
        ]
        assert logged["httpRequest"]["status"] == 200
        assert logged["traceId"] == "{{.TraceID}}"

    def test_it_puts_the_older_variables_out_of_use(self) -> None:
        env = {
            **REQUIRED,
            "OBSERVABILITY_CONFIG": "{}",
            "SERVING_REQUEST_METRICS_BACKEND": "prometheus",
            "ENABLE_PROFILING": "true",
        }
        seen = read_environment(env).observability
        assert seen.request_metrics.protocol == "none"
        assert not seen.profiling

    @pytest.mark.parametrize("text", ["null", '{"tracing": null, "enableRequestLog": null}'])
    def test_null_is_as_good_as_absent(self, text: str) -> None:
        seen = read_environment({**REQUIRED, "OBSERVABILITY_CONFIG": text}).observability
        assert seen.tracing == Tracing()

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ("{", "not JSON"),
            ("[]", "document: expected an object, got an array"),
            ('{"tracing": 1}', "tracing: expected an object, got a number"),
            ('{"tracing": {"samplingRate": 1.5}}', "tracing.samplingRate: 1.5"),
            ('{"tracing": {"samplingRate": "1"}}', "tracing.samplingRate: expected a number"),
            ('{"tracing": {"protocol": "zipkin"}}', "none, stdout, grpc, http/protobuf"),
            ('{"requestMetrics": {"protocol": "otlp"}}', "requestMetrics.protocol: 'otlp'"),
            ('{"requestMetrics": {"exportInterval": "30s"}}', "requestMetrics.exportInterval"),
            ('{"requestMetrics": {"exportInterval": -1}}', "0 or more nanoseconds"),
            ('{"runtime": {"profiling": "on"}}', "runtime.profiling: 'on'"),
            ('{"enableRequestLog": "true"}', "enableRequestLog: expected a boolean"),
            ('{"requestLogTemplate": 1}', "requestLogTemplate: expected a string"),
            ('{"tracing": {"samplingRate": NaN}}', "NaN"),
        ],
    )
    def test_a_bad_field_is_named_with_its_path(self, config: str, words: str) -> None:
        message = fault(OBSERVABILITY_CONFIG=config)
        assert message.startswith("OBSERVABILITY_CONFIG: ")
        assert words in message

    def test_the_image_may_say_where_and_as_whom_it_is_seen(self) -> None:
        env = {
            **REQUIRED,
            "SERVING_SERVICE": "hello",
            "HOSTNAME": "pod-by-hostname",
            "METRICS_PROMETHEUS_HOST": "127.0.0.1",
            "METRICS_PROMETHEUS_PORT": "9999",
            "METRICS_PROMETHEUS_TLS_CERT": "/c",
            "METRICS_PROMETHEUS_TLS_KEY": "/k",
            "METRICS_PROMETHEUS_TLS_MIN_VERSION": "1.2",
            "PROFILING_PORT": "8009",
        }
        seen = read_environment(env).observability
        tls = TlsSettings("1.2")
        assert seen.prometheus == PrometheusServer("127.0.0.1", "9999", "/c", "/k", tls=tls)
        assert seen.prometheus.secured()
        assert seen.profiling_port == 8009
        assert (seen.service_name, seen.pod_name) == ("hello", "pod-by-hostname")
        named = {**env, "OTEL_SERVICE_NAME": "mine", "POD_NAME": "pod-by-name"}
        seen = read_environment(named).observability
        assert (seen.service_name, seen.pod_name) == ("mine", "pod-by-name")


class TestObservabilityBeforeV119:
    """Without OBSERVABILITY_CONFIG the names of the releases before hold."""

    def test_without_any_of_them_nothing_is_measured_or_logged(self) -> None:
        seen = read_environment(REQUIRED).observability
        assert seen.names == "opencensus"
        assert seen.request_metrics.protocol == "none"
        assert seen.tracing.protocol == "none"
        assert seen.request_log == RequestLog()

    def test_all_of_them_are_read(self) -> None:
        env = {
            **REQUIRED,
            "SERVING_REQUEST_METRICS_BACKEND": "prometheus",
            "SERVING_REQUEST_METRICS_REPORTING_PERIOD_SECONDS": "5",
            "METRICS_COLLECTOR_ADDRESS": "collector:55678",
            "METRICS_DOMAIN": "knative.dev/internal/serving",
            "SERVING_REQUEST_LOG_TEMPLATE": "{{.Request.Method}}",
            "SERVING_ENABLE_REQUEST_LOG": "true",
            "SERVING_ENABLE_PROBE_REQUEST_LOG": "1",
            "ENABLE_PROFILING": "t",
            "TRACING_CONFIG_BACKEND": "zipkin",
            "TRACING_CONFIG_ZIPKIN_ENDPOINT": "http://zipkin:9411/api/v2/spans",
            "TRACING_CONFIG_DEBUG": "true",
            "TRACING_CONFIG_SAMPLE_RATE": "0.1",
        }
        seen = read_environment(env).observability
        assert seen.request_metrics == RequestMetrics(
            "prometheus", "collector:55678", 5.0, "knative.dev/internal/serving"
        )
        assert seen.tracing == Tracing("zipkin", "http://zipkin:9411/api/v2/spans", 0.1, debug=True)
        assert seen.request_log == RequestLog(True, "{{.Request.Method}}", True)
        assert seen.profiling

    @pytest.mark.parametrize("text", ["1.1", "-0.1", "much", "nan", " 0.5"])
    def test_the_sample_rate_is_a_number_from_0_to_1(self, text: str) -> None:
        assert fault(TRACING_CONFIG_SAMPLE_RATE=text).startswith("TRACING_CONFIG_SAMPLE_RATE: ")


class TestTls:
    """QUEUE_PROXY_TLS_*, v1.21 and later."""

    def test_empty_is_the_default(self) -> None:
        names = ("MIN_VERSION", "MAX_VERSION", "CIPHER_SUITES", "CURVE_PREFERENCES")
        env = {**REQUIRED, **{f"QUEUE_PROXY_TLS_{name}": "" for name in names}}
        assert read_environment(env).tls == TlsSettings("1.3", "", (), ())

    def test_suites_and_curves_keep_their_order_and_get_openssls_names(self) -> None:
        env = {
            **REQUIRED,
            "QUEUE_PROXY_TLS_MIN_VERSION": "1.2",
            "QUEUE_PROXY_TLS_MAX_VERSION": "1.3",
            "QUEUE_PROXY_TLS_CIPHER_SUITES": (
                " TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 ,, TLS_AES_128_GCM_SHA256,"
                "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
            ),
            "QUEUE_PROXY_TLS_CURVE_PREFERENCES": "CurveP384, X25519MLKEM768 ,P-256,CurveP256",
        }
        assert read_environment(env).tls == TlsSettings(
            "1.2",
            "1.3",
            ("ECDHE-RSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES256-GCM-SHA384"),
            ("P-384", "X25519MLKEM768", "P-256"),
        )

    @pytest.mark.parametrize(
        ("name", "value", "allowed"),
        [
            ("MIN_VERSION", "1.1", "1.2, 1.3"),
            ("MAX_VERSION", "1.3 ", "1.2, 1.3"),
            ("CIPHER_SUITES", "TLS_RSA_WITH_RC4_128_SHA", "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"),
            ("CURVE_PREFERENCES", "P-128", "X25519MLKEM768"),
        ],
    )
    def test_an_unknown_value_is_named_with_what_is_allowed(
        self, name: str, value: str, allowed: str
    ) -> None:
        message = fault(**{f"QUEUE_PROXY_TLS_{name}": value})
        assert message.startswith(f"QUEUE_PROXY_TLS_{name}: {value!r} is unknown; allowed: ")
        assert allowed in message

    def test_a_ceiling_below_the_floor_is_a_fault(self) -> None:
        assert "below" in fault(QUEUE_PROXY_TLS_MAX_VERSION="1.2")


def test_settings_are_values() -> None:
    one, two = read_environment(REQUIRED), read_environment(dict(REQUIRED))
    assert one == two
    assert one._replace(pod_ip="::1") != two


def test_reading_the_environment_imports_nothing_heavy() -> None:
    code = (
        "import sys, weir.proxy.environment;"
        "print(sorted({'ssl', 'yaml', 'pydantic', 'asyncio', 'logging'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("endpoint", "host", "port", "expected"),
    [
        ("", "", "", ("", 9091)),
        (":9999", "", "", ("", 9999)),
        ("127.0.0.1:9999", "", "", ("127.0.0.1", 9999)),
        ("[::1]:9999", "", "", ("::1", 9999)),
        ("", "127.0.0.1", "", ("127.0.0.1", 9091)),
        ("", "", "9092", ("", 9092)),
    ],
)
def test_the_metrics_port_is_where_the_endpoint_or_the_image_says(
    endpoint: str, host: str, port: str, expected: tuple[str, int]
) -> None:
    observability = Observability(
        request_metrics=RequestMetrics("prometheus", endpoint),
        prometheus=PrometheusServer(host, port),
    )
    assert observability.metrics_address() == expected


@pytest.mark.parametrize("endpoint", ["nowhere", "host:port", "host:0", "host:70000"])
def test_a_metrics_endpoint_that_is_no_address_is_named(endpoint: str) -> None:
    observability = Observability(request_metrics=RequestMetrics("prometheus", endpoint))
    with pytest.raises(ValueError, match=endpoint):
        observability.metrics_address()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tls_cert": "/c"}, "only one is set"),
        ({"tls_key": "/k"}, "only one is set"),
        ({"tls_client_auth": "require"}, "without METRICS_PROMETHEUS_TLS_CERT"),
        ({"tls_client_ca_file": "/ca"}, "without METRICS_PROMETHEUS_TLS_CERT"),
        ({"tls_cert": "/c", "tls_key": "/k", "tls_client_auth": "always"}, "'always' is none of"),
        (
            {"tls_cert": "/c", "tls_key": "/k", "tls_client_auth": "optional"},
            "no METRICS_PROMETHEUS_TLS_CLIENT_CA_FILE is set",
        ),
    ],
)
def test_half_of_tls_for_the_metrics_is_named(asked: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrometheusServer(**asked).secured()  # type: ignore[arg-type]


def test_metrics_go_without_tls_unless_it_is_asked_for() -> None:
    assert not PrometheusServer().secured()
    assert not PrometheusServer(tls_client_auth="none").secured()
