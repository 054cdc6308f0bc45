"""How the process starts, and how it refuses to (contract sections 1.1, 1.2 and 1.5)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tests.contract.scenario import Scenario, add, scenario
from tests.contract.world import World
from tests.relay.rig import get

REQUIRED = (
    "CONTAINER_CONCURRENCY",
    "QUEUE_SERVING_PORT",
    "QUEUE_SERVING_TLS_PORT",
    "USER_PORT",
    "REVISION_TIMEOUT_SECONDS",
    "SERVING_LOGGING_CONFIG",
    "SERVING_LOGGING_LEVEL",
    "SERVING_NAMESPACE",
    "SERVING_CONFIGURATION",
    "SERVING_REVISION",
    "SERVING_POD",
    "SERVING_POD_IP",
)
OPTIONAL = (
    "SERVING_SERVICE",
    "REVISION_RESPONSE_START_TIMEOUT_SECONDS",
    "REVISION_IDLE_TIMEOUT_SECONDS",
    "SERVING_READINESS_PROBE",
    "ENABLE_MULTI_CONTAINER_PROBES",
    "ENABLE_HTTP2_AUTO_DETECTION",
    "ENABLE_HTTP_FULL_DUPLEX",
    "SERVING_REQUEST_LOG_TEMPLATE",
    "SERVING_ENABLE_REQUEST_LOG",
    "SERVING_ENABLE_PROBE_REQUEST_LOG",
    "TRACING_CONFIG_BACKEND",
    "TRACING_CONFIG_DEBUG",
    "TRACING_CONFIG_SAMPLE_RATE",
    "TRACING_CONFIG_ZIPKIN_ENDPOINT",
    "METRICS_COLLECTOR_ADDRESS",
    "ENABLE_PROFILING",
    "SYSTEM_NAMESPACE",
    "HOST_IP",
    "ROOT_CA",
)
WORDS = "required key"


async def refuses(world: World) -> None:
    """It exits at once, and says the same about it where the words are the contract's."""
    await world.launch()
    world.note("exit status", await world.exited(20))
    lines = [line for line in world.stderr.splitlines() if WORDS in line]
    world.note("what it says", "".join(line[line.index(WORDS) :] for line in lines))
    world.note("says something", bool(world.stderr.strip()))


async def serves(world: World) -> None:
    """It starts, and a request gets through."""
    await world.launch()
    await world.listens(*world.ports)
    await world.ask("answer", get("/"))


def starts(name: str, play: Callable[[World], Awaitable[None]], **env: str | None) -> None:
    add(Scenario(name, "1.1", play, env, ready=False))


for key in REQUIRED:
    starts(f"without_{key}_it_does_not_start", refuses, **{key: None})
starts("all_optional_variables_may_be_missing", serves, **dict.fromkeys(OPTIONAL))
starts(
    "required_strings_may_be_empty",
    serves,
    SERVING_NAMESPACE="",
    SERVING_CONFIGURATION="",
    SERVING_REVISION="",
    SERVING_POD_IP="",
    SERVING_REQUEST_METRICS_BACKEND="",
)
for value in ("1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"):
    starts(f"a_boolean_may_be_{value}", serves, ENABLE_HTTP_FULL_DUPLEX=value)
for name, value in {"yes": "yes", "on": "on", "tRuE": "tRuE", "2": "2", "a_blank": " "}.items():
    starts(f"a_boolean_may_not_be_{name}", refuses, ENABLE_HTTP_FULL_DUPLEX=value)
starts("a_number_that_is_none", refuses, CONTAINER_CONCURRENCY="many")
starts("a_number_that_is_empty", refuses, REVISION_TIMEOUT_SECONDS="")
starts("an_optional_number_that_is_empty", refuses, REVISION_IDLE_TIMEOUT_SECONDS="")
starts("a_number_with_a_point", refuses, REVISION_TIMEOUT_SECONDS="1.5")
starts("a_number_in_hexadecimal", serves, REVISION_TIMEOUT_SECONDS="0x10")
starts("a_number_with_a_blank", refuses, REVISION_TIMEOUT_SECONDS=" 1")
starts("a_probe_that_is_no_JSON", refuses, SERVING_READINESS_PROBE="{")
starts("a_probe_that_is_a_list", refuses, SERVING_READINESS_PROBE="[{}]")
starts(
    "a_list_of_probes_that_is_none",
    refuses,
    SERVING_READINESS_PROBE="{}",
    ENABLE_MULTI_CONTAINER_PROBES="true",
)
starts("an_unknown_log_level", serves, SERVING_LOGGING_LEVEL="loud")
starts("an_unknown_log_config", serves, SERVING_LOGGING_CONFIG="{")


@scenario("1.5", ready=False)
async def a_data_port_that_is_taken(world: World) -> None:
    await taken(world, 8012)


@scenario("1.5", ready=False)
async def an_admin_port_that_is_taken(world: World) -> None:
    await taken(world, 8022)


@scenario("1.5", ready=False)
async def an_autoscaler_port_that_is_taken(world: World) -> None:
    await taken(world, 9090)


async def taken(world: World, port: int) -> None:
    with world.place.listen(port, "0.0.0.0"):
        await refuses(world)


@scenario("1.5", QUEUE_SERVING_PORT="8013")
async def the_port_of_h2c_revisions_serves_HTTP_1_as_well(world: World) -> None:
    await world.ask("answer", get("/"))
    world.note("listens on 8012", world.place.accepts(8012))
    world.note("listens on 8112", world.place.accepts(8112))
    world.note("listens on 8008", world.place.accepts(8008))


@scenario("1.1", USER_PORT="9999")
async def the_user_port_is_where_requests_go(world: World) -> None:
    await world.user.start(world.place.listen(9999))
    await world.ask("answer", get("/"))
