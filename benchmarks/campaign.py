"""Damaged files through the command line's door, and commands killed at random moments: what must hold, tried many times.

    python -m benchmarks.campaign [--damaged 200] [--kills 40] [--seed 7] [--out FILE]

A damaged file of any kind that is read is one sentence and exit code 2 (or is read, where the damage left it whole), and nothing in it is
executed. After a kill nothing looks whole that is not, and the same command finishes. Long; what is done is kept beside the figures, and the
same command goes on from there. tests/core/test_campaign.py runs a little of it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import save_file

from benchmarks import record
from opensora_core.checkpoint.files import read_header
from opensora_core.cli import main as command_line
from opensora_core.commands.ledger import Ledger
from opensora_core.encoders.tokens import read_tokenizer
from opensora_core.errors import OpenSoraError
from opensora_core.media.latent_file import read_latents
from opensora_core.media.recipe import as_tag
from opensora_core.media.stills import read_image
from opensora_core.media.video import read_clip, save_video
from opensora_core.run import plans
from opensora_core.run.calibrate import _State
from opensora_core.run.files import PLANS, SMALL
from opensora_core.text.prompt_1x import split_settings
from opensora_core.text.recipe import T5

ROOT = Path(__file__).resolve().parents[1]
SIZE = ["--height", "64", "--width", "64", "--num-frames", "5", "--num-steps", "2"]
TABLE = 'prompt,negative,seed,length,width,height,image\n"a red circle, moving",,1,,64,64,\na blue square,"dark ""and"" dull",2,,,,\n'
HEADERS = 10  # so many times as many damaged headers of weights as files of another kind
# What stands in the place of a value of a JSON file.
ODD = (
    None,
    True,
    "x",
    "",
    [],
    {},
    [[]],
    {"a": {}},
    -1,
    0,
    3.5,
    10**30,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "\ud800",
    "a\0b",
    "٣",
    "9" * 5000,
)


class Canary:
    """What a torch file that runs code would run: it writes a file, by which it is seen."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with one to four changes: bytes made others, cut, doubled, or replaced by what readers trip over; or values of its JSON made others."""
    begin = 8 + struct.unpack("<Q", whole[:8])[0] if whole[8:9] == b"{" else len(whole) if whole[:1] == b"{" else 0
    if begin and draw.random() < 0.5:
        text = json.dumps(_changed(json.loads(whole[8 * (begin < len(whole)) : begin]), draw)).encode()
        return text if begin == len(whole) else struct.pack("<Q", len(text)) + text + whole[begin:]
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


