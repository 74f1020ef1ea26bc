"""`generate --gpus N`: a process for each GPU of this machine, as torchrun would start them, and one exit code of all."""

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

_HERE, _GRACE = "127.0.0.1", 10.0  # seconds that others have to end by themselves once one was lost


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
        return _waited_for(started, options.csv is not None or options.prompt_path is not None)
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
    told, ended_at = set(), 0.0
    while any(process.is_alive() for process in started):
        time.sleep(0.1)
        for rank, process in enumerate(started):
            if (process.exitcode or 0) < 0 and rank not in told:
                told.add(rank)
                what = "the others take up its rows" if is_rows else "all end"
                say(f"process {rank} of {len(started)} was lost (signal {-process.exitcode}); {what}")
        if not is_rows and any(process.exitcode for process in started):
            ended_at = ended_at or time.monotonic()
            if time.monotonic() - ended_at > _GRACE:
                return SOME_FAILED
    codes = [process.exitcode for process in started]
    if is_rows:
        codes = [code for code in codes if code >= 0] or [SOME_FAILED]
    return next((code for code in codes if code > 0), SOME_FAILED if any(codes) else 0)
