"""Where cgroup v2 is on this machine. Knows nothing of pods."""

from pathlib import Path


def cgroup2_mount(mounts: Path = Path("/proc/mounts")) -> Path | None:
    """The mount point of the cgroup v2 hierarchy, or None.

    On hybrid machines it is not /sys/fs/cgroup, so it is looked up, never assumed.
    """
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(point.encode().decode("unicode_escape"))
    return None
