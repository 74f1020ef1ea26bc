"""Goldens recorded from the reference (tests/golden/make_golden.py), how far from them a result is, and what pipelines begin."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from opensora_core.pipeline import OpenSoraPipeline

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="session")
def golden_path():
    """The folder of golden files; its *_weights.safetensors hold small random models under the reference's own keys."""
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    """Read a golden: `golden("vae")` -> (tensors by name, metadata with JSON values decoded)."""

    def read(name):
        with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
            metadata = {k: json.loads(v) if v.startswith(("{", "[")) else v for k, v in file.metadata().items()}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata

    return read


@pytest.fixture(scope="session")
def relative_error():
    """Largest absolute difference as a share of the expected tensor's largest value; infinite where anything is not a number."""

    def measure(found, expected):
        assert found.shape == expected.shape, f"{list(found.shape)}, expected {list(expected.shape)}"
        if not torch.isfinite(found).all():
            return float("inf")
        return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

    return measure


@pytest.fixture(scope="session")
def write_hole():
    """Write a safetensors file of any size whose header is real and whose data is a hole: it costs no disk."""

    def write(path, manifest, dtype="BF16"):
        header, end = {}, 0
        for key, shape in manifest.items():
            begin, end = end, end + math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        return path

    return write


@pytest.fixture
def made(monkeypatch) -> list[dict]:
    """The arguments of every video that a pipeline begins, `text` being its prompt's."""
    calls, real = [], OpenSoraPipeline.__call__

    def call(self, prompt, **arguments):
        if not arguments.get("check_only"):
            calls.append({"text": prompt.text, **arguments})
        return real(self, prompt, **arguments)

    monkeypatch.setattr(OpenSoraPipeline, "__call__", call)
    return calls
