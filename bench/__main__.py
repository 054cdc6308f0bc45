"""`python -m bench [NAME ...] [--seconds S]`: run the benchmarks and print what they found."""

import argparse
import importlib
import json
import platform
import sys

NAMES = ("direct", "loaders", "relay", "start", "idle", "adaptor")


def main() -> int:
    """Exit status 1 when a benchmark could not run here; the others still do."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default all"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each single measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.names:
        if name not in NAMES:
            parser.error(f"no benchmark {name!r}; there are {', '.join(NAMES)}")
    status = 0
    found: dict[str, dict[str, float] | str] = {}
    for name in args.names or NAMES:
        if not args.json:
            print(f"\n{name}", flush=True)
        try:
            found[name] = importlib.import_module(f"bench.{name}").measure(args.seconds)
        except Exception as e:  # noqa: BLE001  a machine without root still measures the others
            found[name] = f"{type(e).__name__}: {e}"
            status = 1
        if not args.json:
            _print(found[name])
    if args.json:
        print(json.dumps({"kernel": platform.release(), **found}, indent=2))
    return status


def _print(found: dict[str, float] | str) -> None:
    """Names of the form `row | column` make tables, with a head wherever the columns change."""
    if isinstance(found, str):
        print(f"  not measured: {found}")
        return
    rows: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        row, bar, column = name.partition(" | ")
        if bar:
            rows.setdefault(row, {})[column] = value
        else:
            print(f"  {name:<48} {value:>12,.2f}")
    columns: list[str] = []
    for row, values in rows.items():
        if list(values) != columns:
            columns = list(values)
            print("  ".join([f"\n  {'':<28}", *columns]))
        cells = (f"{_short(value):>{len(column)}}" for column, value in values.items())
        print("  ".join([f"  {row:<28}", *cells]))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
