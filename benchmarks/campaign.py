"""Damaged files through the command line's door, and commands killed at random moments: what must hold, tried many times.

    python -m benchmarks.campaign [--damaged 200] [--kills 40] [--seed 7] [--out FILE]

A damaged table, .latent, torch or LoRA file is one sentence and exit code 2 (or is read, where the damage left it whole), and nothing in it is
executed. After a kill nothing looks whole that is not, and the same command finishes. Long; tests/core/test_campaign.py runs a little of it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from opensora_core.checkpoint.files import read_header
from opensora_core.cli import main as command_line
from opensora_core.media.latent_file import read_latents
from opensora_core.media.video import read_clip
from opensora_core.run.files import SMALL

ROOT = Path(__file__).resolve().parents[1]
SIZE = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-steps", "2"]
TABLE = 'prompt,negative,seed,length,width,height,image\n"a red circle, moving",,1,,64,64,\na blue square,"dark ""and"" dull",2,,,,\n'


class Canary:
    """What a torch file that runs code would run: it writes a file, by which it is seen."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with one to four changes: bytes made others, cut, doubled, or replaced by what readers trip over."""
    data = bytearray(whole)
    for _ in range(draw.randint(1, 4)):
        where, kind = draw.randrange(max(1, min(len(data), draw.choice((64, 400, 1 << 30))))), draw.random()
        if kind < 0.4:
            data[where : where + 1] = bytes([draw.randrange(256)])
        elif kind < 0.6:
            del data[where : where + draw.randint(1, 40)]
        elif kind < 0.75:
            data[where:where] = data[where : where + draw.randint(1, 40)]
        elif kind < 0.85:
            del data[where:]
        else:
            data[where:where] = draw.choice((b"\0", b"\xed\xa0\x80", b"9" * 5000, "٣²".encode(), b'"', b"[" * 2000, b"-1e400", b"\xff\xfe"))
    return bytes(data)


def kinds(folder: Path) -> dict[str, tuple[bytes, str, Callable[[str], list[str]]]]:
    """{kind: (a whole file, its name, the command line that is given one of them)}; none of them makes a video."""
    lora = {f"single_blocks.0.q_proj.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"} | {
        "single_blocks.0.q_proj.alpha": torch.ones(())
    }
    save_file(lora, folder / "whole.safetensors", {"lora_alpha": "4"})
    save_file({"latent_tensor": torch.zeros(1, 3, 2, 2, 2), "latent_format_version_0": torch.zeros(0)}, folder / "whole.latent")
    torch.save({"a.weight": torch.zeros(4, 4), "b": [1, "two", {"c": Canary(str(folder / "executed"))}]}, folder / "whole.pt")
    torch.save({"state_dict": {"a.weight": torch.zeros(4, 4)}}, folder / "plain.pt")
    out = ["--out", str(folder / "made")]
    refused = ["--num-frames", "2", *out]  # after the file is read, so that a whole one makes nothing either
    return {
        "table": (TABLE.encode(), "a.csv", lambda path: ["generate", "--csv", path, *refused]),
        "latents": ((folder / "whole.latent").read_bytes(), "a.latent", lambda path: ["generate", "--decode", path, *out]),
        "code in a torch file": ((folder / "whole.pt").read_bytes(), "a.pt", lambda path: ["inspect", path]),
        "torch file": ((folder / "plain.pt").read_bytes(), "b.pt", lambda path: ["inspect", path]),
        "LoRA": ((folder / "whole.safetensors").read_bytes(), "l.safetensors", lambda path: ["generate", "--prompt", "a", "--lora", path, *refused]),
    }  # fmt: skip


