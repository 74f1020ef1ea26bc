"""What a person can get wrong about memory is one sentence, in Python and on the command line, and leaves nothing behind."""

import gc

import pytest
import torch

from opensora_core.checkpoint.load import load_transformer
from opensora_core.checkpoint.quantize import quantize
from opensora_core.cli import main
from opensora_core.commands.options import REFUSED
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.memory.loaded import SHARED
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import needs as capacity

DIT = "Open_Sora_v2.safetensors"


@pytest.fixture
def refused(capsys):
    """What a command line says that is refused: one line."""

    def run(*words) -> str:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:  # argparse's way
            code = end.code
        said = capsys.readouterr()
        assert code == REFUSED and said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
        return said.err

    return run


@pytest.fixture(autouse=True)
def nothing_stays_loaded():
    gc.collect()  # what tests of another file loaded and left
    before = SHARED.listing()
    yield
    assert SHARED.listing() == before


@pytest.fixture
def parts(tiny_checkpoint):
    """Words that name a model whose transformer is another file: parts(file)."""
    names = {"--vae": "hunyuan_vae", "--t5": "t5xxl", "--clip": "clip_l"}
    return lambda dit: ["--dit", dit, *(word for flag, stem in names.items() for word in (flag, tiny_checkpoint / f"{stem}.safetensors"))]


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (lambda size: size // 2, "is truncated: [0-9,]+ of [0-9,]+ bytes are missing"),
        (lambda size: size - 1, "is truncated: 1 of"),
        (lambda size: 100, "truncated inside its header"),
        (lambda size: 0, "is empty"),
    ],
    ids=["half", "a byte short", "in its header", "empty"],
)
def test_a_half_written_quantised_file(tiny_checkpoint, tmp_path, parts, refused, cut, says):
    path = tmp_path / "half.safetensors"
    quantize(tiny_checkpoint / DIT, path, "int8")
    path.write_bytes(path.read_bytes()[: cut(path.stat().st_size)])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=says):
        load_transformer(path)
    with pytest.raises(CheckpointError, match=says):
        quantize(path, tmp_path / "again.safetensors")
    for words in (
        ["generate", *parts(path), "--prompt", "x", "--out", tmp_path / "x.mp4"],
        ["inspect", path, "--plan", "--gpu-gib", "8"],
        ["quantize", path, tmp_path / "again.safetensors"],
    ):
        assert "half.safetensors is" in refused(*words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "1e-6", "1e9"])
@pytest.mark.parametrize("total", [None, 16 * 2**30], ids=["this machine", "a card"])
def test_a_budget_that_is_none(tiny_checkpoint, tmp_path, refused, monkeypatch, budget, total):
    if total:
        monkeypatch.setattr(capacity, "total_bytes", lambda device: total)
    says = {"1e-6": "is too small", "1e9": "is larger than the device"}.get(budget, "is not an amount of memory")
    pipe = OpenSoraPipeline.from_pretrained(tiny_checkpoint)
    with pytest.raises(OpenSoraError, match=says):
        pipe.enable_offload("budget", float(budget), "cpu")
    assert pipe.offload == "everything" and pipe.device == torch.device("cpu")  # as it was
    model = ["generate", "--model", tiny_checkpoint, "--prompt", "x", "--out", tmp_path / "x.mp4"]
    assert says in refused(*model, "--offload", "budget", "--budget-gib", budget)
    assert not list(tmp_path.iterdir())


def test_an_unknown_format_or_precision(tiny_checkpoint, tmp_path, refused):
    with pytest.raises(OpenSoraError, match="Use one of fp8_e4m3fn, int8"):
        quantize(tiny_checkpoint / DIT, tmp_path / "x.safetensors", "q4_k")
    assert "fp8_e4m3fn" in refused("quantize", tiny_checkpoint / DIT, tmp_path / "x.safetensors", "--format", "q4_k")
    with pytest.raises(OpenSoraError, match="Use one of auto, fp32, bf16, fp8_e4m3fn, int8, nf4"):
        OpenSoraPipeline.from_pretrained(tiny_checkpoint, precision="q4_k")
    assert "nf4" in refused("generate", "--model", tiny_checkpoint, "--precision", "q4_k", "--prompt", "x", "--out", tmp_path / "x.mp4")
    assert not list(tmp_path.iterdir())
