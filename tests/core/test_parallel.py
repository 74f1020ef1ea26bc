"""Several processes that make one video: what they make is one process's, how the work is cut, how all end when one cannot go on."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from opensora_core import parallel as groups
from opensora_core.cli import main
from opensora_core.commands import generate, gpus
from opensora_core.commands.options import REFUSED, SOME_FAILED, GenerateOptions
from opensora_core.errors import OpenSoraError
from opensora_core.media.latent_file import save_latents
from opensora_core.memory import decode as decoding
from opensora_core.networks.cogvideox.config import CogVideoXConfig
from opensora_core.networks.cogvideox.model import CogVideoX, example
from opensora_core.parallel import Shares, groups_for, sizes
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.request import SamplingOptions
from tests.core.test_cogvideox import SHAPES
from tests.golden.formula import fill

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-6
PROMPT = "a red circle moving right on a blue background"


def ranks(count: int, work, *told) -> list[int]:
    """The exit codes of so many processes that each run work(*told), as --gpus starts them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    command = partial(work, *told)
    started = start_processes(gpus._process, (_alone, command, count, store.port), count, join=False, start_method="spawn").processes
    for process in started:
        process.join(240)
    return [process.exitcode for process in started]


def _alone(command) -> int:
    torch.set_num_threads(1)
    return command()