def _changed(value, draw: random.Random):
    """A value of JSON with one of those in it made another, or gone."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.05:
        return draw.choice(ODD)
    copy = value.copy()
    place = draw.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if draw.random() < 0.1:
        del copy[place]
    else:
        copy[place] = _changed(copy[place], draw)
    return copy


def _nothing(_) -> None:
    """For what is read by a function: nothing is asked of the command line."""


def _said(name: str, path: str) -> list[str]:
    video = Path(path).with_suffix(".mp4")
    video.write_bytes(tagged(name, Path(path).read_bytes()))
    return ["inspect", str(video), *["--as-command"] * (video.stat().st_size % 2)]


class Kind(NamedTuple):
    """A whole file, its name, and what reads one of them: the command line that is given its path, or a function of that."""

    whole: bytes
    name: str
    read: Callable[[str], list[str] | None]


def kinds(folder: Path) -> dict[str, Kind]:
    """What is damaged; none of it makes a video."""
    lora = {f"single_blocks.0.q_proj.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"} | {
        "single_blocks.0.q_proj.alpha": torch.ones(())
    }
    save_file(lora, folder / "whole.safetensors", {"lora_alpha": "4"})
    save_file(
        {f"blocks.{index}.{name}": torch.zeros(3, 5) for index in range(4) for name in ("weight", "bias")},
        folder / "header.safetensors",
        {"note": "12"},
    )
    save_file({"latent_tensor": torch.zeros(1, 3, 2, 2, 2), "latent_format_version_0": torch.zeros(0)}, folder / "whole.latent")
    torch.save({"a.weight": torch.zeros(4, 4), "b": [1, "two", {"c": Canary(str(folder / "executed"))}]}, folder / "whole.pt")
    torch.save({"state_dict": {"a.weight": torch.zeros(4, 4)}}, folder / "plain.pt")
    _State(folder / "state", "x").keep({"costs.0": torch.zeros(3, 4)})
    recipe = {"settings": {"num_steps": 4}, "files": {"dit": {"name": "a", "bytes": 3}}, "versions": {"opensora_core": "1", "torch": "2"}}
    clip = numpy.zeros((3, 32, 32, 3), numpy.uint8)
    ours = save_video(clip, folder / "whole.mp4", comment=as_tag({"prompt": "a", "seed": 1, "num_frames": 3, **recipe})).read_bytes()
    save_video(clip[:1], folder / "whole.png")
    graph = {
        "1": {"class_type": "OpenSoraT5TextEncode", "inputs": {"prompt": ["2", 0], "fps": 24}},
        "2": {"class_type": "PrimitiveString", "inputs": {"value": "a"}},
    }
    index = {"metadata": {}, "weight_map": {"blocks.0.weight": "header.safetensors", "blocks.0.bias": "whole.safetensors"}}
    entry = {"file": "a.mp4", "bytes": 3, "row": 1, "seed": 2, "settings": {"prompt": "a"}}
    peft = folder / "peft"
    peft.mkdir(exist_ok=True)
    save_file(lora, peft / "adapter_model.safetensors")
    tokens = folder / "tokens"
    tokens.mkdir(exist_ok=True)
    for file in (SMALL / "google/t5-v1_1-xxl").iterdir():
        if file.suffix in (".json", ".model"):
            (tokens / file.name).write_bytes(file.read_bytes())
    plan = next(PLANS.glob("*_t2v_64x64_17.json")).read_bytes()
    subject = plans.Subject(json.loads(plan)["identity"], "t2v", (64, 64), 17)
    out = ["--out", str(folder / "made")]
    refused = ["--num-frames", "2", *out]  # after the file is read, so that a whole one makes nothing either

    return {
        "header": Kind((folder / "header.safetensors").read_bytes(), "h.safetensors", lambda path: ["inspect", path]),
        "index of shards": Kind(json.dumps(index).encode(), "model.safetensors.index.json", lambda path: ["inspect", path]),
        "table": Kind(TABLE.encode(), "a.csv", lambda path: ["generate", "--csv", path, *refused]),
        "latents": Kind((folder / "whole.latent").read_bytes(), "a.latent", lambda path: ["generate", "--decode", path, *out]),
        "code in a torch file": Kind((folder / "whole.pt").read_bytes(), "a.pt", lambda path: ["inspect", path]),
        "torch file": Kind((folder / "plain.pt").read_bytes(), "b.pt", lambda path: ["inspect", path]),
        "LoRA": Kind((folder / "whole.safetensors").read_bytes(), "l.safetensors", lambda path: ["generate", "--prompt", "a", "--lora", path, *refused]),
        "settings of a LoRA": Kind(b'{"lora_alpha": 4, "r": 2, "alpha_pattern": {"q_proj": 3}, "use_rslora": true}', "peft/adapter_config.json",
                                   lambda path: ["generate", "--prompt", "a", "--lora", str(Path(path).parent), *refused]),
        "settings of a tokenizer": Kind((tokens / "tokenizer_config.json").read_bytes() if (tokens / "tokenizer_config.json").exists() else b'{"model_max_length": 96}',
                                        "tokens/tokenizer_config.json", lambda path: _nothing(read_tokenizer(T5, tokens))),
        "plan": Kind(plan, "p.json", lambda path: _nothing(plans.read(Path(path), subject))),
        "half a calibration": Kind((folder / "state").read_bytes(), "c.unfinished", lambda path: _nothing(_State(Path(path), "x"))),
        "record of a batch": Kind(json.dumps({"format": 1, "about": "", "videos": {"a": entry}}).encode(), "ledger/batch.json",
                                  lambda path: _nothing(Ledger(Path(path).parent).finished("a"))),
        **{
            f"recipe in {name}": Kind(json.dumps(said).encode(), f"{name}.json", partial(_said, name))
            for name, said in (("comment", {"program": "opensora_core", "prompt": "a", "seed": 1, "num_frames": 3, **recipe}), ("prompt", graph))
        },
        "video": Kind(ours, "v.mp4", lambda path: ["inspect", path]),
        "recipe": Kind(ours, "r.mp4", lambda path: ["inspect", path, "--as-command"]),
        "clip": Kind(ours, "c.mp4", lambda path: _nothing(read_clip(path, 3, from_end=True))),
        "picture": Kind((folder / "whole.png").read_bytes(), "p.png", lambda path: _nothing(read_image(path))),
        "settings in a prompt": Kind(b'{"reference_path": "a.png", "mask_strategy": "0,0,0,0,1,0"}', "s.txt",
                                     lambda path: _nothing(split_settings(f"a {Path(path).read_text(errors='replace')}"))),
    }  # fmt: skip


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body


def tagged(name: str, text: bytes) -> bytes:
    """An mp4 of no frames that says something by a tag."""
    keys = _box(b"keys", bytes(4) + struct.pack(">I", 1) + _box(b"mdta", name.encode()))
    values = _box(b"ilst", _box(struct.pack(">I", 1), _box(b"data", bytes(8) + text)))
    return _box(b"ftyp", b"isom") + _box(b"moov", _box(b"meta", _box(b"hdlr", bytes(8)) + keys + values))


def outcome(kind: Kind, path: Path) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of reading a file. What reaches a person as a trace is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            asked = kind.read(str(path))
        except OpenSoraError as error:
            return 2, "", f"error: {error}\n"
        code = 0 if asked is None else command_line(asked)
    out.getvalue().encode(), err.getvalue().encode("utf-8", "backslashreplace")
    return code, out.getvalue(), err.getvalue()


def try_damaged(folder: Path, count: int, seed: int, names: list[str] | None = None) -> dict:
    """Figures of `count` damaged files of each kind, or of some. What went wrong is in "faults"."""
    found, faults = {}, []
    for name, kind in kinds(folder).items():
        if names is not None and name not in names:
            continue
        draw, codes = random.Random(f"{seed} {name}"), Counter()
        for number in range(count * HEADERS if name == "header" else count):
            path = folder / kind.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(damaged(kind.whole, draw) if number else kind.whole)
            try:
                code, out, said = outcome(kind, path)
            except BaseException as error:  # noqa: BLE001 - whatever reaches a person as a trace is a fault
                faults.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
                continue
            codes[str(code)] += 1
            # `inspect` ends with 2 for a file that is read and that this pack cannot use: its report says so.
            is_report = code == 2 and not said and 0 < len(out) < 4000
            if code not in (0, 2) or (code == 2 and not is_report and (said.count("error: ") != 1 or len(said) > 4000)):
                faults.append(f"{name} {number}: exit code {code}, {said[-200:]!r}")
        found[name] = dict(codes)
    if (folder / "executed").exists():
        faults.append("code in a torch file ran")
    if (folder / "made").is_dir() and list((folder / "made").glob("*.mp4")):
        faults.append("a video was made")
    return {"exit_codes": found, "faults": faults}


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
    """Figures of `count` tries to kill, the commands in turn. What went wrong is in "faults"."""
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
        took[name] = max(took.get(name, 0.0), time.monotonic() - began)  # it ends at once where the file is there
        if again.returncode != (2 if is_there else 0):
            faults.append(f"kill {number} of {name}: the same command ended with {again.returncode}: {again.stderr[-300:]}")
        faults += [f"after kill {number} of {name}: {wrong}" for wrong in not_whole(own)]
        if left := [path.name for path in own.iterdir() if path.name.endswith((".partial", ".claim"))]:
            faults.append(f"after kill {number} of {name}: left behind {left}")
    return {"kills": dict(killed), "tried": count, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damaged", type=int, default=200, help=f"files of each kind; of headers {HEADERS} times as many")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", help="where the figures go; by default benchmarks/results/")
    args = parser.parse_args()
    kept = Path(args.out or record.RESULTS / "campaign").with_suffix(".unfinished")
    asked = [args.damaged, args.seed]
    done = json.loads(kept.read_text()) if kept.is_file() else {}
    if done.get("asked") != asked:
        done = {"asked": asked, "exit_codes": {}, "faults": [], "kills": {}, "tried": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for name in kinds(Path(scratch)):
            if name not in done["exit_codes"]:
                found = try_damaged(Path(scratch), args.damaged, args.seed, [name])
                done["exit_codes"] |= found["exit_codes"]
                done["faults"] += found["faults"]
                _keep(kept, done)
        while sum(done["kills"].values()) < args.kills and done["tried"] < 3 * args.kills:
            found = try_kills(Path(scratch), 4, random.Random(f"{args.seed} {done['tried']}"))
            done["kills"] = dict(Counter(done["kills"]) + Counter(found["kills"]))
            done["tried"] += found["tried"]
            done["faults"] += found["faults"]
            _keep(kept, done)
    print(record.write("campaign", {name: value for name, value in done.items() if name != "asked"}, args.out))
    kept.unlink()
    sys.exit(bool(done["faults"]))


def _keep(path: Path, done: dict) -> None:
    path.write_text(json.dumps(done))
    print(f"{len(done['exit_codes'])} kinds, {done['tried']} tries to kill, {len(done['faults'])} faults", file=sys.stderr)


if __name__ == "__main__":
    main()