def try_damaged(folder: Path, count: int, draw: random.Random) -> dict:
    """Figures of `count` damaged files of each kind. What went wrong is in "faults"."""
    found, faults = {}, []
    for kind, (whole, name, asked) in kinds(folder).items():
        codes: Counter[str] = Counter()
        for number in range(count):
            path = folder / name
            path.write_bytes(damaged(whole, draw) if number else whole)
            out, err = io.StringIO(), io.StringIO()
            try:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    code = command_line(asked(str(path)))
            except BaseException as error:  # noqa: BLE001 - whatever reaches a person as a trace is a fault
                faults.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:200]}")
                continue
            codes[str(code)] += 1
            said = err.getvalue()
            # `inspect` ends with 2 for a file that is read and that this pack cannot use: its report says so.
            is_report = code == 2 and not said and 0 < len(out.getvalue()) < 4000
            if code not in (0, 2) or (code == 2 and not is_report and (said.count("error: ") != 1 or len(said) > 4000)):
                faults.append(f"{kind} {number}: exit code {code}, {said[-200:]!r}")
        found[kind] = dict(codes)
    if (folder / "executed").exists():
        faults.append("code in a torch file ran")
    if (folder / "made").is_dir() and list((folder / "made").glob("*.mp4")):
        faults.append("a video was made")
    return {"files": count, "exit_codes": found, "faults": faults}


def commands(folder: Path) -> dict[str, list[str]]:
    """What is killed, by name; each writes into a folder of its own."""
    (folder / "table.csv").write_text("prompt\na red circle\na blue square\n")
    generate = [sys.executable, "-m", "opensora_core", "generate", "--seed", "1", *SIZE]
    return {
        "quantize": [sys.executable, "-m", "opensora_core", "quantize", str(SMALL / "Open_Sora_v2.safetensors"), str(folder / "quantize/q.safetensors")],
        "generate": [*generate, "--prompt", "a red circle", "--num-samples", "2", "--save-latents", "--out", str(folder / "generate")],
        "--csv": [*generate, "--csv", str(folder / "table.csv"), "--out", str(folder / "--csv")],
        "--extend": [*generate, "--prompt", "a red circle", "--extend", "1", "--extend-context", "1", "--out", str(folder / "--extend")],
    }  # fmt: skip


def not_whole(folder: Path) -> list[str]:
    """Files of a folder that look finished by their names and are not."""
    readers = {
        ".mp4": lambda path: read_clip(path, 5, from_end=True),
        ".safetensors": read_header,
        ".latent": read_latents,
        ".json": lambda path: json.loads(path.read_text()),
    }
    wrong = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix not in readers:
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:  # noqa: BLE001 - any of them means that the file is not whole
            wrong.append(f"{path.name}: {error}")
    return wrong


def try_kills(folder: Path, count: int, draw: random.Random) -> dict:
    """Figures of `count` kills, the commands in turn. What went wrong is in "faults"."""
    faults, killed, took = [], Counter(), {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    asked = commands(folder)
    for number in range(count):
        name = list(asked)[number % len(asked)]
        own = folder / name
        own.mkdir(exist_ok=True)
        for path in own.iterdir():
            path.unlink()
        process = subprocess.Popen(asked[name], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.2, took.get(name, 8.0)))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the encoder too
            killed[name] += 1
        process.wait()
        faults += [f"kill {number} of {name}: {wrong}" for wrong in not_whole(own)]
        is_there = name == "quantize" and (own / "q.safetensors").exists()  # finished before the kill: nothing is overwritten
        began = time.monotonic()
        again = subprocess.run(asked[name], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        took[name] = time.monotonic() - began
        if again.returncode != (2 if is_there else 0):
            faults.append(f"kill {number} of {name}: the same command ended with {again.returncode}: {again.stderr[-300:]}")
        faults += [f"after kill {number} of {name}: {wrong}" for wrong in not_whole(own)]
        if left := [path.name for path in own.iterdir() if path.name.endswith((".partial", ".claim"))]:
            faults.append(f"after kill {number} of {name}: left behind {left}")
    return {"kills": dict(killed), "tried": count, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damaged", type=int, default=200, help="files of each kind")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", help="where the figures go; by default benchmarks/results/")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        figures = {"damaged": try_damaged(Path(scratch), args.damaged, draw), "killed": try_kills(Path(scratch), args.kills, draw)}
    from benchmarks import record

    print(record.write("campaign", figures, args.out))
    sys.exit(bool(figures["damaged"]["faults"] or figures["killed"]["faults"]))


if __name__ == "__main__":
    main()