def runs(pipe: OpenSoraPipeline) -> dict[str, torch.Tensor]:
    """Latents of some runs of the built-in model, and a decode in twelve tiles."""
    few = {"height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 3, "seed": 5, "latents_only": True}
    picture = torch.linspace(0, 1, 48 * 80 * 3).reshape(48, 80, 3)
    (encoded,) = pipe.encode_prompts([(PROMPT, "", SamplingOptions())])
    made = {
        "t2v": pipe(encoded, seed=5, latents_only=True),
        "i2v": pipe(encoded, seed=5, image=picture, latents_only=True),
        "one pass": pipe(encoded, guidance_scale=1.0, num_videos_per_prompt=2, **few),  # tokens and heads alone
        "plan": pipe(encoded, speed="draft", image=picture, last_image=picture, **few),
    }
    pipe.vae.enable_tiling(64)
    latents = torch.randn(1, 16, 2, 16, 21, generator=torch.Generator().manual_seed(0))
    return {name: one.latents for name, one in made.items()} | {"decode": pipe.vae.decode(latents)}


def _runs_in_group(path: str) -> int:
    with groups.together(torch.device("cpu")) as group:
        check_cogvideox(group)
        pipe = OpenSoraPipeline.from_pretrained("small").use_group(group)
        if group.rank:
            pipe.help()
        else:
            save_file({name: tensor.contiguous() for name, tensor in runs(pipe).items()}, path)
    return 0


def check_cogvideox(group: groups.Group) -> None:
    """A network whose text and video tokens are one sequence from the first block on."""
    for name in list(SHAPES)[:2]:
        config = CogVideoXConfig.of(SHAPES[name])
        network, generator = fill(CogVideoX(config)), torch.Generator().manual_seed(1)
        inputs = example(config, (2, config.in_channels, 2, 8, 12), 7, torch.float32, "cpu")
        for value in inputs.values():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator))
        with torch.inference_mode():
            expected = network(**inputs)
            network.tokens = Shares(group.rank, group.size)
            for block in network.blocks():
                block.attention = network.tokens.attention(block.attention)
            found = network(**inputs)
        assert (found - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.fixture(scope="module")
def alone():
    return runs(OpenSoraPipeline.from_pretrained("small"))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_processes_make_what_one_makes(alone, tmp_path, count):
    """The built-in model has 5 heads and an odd number of tokens: no share divides."""
    assert ranks(count, _runs_in_group, str(tmp_path / "made.safetensors")) == [0] * count
    made = load_file(tmp_path / "made.safetensors")
    assert made.keys() == alone.keys()
    errors = {name: ((made[name] - expected).norm() / expected.norm()).item() for name, expected in alone.items()}
    assert max(errors.values()) <= TOLERANCE, errors


COMPILED = "compiled"


def small_run(how: str, group: groups.Group | None = None) -> torch.Tensor | None:
    """Latents of a short run of the built-in model in a precision of weights, streamed as far as bytes are streamed, or in compiled blocks; None of
    who helps."""
    precision = "auto" if how == COMPILED else how
    pipe = OpenSoraPipeline.from_pretrained("small", precision=precision).enable_offload("minimal", None, "cpu")
    if how == COMPILED:
        pipe.compile()
    if group is not None:
        pipe.use_group(group)
        if group.rank:
            return pipe.help()
    few = {"height": 48, "width": 80, "num_frames": 9, "num_inference_steps": 3, "seed": 5, "latents_only": True}
    return pipe(PROMPT, guidance_scale=1.0 if how == COMPILED else None, **few).latents  # one pass: tokens and heads are shared out


def _small_in_group(how: str, path: str) -> int:
    if how == COMPILED:  # by a backend that asks for no compiler of the machine's
        torch.compile = partial(torch.compile, backend="eager")
    with groups.together(torch.device("cpu")) as group:
        made = small_run(how, group)
        if not group.rank:
            save_file({"made": made.contiguous()}, path)
    return 0


@pytest.mark.parametrize("how", ["fp8_e4m3fn", "int8", "nf4", COMPILED])
def test_quantised_streamed_and_compiled_blocks_are_shared_out_as_well(tmp_path, monkeypatch, how):
    """bitsandbytes quantises activations or blocks of weights, never whole sequences, so that a share of the tokens is computed as they are."""
    if how in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    expected = small_run(how)
    assert ranks(2, _small_in_group, how, str(tmp_path / "made.safetensors")) == [0, 0]
    error = (load_file(tmp_path / "made.safetensors")["made"] - expected).norm() / expected.norm()
    assert error <= TOLERANCE, error.item()


def _short_of_memory(path: str) -> int:
    """A process that has no room for its first tile."""
    with groups.together(torch.device("cpu")) as group:
        pipe = OpenSoraPipeline.from_pretrained("small").use_group(group)
        if group.rank:
            answers, real = iter([None]), decoding.unless_out_of_memory
            decoding.unless_out_of_memory = lambda work: next(answers, real(work))
            pipe.help()
            return 0
        pipe.vae.enable_tiling(128)
        lines, latents = [], torch.ones(1, 16, 1, 24, 24)
        with pipe.vae.decoder(latents.shape, lines.append) as decode:
            frames = decode(latents)
        assert frames.shape == (1, 3, 1, 192, 192) and "Ran out of memory" in lines[0], lines
    return 0


def test_a_tile_that_another_process_has_no_room_for_is_cut_smaller():
    assert ranks(2, _short_of_memory, "") == [0, 0]


def _command(out: str, rank_1: str) -> int:
    """The command line in a group whose second process is killed, is of another version, or has no memory."""
    if os.environ["RANK"] == "1" and rank_1.startswith("killed"):
        Shares.passes = lambda self, *told: os.kill(os.getpid(), 9)
    if os.environ["RANK"] == "1" and rank_1 == "other version":
        groups.__version__ = "0.0.1"
    if os.environ["RANK"] == "1" and rank_1.startswith("no memory"):
        Shares.passes = lambda self, *told: torch.empty(2**60)
    several, prompts = "of several" in rank_1, Path(out).parent.with_name("prompts.txt")
    if several:
        prompts.write_text(f"{PROMPT}\n{PROMPT}, again\n")
    asked = ["--prompt-path", str(prompts)] if several else ["--prompt", PROMPT]
    out = str(Path(out).parent) if several else out
    return main(["generate", *asked, "--num-steps", "3", "--num-frames", "5", "--guidance", "1", "--device", "cpu", "--out", out])


@pytest.mark.parametrize(
    ("rank_1", "codes", "says"),
    [
        ("killed", [REFUSED, -9], "nother of the 2 processes ended or does not answer ("),
        ("other version", {REFUSED, 1}, "runs Open-Sora "),
        ("no memory", [1, REFUSED], "Process 1 of 2: Sampling 5 frames of 64x64 (height x width)"),
        ("killed, of several prompts", [REFUSED, -9], "nother of the 2 processes ended or does not answer ("),
        ("no memory, of several prompts", [1, REFUSED], "Process 1 of 2: Sampling 5 frames of 64x64 (height x width)"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_process_that_cannot_go_on_ends_all_with_one_sentence(tmp_path, capfd, rank_1, codes, says):
    found = ranks(2, _command, str(tmp_path / "out" / "clip.mp4"), rank_1)
    assert found == codes if isinstance(codes, list) else set(found) == codes
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and says in said and "Traceback" not in said, said
    assert not list((tmp_path / "out").glob("*.mp4")) and not list((tmp_path / "out").glob(".*partial*"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_others_that_are_not_there_are_waited_for_no_longer_than_the_limit(monkeypatch, capsys, rank):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port, _ = store.port, monkeypatch.setattr(groups, "FOUND_WITHIN", 1.5)
    del store
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--prompt", PROMPT, "--device", "cpu"]) == REFUSED
    assert f"the first one's: Process {rank} of 2 cannot reach the others at 127.0.0.1:{port} within 1.5 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("passes", "heads", "size", "expected"),
    [
        ([2] * 50, 24, 2, 2),  # two passes at every step, of a plan: as good as tokens, and nothing is sent
        ([2, 1] * 25, 24, 2, 1),  # half the processes would wait at every second step
        ([2] * 50, 24, 8, 2),
        ([1] * 50, 24, 8, 1),
        ([2, 1] * 25, 5, 4, 2),  # 3 of 5 heads for a process of two groups, 2 for one of four that share tokens
        ([3] * 50, 24, 3, 3),
        ([2] * 50, 1, 2, 2),  # a network whose tokens cannot be shared out
        ([2] * 50, 5, 6, 2),  # more processes than heads
    ],
)
def test_passes_are_shared_out_where_that_fits_better(passes, heads, size, expected):
    assert groups_for(passes, heads, size) == expected


@pytest.mark.parametrize(
    ("heads", "size", "says"),
    [
        (5, 7, "7 processes: its transformer has 5 attention heads, and a step has at most 2 guidance passes"),
        (1, 3, "does not attend to all frames at once"),
    ],
)
def test_more_processes_than_there_is_work_for_are_refused(heads, size, says):
    with pytest.raises(OpenSoraError, match="cannot be shared out over") as caught:
        groups_for([2, 1], heads, size)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_shares_differ_by_one_at_most():
    assert sizes(5, 4) == [2, 1, 1, 1] and sizes(2, 3) == [1, 1, 0]
    for count in range(40):
        for parts in range(1, 9):
            found = sizes(count, parts)
            assert sum(found) == count and max(found) - min(found) <= 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "0"], "--gpus 0 with --device auto is not possible"),
        (["--gpus", "2", "--device", "cuda:1"], "--gpus 2 with --device cuda:1 is not possible"),
        (["--gpus", "99"], "--gpus 99 is more than the "),
    ],
)
def test_gpus_that_cannot_be_are_refused(capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["generate", "--prompt", PROMPT, *arguments]) == REFUSED
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("source", ["prompt", "csv", "decode"])
def test_gpus_of_the_command_line(tmp_path, source):
    """One video of two processes, under one bar; or a table whose rows are shared out, of which each is made once; or one of latents."""
    (tmp_path / "list.csv").write_text("prompt,seed\n" + "".join(f"{PROMPT},{number}\n" for number in range(3)))
    save_latents(tmp_path / "made.latent", torch.zeros(1, 16, 2, 8, 8))
    asked = {"prompt": ["--prompt", PROMPT], "csv": ["--csv", "list.csv"], "decode": ["--decode", "made.latent"]}[source]
    command = [
        sys.executable,
        "-m",
        "opensora_core",
        "generate",
        *asked,
        "--gpus",
        "2",
        "--device",
        "cpu",
        "--num-steps",
        "2",
        "--num-frames",
        "5",
    ]
    environment = {**{key: value for key, value in os.environ.items() if key != "RANK"}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    made = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    assert sorted(Path(line).name for line in done.stdout.split()) == made and len(made) == {"prompt": 1, "csv": 3, "decode": 1}[source]
    if source == "prompt":
        assert (
            done.stderr.count("video 1 of 1, seed") == 1
            and "2 processes shared each step, its guidance passes over 2 groups" in done.stderr
        )


def test_latents_are_decoded_by_all_processes(tmp_path, monkeypatch):
    joined = []
    monkeypatch.setattr(OpenSoraPipeline, "use_group", lambda pipe, group: joined.append(group))
    made = save_latents(tmp_path / "made.latent", torch.zeros(1, 16, 2, 8, 8))
    assert generate._decode(GenerateOptions(decode=str(made), out=str(tmp_path / "v.mp4"), device="cpu"), "the others") == 0
    assert joined == ["the others"] and (tmp_path / "v.mp4").is_file()


def test_a_process_that_is_lost_with_the_last_is_named_too(capsys):
    ended = [SimpleNamespace(is_alive=lambda: False, exitcode=code) for code in (0, -9)]
    assert gpus._waited_for(ended, is_rows=False) == SOME_FAILED and gpus._waited_for(ended, is_rows=True) == 0
    assert gpus._waited_for(ended[1:], is_rows=True) == SOME_FAILED
    assert capsys.readouterr().err.count("was lost (signal 9)") == 3


def _made_by_two(folder, model) -> subprocess.Popen:
    """A table of twelve rows on its way, one of which is finished."""
    (folder / "list.csv").write_text("prompt,seed\n" + "".join(f"video {number},{number}\n" for number in range(12)))
    command = [sys.executable, "-m", "opensora_core", "generate", "--model", str(model), "--csv", "list.csv", "--out", "out"]
    command += ["--gpus", "2", "--device", "cpu", "--height", "32", "--width", "32", "--num-frames", "5", "--num-steps", "2"]
    environment = {**{key: value for key, value in os.environ.items() if key != "RANK"}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    process.stdout.readline()
    return process


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_processes_say_what_is_finished_and_leave_no_claim(tiny_checkpoint, tmp_path):
    process = _made_by_two(tmp_path, tiny_checkpoint)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "of 12 rows are finished; the same command goes on with the others" in errors, errors
    assert "Traceback" not in errors and "leaked" not in errors and not list((tmp_path / "out").glob("*.claim")), errors


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_process_loses_no_row_of_a_table(tiny_checkpoint, tmp_path):
    process = _made_by_two(tmp_path, tiny_checkpoint)
    claimed = []
    while not claimed and process.poll() is None:
        texts = [path.read_text() for path in (tmp_path / "out").glob("*.row.claim") if path.exists()]
        claimed = [json.loads(text)["process"] for text in texts if text]
    os.kill(claimed[0], 9)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "was lost (signal 9); the others take up its rows" in errors
    names = sorted(path.name for path in (tmp_path / "out").glob("*.mp4"))
    recorded = json.loads((tmp_path / "out" / "batch.json").read_text())["videos"].values()
    assert len(recorded) == 12 and {entry["file"] for entry in recorded} <= set(names)
