"""A little of benchmarks/campaign.py, and the particular inputs that once reached a person as a trace."""

import inspect
import os
import random
import shutil
import stat
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import campaign
from opensora_core.checkpoint.load import load_transformer
from opensora_core.cli import main
from opensora_core.encoders.tokens import read_tokenizer
from opensora_core.errors import CheckpointError, OpenSoraError
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.files import SMALL
from opensora_core.run.request import SamplingOptions
from opensora_core.text.recipe import CLIP, T5

ROOT = Path(__file__).resolve().parents[2]


def test_damaged_files_of_every_kind_are_one_sentence_each_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "HEADERS", 1)
    figures = campaign.try_damaged(tmp_path, 40, 3)
    assert figures["faults"] == []
    assert len(figures["exit_codes"]) >= 19
    assert all(codes.get("2", 0) > 15 for codes in figures["exit_codes"].values()), figures["exit_codes"]


def test_the_canary_would_sing(tmp_path):
    torch.save({"a": campaign.Canary(str(tmp_path / "executed"))}, tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.skipif(os.name != "posix", reason="kills a group of processes")
def test_after_kills_nothing_looks_whole_that_is_not(tmp_path):
    assert campaign.try_kills(tmp_path, 4, random.Random(5))["faults"] == []


PARTS = {
    "dit": SMALL / "Open_Sora_v2.safetensors",
    "vae": SMALL / "hunyuan_vae.safetensors",
    "t5": SMALL / "google/t5-v1_1-xxl",
    "clip": SMALL / "openai/clip-vit-large-patch14",
}
GENERATE = ["generate", "--prompt", "a", "--num-frames", "2"]  # 2 is no length, so that nothing is made
PATHS = {
    "model": lambda path: [*GENERATE, f"--model={path}"],
    "tokenizers": lambda path: [*GENERATE, f"--tokenizers={path}"],
    "lora": lambda path: [*GENERATE, f"--lora={path}"],
    "ref": lambda path: ["generate", "--prompt", "a", f"--ref={path}"],
    "ref_end": lambda path: ["generate", "--prompt", "a", f"--ref-end={path}"],
    "extend_from": lambda path: ["generate", "--prompt", "a", "--extend", "1", f"--extend-from={path}"],
    "csv": lambda path: ["generate", f"--csv={path}"],
    "prompt_path": lambda path: ["generate", f"--prompt-path={path}"],
    "refine_model": lambda path: [*GENERATE, "--refine-prompt", f"--refine-model={path}"],
    "plans": lambda path: [*GENERATE, f"--plans={path}"],
    "reference_path": lambda path: ["generate", "--prompt", "a", f"--reference-path={path}"],
    "decode": lambda path: ["generate", f"--decode={path}"],
    "inspect": lambda path: ["inspect", path],
    "quantize": lambda path: ["quantize", path, "q.safetensors"],
    **{
        part: lambda path, part=part: [*GENERATE, *(f"--{other}={path if other == part else file}" for other, file in PARTS.items())]
        for part in PARTS
    },
}


@pytest.mark.parametrize("given", ["/dev/zero", "/dev/null", "fifo", "a\0b", "a\udcffb", "a\ud800b", "x" * 5000, "", "nothing here"])
def test_no_path_that_is_no_file_hangs_or_reaches_a_person_as_a_trace(tmp_path, monkeypatch, capsys, given):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    if given.startswith("/dev") and not (os.path.exists(given) and stat.S_ISCHR(os.stat(given).st_mode)):
        pytest.skip("there are no such devices here")
    for name, asked in PATHS.items():
        if name == "model" and given == "":
            continue
        assert main([*asked(given)]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1500, (name, said)


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b", "\udcff"])
@pytest.mark.parametrize(
    "option", ["--prompt", "--negative-prompt", "--extend-prompt", "--resolution", "--aspect-ratio", "--num-frames", "--device", "--out"]
)
def test_text_that_is_no_text_is_one_sentence(tmp_path, monkeypatch, capsys, option, text):
    monkeypatch.chdir(tmp_path)
    if option == "--out" and text != "a\0b" and os.name == "posix":
        pytest.skip("a name of any bytes is a name")
    extra = ["--extend", "1"] if option == "--extend-prompt" else []
    prompt = [] if option == "--prompt" else ["--prompt", "a"]
    assert main(["generate", *prompt, f"{option}={text}", *extra]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said


NUMBERS = ("1" + "0" * 30, "1000000000", "-1", "nan", "1e400", "9" * 5000, "")


@pytest.mark.parametrize("option", ["num-samples", "loop", "extend", "num-steps", "num-frames", "width", "image-seed", "seed", "fps"])
def test_a_number_of_any_size_is_one_sentence_at_once(tmp_path, monkeypatch, capsys, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("opensora_core.commands.jobs.Jobs.run", lambda self, jobs: None)
    for number in NUMBERS:
        began = time.monotonic()
        try:
            code = main(["generate", "--prompt", "a", f"--{option}={number}"])
        except SystemExit as refused:  # by argparse
            code = refused.code
        said = capsys.readouterr().err
        is_a_seed = "seed" in option and number == NUMBERS[1]  # a billion is one
        assert code == (0 if is_a_seed and option == "seed" else 2) and time.monotonic() - began < 5, number
        assert code == 0 or (said.startswith("error: ") and said.count("\n") == 1 and len(said) < 700), said


GIVEN = (*campaign.ODD, b"x", (1, 2), -(10**30), torch.tensor(3), object())
OF_A_CALL = [name for name in inspect.signature(OpenSoraPipeline.__call__).parameters
             if name not in ("self", "check_only", "callback", "progress", "latents_only")]  # fmt: skip


@pytest.mark.parametrize("name", [*OF_A_CALL, *(f"options.{one.name}" for one in fields(SamplingOptions))])
def test_whatever_a_call_is_given_is_taken_or_refused_in_a_sentence(name):
    pipe = OpenSoraPipeline.from_pretrained("small")
    for value in GIVEN:
        asked = {"prompt": "a", "height": 64, "width": 64, "num_frames": 5, "check_only": True}
        try:
            own = {"options": SamplingOptions(**{name.partition(".")[2]: value})} if "." in name else {name: value}
            pipe(**asked | own)
        except OpenSoraError as error:
            assert len(str(error)) < 700, (name, type(value))


@pytest.mark.parametrize("note", ['{"format": ["x"]}', '{"format": {"a": 1}}', "[]", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\0"])
def test_a_note_of_another_type_is_one_sentence(tmp_path, note):
    state = load_file(SMALL / "Open_Sora_v2.safetensors")
    state["double_blocks.0.img_attn.q_proj.comfy_quant"] = torch.tensor(list(note.encode()), dtype=torch.uint8)
    save_file(state, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_transformer(tmp_path / "q.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ['{"model_max_length": "x"}', "[]", "{", '{"model_max_length": 1e400}', "[" * 100_000, '{"extra_ids": 99999999999}']
)
@pytest.mark.parametrize("kind", [T5, CLIP])
def test_settings_of_a_tokenizer_of_another_type_are_one_sentence(tmp_path, kind, text):
    shutil.copytree(PARTS["t5" if kind == T5 else "clip"], tmp_path / "tokens")
    (tmp_path / "tokens/tokenizer_config.json").write_text(text)
    try:
        read_tokenizer(kind, tmp_path / "tokens").fitted("a red circle")
    except CheckpointError as error:
        assert len(str(error)) < 500
