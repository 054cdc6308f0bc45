"""What a session is subscribed to, remembered across restarts of the adaptor.

The broker keeps the subscriptions of a persistent session and has no way to be asked for them. A
filter that has left the routes file would go on filling the session, and one that was changed
(`plant/#` to `plant/+`) would bring every message twice. So each session's filters are noted in a
file before they are asked for, and what is noted and no longer wanted is unsubscribed.

Owns these files: one per broker and client id. Knows nothing of connections.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("weir.adaptor")


@dataclass(frozen=True, slots=True)
class Known:
    """A session as it was noted. `protocol`: the one that it was last held with."""

    broker: str
    client_id: str
    protocol: str
    filters: frozenset[str]


class Remembered:
    """The filters of one session. A file that can't be read or written costs a warning and no
    message: the adaptor works on, it only can't tidy up after itself."""

    def __init__(self, folder: Path | None, broker: str, client_id: str, protocol: str) -> None:
        """`folder`: where the files are; None remembers nothing beyond this process."""
        self._broker, self._client_id, self._protocol = broker, client_id, protocol
        key = hashlib.sha256(f"{broker}\n{client_id}".encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / f"session-{key}.json"
        known = None if self._path is None else _read(self._path)
        self.filters: frozenset[str] = frozenset() if known is None else known.filters

    def stale(self, wanted: Iterable[str]) -> list[str]:
        """What is noted and not wanted, in a fixed order."""
        return sorted(self.filters - set(wanted))

    def wanting(self, filters: Iterable[str]) -> None:
        """Before SUBSCRIBE: from now on the broker may know these as well."""
        self._note(self.filters | set(filters))

    def holding(self, filters: Iterable[str]) -> None:
        """After SUBACK and UNSUBACK: these and no others."""
        self._note(frozenset(filters))

    def _note(self, filters: frozenset[str]) -> None:
        if filters == self.filters and (self._path is None or self._path.exists()):
            return
        self.filters = filters
        if self._path is None:
            return
        text = json.dumps(
            {
                "broker": self._broker,
                "client_id": self._client_id,
                "protocol": self._protocol,
                "filters": sorted(filters),
            }
        )
        try:
            _write(self._path, text)
        except OSError as error:
            log.warning(
                "can't note the subscriptions of %s in %s: %s; "
                "a filter that you remove later would stay subscribed",
                *(self._client_id, self._path, error),
            )

    def forget(self) -> None:
        """The session has no subscription left."""
        self.filters = frozenset()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def others(folder: Path, broker: str, prefix: str, held: Iterable[str]) -> Iterator[Known]:
    """Sessions of ours on this broker that no sink of the routes uses any more. `prefix`: of our
    client ids; `held`: the ids that are in use."""
    in_use = set(held)
    for path in sorted(folder.glob("session-*.json")):
        known = _read(path)
        if (
            known is not None
            and known.broker == broker
            and known.client_id.startswith(f"{prefix}-")
            and known.client_id not in in_use
        ):
            yield known


def _read(path: Path) -> Known | None:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return Known(
            str(noted["broker"]),
            str(noted["client_id"]),
            str(noted["protocol"]),
            frozenset(str(each) for each in noted["filters"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("can't read the noted subscriptions %s: %r; they are forgotten", path, error)
        return None


def _write(path: Path, text: str) -> None:
    """All of it or nothing, and on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
