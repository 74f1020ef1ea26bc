"""`generate --gpus N`: a process for each GPU of this machine, as torchrun would start them, and one exit code of all."""

import math
import os
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from ..choices import AUTO
from ..errors import OpenSoraError
from .options import SOME_FAILED, GenerateOptions
from .output import say

_HERE, _GRACE = "127.0.0.1", 10.0  # seconds to end by themselves, once another was lost or all are interrupted


def run(options: GenerateOptions, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Start the processes and wait for them. command: of a module, what each runs with `arguments`; gives its exit code."""
    count, there = options.gpus, torch.cuda.device_count()
    if count < 1 or options.device not in (AUTO, "cuda", "cpu"):
        raise OpenSoraError(f"--gpus {count} with --device {options.device} is not possible; use 1 or more, with --device auto.")
    if options.device != "cpu" and count > there:
        raise OpenSoraError(
            f"--gpus {count} is more than the {there} of this machine; use fewer, or --device cpu, whose CPU so many processes share."
        )
    if options.shard is not None:
        raise OpenSoraError("--shard says which rows are this process's, --gpus shares them out; give one of them.")
    store = dist.TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)
    started = start_processes(_process, (command, arguments, count, store.port), count, join=False, start_method="spawn").processes
    try:
        return _waited_for(started, options.csv is not None)
    except KeyboardInterrupt:  # of the terminal, which all get: they say what is finished, and release what they have claimed
        until = time.monotonic() + _GRACE
        for process in started:
            process.join(max(0.0, until - time.monotonic()))
        raise
    finally:
        for process in started:
            process.terminate()


def _process(rank: int, command: Callable[[Sequence[str]], int], arguments: Sequence[str], count: int, port: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": _HERE, "MASTER_PORT": port}
    own = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the first process keeps the store, not rank 0
    os.environ.update({name: str(value) for name, value in (names | own).items()})
    sys.exit(command(arguments))


def _waited_for(started: Sequence, is_rows: bool) -> int:
    """The exit code of all. is_rows: each works for itself, and goes on with the rows of one that is lost."""
    running, until = dict(enumerate(started)), math.inf
    what = "the others take up its rows" if is_rows else "all end"
    while running:
        if time.monotonic() > until:
            return SOME_FAILED
        time.sleep(0.1)
        for rank in [rank for rank, process in running.items() if not process.is_alive()]:
            code = running.pop(rank).exitcode
            if code < 0:
                say(f"process {rank} of {len(started)} was lost (signal {-code}); {what}")
            if code and not is_rows:
                until = min(until, time.monotonic() + _GRACE)
    codes = [process.exitcode for process in started if process.exitcode >= 0 or not is_rows] or [SOME_FAILED]
    return next((code for code in codes if code > 0), SOME_FAILED if any(codes) else 0)
