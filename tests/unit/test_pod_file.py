"""The agent's static source of pods: what it takes and how it says what is wrong."""

import json
from pathlib import Path

import pytest

from weir.proxy.pod import PodFileError, load_pods


def write(tmp_path: Path, *pods: object) -> Path:
    path = tmp_path / "pods.json"
    path.write_text(json.dumps({"pods": list(pods)}))
    return path


def test_a_pod_needs_a_name_and_a_user_port_and_gets_the_contracts_defaults(tmp_path: Path) -> None:
    (pod,) = load_pods(write(tmp_path, {"name": "hello", "userPort": 8080}))
    assert (pod.data_port, pod.direct_port, pod.netns) == (8012, 8014, None)
    assert pod.settings.user_port == 8080
    assert pod.settings.timeout == 300.0
    assert pod.settings.container_concurrency == 0
    (probe,) = pod.settings.probes
    assert probe.http is None


def test_a_readiness_path_makes_an_http_probe(tmp_path: Path) -> None:
    (pod,) = load_pods(
        write(tmp_path, {"name": "hello", "userPort": 8080, "readinessPath": "/healthz"})
    )
    (probe,) = pod.settings.probes
    assert probe.http is not None
    assert probe.http.path == "/healthz"


def test_a_pod_with_a_hold_says_where_that_is_and_nothing_else(tmp_path: Path) -> None:
    by_pid, by_cgroup = load_pods(
        write(
            tmp_path,
            {"name": "a", "hold": 7, "addresses": ["10.0.0.2"]},
            {"name": "b", "holdCgroup": "/sys/fs/cgroup/b", "cgroup": "/sys/fs/cgroup/b"},
        )
    )
    assert (by_pid.borrowed, by_pid.hold, by_pid.addresses) == (True, 7, ("10.0.0.2",))
    assert by_cgroup.hold_cgroup == by_cgroup.cgroup == Path("/sys/fs/cgroup/b")
    assert by_cgroup.borrowed
    assert not load_pods(write(tmp_path, {"name": "c", "userPort": 1}))[0].borrowed


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ([], ["at least one pod"]),
        (["hello"], ["pods[0]", "expected an object"]),
        ([{"userPort": 8080}], ["number 0", "name is missing"]),
        ([{"name": "hello"}], ["'hello'", "userPort is missing"]),
        ([{"name": "a", "userPort": "8080"}], ["userPort", "expected int", "'8080'"]),
        ([{"name": "a", "userPort": True}], ["userPort", "expected int"]),
        ([{"name": "a", "userPort": 70000}], ["userPort", "70000 is not a port"]),
        ([{"name": "a", "userPort": 1, "usrePort": 2}], ["unknown field 'usrePort'"]),
        ([{"name": "a", "userPort": 1, "netns": "/x"}], ["netns and cgroup go together"]),
        ([{"name": "a", "userPort": 1, "containerConcurrency": -1}], ["containerConcurrency"]),
        ([{"name": "a", "userPort": 1}, {"name": "a", "userPort": 2}], ["two pods", "'a'"]),
        ([{"name": "a", "hold": 1, "userPort": 2}], ["unknown field 'userPort'", "with a hold"]),
        ([{"name": "a", "hold": 1, "holdCgroup": "/x"}], ["hold", "one of them"]),
        ([{"name": "a", "hold": -1}], ["hold", "a pid"]),
        ([{"name": "a", "hold": "1"}], ["hold", "expected int"]),
    ],
)
def test_a_wrong_pod_is_named_with_its_file_and_field(
    tmp_path: Path, pods: list[object], words: list[str]
) -> None:
    path = write(tmp_path, *pods)
    with pytest.raises(PodFileError) as caught:
        load_pods(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_a_missing_file_and_one_that_is_no_json_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(PodFileError, match="No such file"):
        load_pods(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PodFileError, match="not JSON"):
        load_pods(tmp_path / "bad.json")
