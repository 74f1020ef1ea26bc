"""Two thousand damaged weight files, and the particular ones that once hung or passed: each is one sentence, and nothing runs."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opensora_core.checkpoint import files
from opensora_core.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]


def write(path: Path, header, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape=None, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8), "b": entry(12, 16)},
        {"a": entry(0, 8), "b": entry(4, 16)},
        {"a": entry(4, 16)},
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 16, [2, True, 2])},
        {"a": entry(0, 16, [4.0])},
        {"a": entry(0, 16, ["4"])},
        {"a": entry(0, 16, [-2, -2])},
        {"a": entry(0, 16, {"0": 4})},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"a": entry(0, 16, [10**400])},
        {"a": entry(0, 10**30)},
        {"a": [1, 2]},
        {"__metadata__": [1], "a": entry(0, 16)},
        {"__metadata__": {"x": {"y": 1}}, "a": entry(0, 16)},
        [1, 2],
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": \xff\xfe}',
    ],
    ids=range(22),
)
def test_a_header_that_the_format_forbids_is_refused(tmp_path, header):
    path = write(tmp_path / "a.safetensors", header, bytes(16))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(
        CheckpointError, match=r"^(Download|Fetch|Delete|Take)[^.:]*[.:] (The header of |the header of )?a\.safetensors|^a\.safetensors"
    ):
        files.read_header(path)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """A file with one to four changes: bytes flipped, cut, doubled, or a number of the header made another."""
    data = bytearray(whole)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(header_end) if draw.random() < 0.9 else draw.randrange(len(data))
        kind = draw.random()
        if kind < 0.5:
            data[min(where, len(data) - 1)] = draw.randrange(256)
        elif kind < 0.7:
            del data[where : where + draw.randint(1, 40)]
        elif kind < 0.85:
            data[where:where] = data[where : where + draw.randint(1, 40)]
        else:
            digits = [index for index in range(8, min(header_end, len(data))) if chr(data[index]).isdigit()]
            if digits:
                data[draw.choice(digits)] = ord(draw.choice("0123456789-."))
    return bytes(data)


def test_two_thousand_damaged_files_are_read_as_the_format_reads_them_or_refused(tmp_path):
    draw = random.Random(7)
    tensors = {f"blocks.{index}.{name}": torch.zeros(3, 5) for index in range(4) for name in ("weight", "bias")}
    save_file(tensors, tmp_path / "whole.safetensors", {"format": "pt", "note": "12"})
    whole, path, refused = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "damaged.safetensors", 0
    for number in range(2000):
        path.write_bytes(damaged(whole, draw))
        try:
            header = files.read_header(path)
        except CheckpointError as error:
            refused += 1
            assert len(str(error)) < 500, number
            continue
        with safe_open(path, "pt") as opened:
            assert set(opened.keys()) == set(header.tensors), number
    assert 1500 < refused < 2000


def test_a_dictionary_that_holds_itself_is_looked_into_once(tmp_path):
    state: dict = {}
    state["model"] = state
    torch.save(state, tmp_path / "circle.pt")
    with pytest.raises(CheckpointError, match=r"circle\.pt is a torch file without named tensors"):
        files.read_header(tmp_path / "circle.pt")
    pair: dict = {"ema": {}}
    pair["ema"]["state_dict"] = pair
    torch.save(pair, tmp_path / "pair.pt")
    with pytest.raises(CheckpointError, match="without named tensors"):
        files.read_header(tmp_path / "pair.pt")


def test_keys_that_are_not_text_are_no_tensors(tmp_path):
    torch.save({1: torch.zeros(2), ("a",): torch.zeros(2)}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="without named tensors"):
        files.read_header(tmp_path / "numbers.pt")
    torch.save({1: torch.zeros(2), "a": torch.zeros(3)}, tmp_path / "both.pt")
    assert list(files.read_header(tmp_path / "both.pt").tensors) == ["a"]


@pytest.mark.parametrize("version", ["2.4.0", "2.9.1+cu128", "1.13"])
def test_a_torch_whose_guard_leaks_reads_no_torch_file(tmp_path, monkeypatch, version):
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(CheckpointError, match=rf"safetensors: a\.pt is a torch file.*torch 2\.10 or newer, and this is {version[:5]}"):
        files.read_header(tmp_path / "a.pt")


def test_a_block_index_of_twenty_digits_ends_at_once(tmp_path, tiny_checkpoint):
    header = files.read_header(tiny_checkpoint / "Open_Sora_v2.safetensors")
    state = {key: torch.zeros(info.shape) for key, info in header.tensors.items()}
    state["double_blocks.99999999999999999999.img_attn.q_proj.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "many.safetensors")
    run = subprocess.run([sys.executable, "-m", "opensora_core", "inspect", tmp_path / "many.safetensors"], cwd=ROOT, capture_output=True,
                         text=True, timeout=120)  # fmt: skip
    assert "Traceback" not in run.stderr and "double_blocks.99999" in run.stdout + run.stderr
