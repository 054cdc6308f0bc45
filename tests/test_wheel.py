"""The wheel: one package named `weir`, complete, and it works away from the sources."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("*.whl")
    return path


def test_it_claims_no_import_name_but_weir(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"weir"}


def test_it_holds_every_module_and_the_compiled_programs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("proxy", "adaptor", "bpf"):
        for module in (ROOT / folder).rglob("*.py"):
            assert f"weir/{module.relative_to(ROOT)}" in names
    assert "weir/bpf/weir.bpf.o" in names, "not compiled: run make bpf"
    assert "weir/py.typed" in names


def test_an_installed_weir_runs_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"),
            *("--target", str(tmp_path), str(wheel)),
        ],
        check=True,
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import weir.cli, weir.bpf;"
        "print(weir.bpf.__file__); weir.cli.main(['--help'])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))
    assert "weir run" in result.stdout
