"""What a process may have, by its own limits: the sentence counts those, and where there is no room to begin it is a sentence too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_core.memory import device, limits
from opensora_core.memory.limits import Limit

CPU = torch.device("cpu")
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]


def files(root, of_process, texts):
    (root / "cgroup").write_text(of_process)
    for name, text in texts.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "sys")
    monkeypatch.setattr(limits, "_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_resource_limits", list)

    def write(of_process, texts):
        files(tmp_path, of_process, {name: str(text) for name, text in texts.items()})
        return limits.limits()

    return write


def test_a_group_of_version_2_and_the_one_it_stands_in(groups):
    found = groups(
        "0::/outer/inner\n",
        {
            "outer/inner/memory.max": "max",
            "outer/inner/memory.current": 10 * MIB,
            "outer/memory.max": 900 * MIB,
            "outer/memory.current": 500 * MIB,
            "outer/memory.stat": f"anon 1\ninactive_file {100 * MIB}\n",
        },
    )
    assert found == [Limit(900 * MIB, 500 * MIB)]


@pytest.mark.parametrize("place", ["memory/docker/abc", "memory"])
def test_a_group_of_version_1_where_the_container_sees_its_own_at_the_root(groups, place):
    found = groups(
        "9:memory:/docker/abc\n8:cpu:/x\n",
        {
            f"{place}/memory.limit_in_bytes": 700 * MIB,
            f"{place}/memory.usage_in_bytes": 600 * MIB,
            f"{place}/memory.stat": "total_inactive_file 0",
        },
    )
    assert found == [Limit(700 * MIB, 100 * MIB)]


@pytest.mark.parametrize("text", ["9223372036854771712", "max", "", "many"])
def test_no_limit_is_none(groups, text):
    assert groups("0::/\n9:memory:/\n", {"memory.max": text, "memory.current": 1, "memory/memory.limit_in_bytes": text}) == []


def test_the_sentence_counts_the_processes_limit(monkeypatch):
    monkeypatch.setattr(device, "limits", lambda: [Limit(2 << 30, 1 << 30)])
    assert device.free_bytes(CPU) == 1 << 30 and device.total_bytes(CPU) == 2 << 30
    sentence = device.ran_out("Sampling", CPU, "make fewer frames")
    assert sentence == (
        "Sampling ran out of memory; this process, which may not have all of the machine, has 1 of 2 GiB free without it: make fewer frames."
    )
    monkeypatch.setattr(device, "limits", list)
    assert "this machine has" in device.ran_out("Sampling", CPU, "make fewer frames")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space as Linux has them")
@pytest.mark.parametrize("megabytes", [150, 300, 600])
def test_too_little_memory_to_begin_is_a_sentence(megabytes, tmp_path):
    import resource

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * MIB, megabytes * MIB))

    made = subprocess.run(
        [sys.executable, "-m", "opensora_core", "generate", "--prompt", "a", "--out", str(tmp_path / "out")],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=limited, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert made.returncode == 2
    assert made.stderr.startswith("error: Give this process more memory (ulimit -v, a container's memory)") and made.stderr.count("\n") == 1


INTERRUPTED_IN_A_FORK = """
import os, signal, subprocess, sys, time
from opensora_core import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a script puts behind it begins with interrupts ignored
os.register_at_fork(before=lambda: signal.raise_signal(signal.SIGINT))
def run(*asked):
    subprocess.run(["true"], preexec_fn=os.setpgrp)
    time.sleep(20)
    return 0
cli.run = run
sys.exit(cli.main(["inspect", "small"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="nothing is forked elsewhere")
def test_an_interrupt_while_the_encoder_is_forked_is_not_lost():
    made = subprocess.run([sys.executable, "-c", INTERRUPTED_IN_A_FORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (made.returncode, made.stderr) == (130, "interrupted\n")
