"""What memory this process may have, which can be less than the machine has: its control groups (v1 and v2) and its own resource limits."""

from pathlib import Path
from typing import NamedTuple

_GROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # v1 writes the largest number of pages where there is none


class Limit(NamedTuple):
    """Bytes that a process may have, and how many of them are left."""

    total: int
    free: int


def limits() -> list[Limit]:
    """Every limit on this process's main memory that is known; empty where there is none, and on systems that do not say."""
    return [limit for limit in (*_control_groups(), *_resource_limits()) if limit is not None]


def _control_groups() -> list[Limit | None]:
    """Limits of the process's control group and of those around it: each limits all that is below it."""
    try:
        lines = [line.split(":", 2) for line in _OF_PROCESS.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    found: list[Limit | None] = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if not controllers:
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.lstrip("/")
        # Inside a container the path may be the machine's, and its own group is mounted at the root.
        found += [_group(folder, *names) for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found


def _group(folder: Path, most: str, used: str, cached: str) -> Limit | None:
    total, taken = _number(folder / most), _number(folder / used)
    if total is None or taken is None or total >= _NO_LIMIT:
        return None
    reclaimed = int(
        proc_fields(folder / "memory.stat", " ").get(cached, 0)
    )  # pages of files, which the system takes away when it needs room
    return Limit(total, max(0, total - max(0, taken - reclaimed)))


def _resource_limits() -> list[Limit | None]:
    """Limits of address space and of data; a mapped file counts as address space."""
    try:
        import resource
    except ImportError:  # not on Windows
        return []
    found, fields = [], proc_fields("self/status")
    for kind, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        total = resource.getrlimit(kind)[0]
        if total != resource.RLIM_INFINITY and field in fields:
            found.append(Limit(total, max(0, total - int(fields[field].split()[0]) * 1024)))
    return found


def proc_fields(name: str | Path, sign: str = ":") -> dict[str, str]:
    """{name: value} of a file of /proc, or of another path, whose lines are "name: value"; {} where there is none. sign: between the two."""
    try:
        lines = (line.split(sign, 1) for line in Path("/proc", name).read_text(errors="replace").splitlines() if sign in line)
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, value in lines}


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
