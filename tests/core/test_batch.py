"""`generate --csv`: a table of videos, its mistakes, failures in the middle, and going on after a stop."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import pytest
import torch
from PIL import Image

from opensora_core import names
from opensora_core.cli import build_parser, main
from opensora_core.commands import jobs
from opensora_core.commands.ledger import NAME, Ledger
from opensora_core.commands.options import CSV_COLUMNS, DONE, INTERRUPTED, REFUSED, SOME_FAILED
from opensora_core.commands.table import read_rows
from opensora_core.errors import OpenSoraError
from opensora_core.media.video import read_clip
from opensora_core.memory.loaded import LoadedModels
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run import parts as networks

ROOT = Path(__file__).resolve().parents[2]
SIZE = ["--width", "48", "--height", "32", "--num-frames", "5", "--num-steps", "2", "--device", "cpu"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tiny_checkpoint, here):
    """Write a table and run it with a small size; what is given later on the line holds."""

    def run(table: str | bytes, *arguments: str) -> int:
        (here / "list.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        return main(["generate", "--model", str(tiny_checkpoint), "--csv", "list.csv", *SIZE, "--out", "out", *arguments])

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if any network is read."""

    def read(*args, **kwargs):
        raise AssertionError("a network was read before every row was checked")

    for name in ("load_transformer", "load_vae", "load_t5", "load_clip"):
        monkeypatch.setattr(networks, name, read)


def videos(folder="out") -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.mp4"))


def num_frames(path) -> int:
    return imageio_ffmpeg.count_frames_and_secs(str(path))[0]


def test_each_row_becomes_a_video_of_its_own_name_and_settings(run, made, capsys):
    table = (
        "Prompt,Negative,seed,length,Aspect Ratio,width,height,motion-score\r\n"
        '"a cat, running",blurry,3,,,,,\r\n'
        '"she says ""hi""\nand waves",,4,9,,64,,2\r\n'.replace(",64,,", ",64,32,")
        + "雨中的海,,5,2s,,,,0\r\n,,,,,,,\r\n\r\n"
        + "../../etc/passwd,,6,1,,,,\r\n"
    )
    assert run(b"\xef\xbb\xbf" + table.encode(), "--fps", "4") == DONE
    told = capsys.readouterr()
    names = ["0001_a-cat-running.mp4", "0002_she-says-hi-and-waves.mp4", "0003_雨中的海.mp4", "0004_etc-passwd.png"]
    assert told.out.split() == [str(Path("out") / name) for name in names]
    assert [num_frames(Path("out") / name) for name in names[:3]] == [5, 9, 9]
    assert Image.open("out/0004_etc-passwd.png").size == (48, 32)
    assert [call["text"] for call in made] == [
        "a cat, running. 4 FPS. 4 motion score.",
        'she says "hi"\nand waves. 4 FPS. 2 motion score.',
        "雨中的海. 4 FPS.",
        "../../etc/passwd. 4 FPS. 4 motion score.",
    ]
    assert [(call["seed"], call["width"], call["height"]) for call in made] == [(3, 48, 32), (4, 64, 32), (5, 48, 32), (6, 48, 32)]
    assert made[0]["negative_prompt"] == "blurry" and made[1]["negative_prompt"] == ""
    assert "row 3 (line 5): 9 frames of 48x32, seed 5" in told.err and "4/4" in told.err and "Traceback" not in told.err


def test_a_row_gives_what_its_own_command_gives(run, tiny_checkpoint, here):
    Image.new("RGB", (96, 64), (255, 30, 30)).save("red.png")
    assert run("prompt,image,end_image,seed\na cat,red.png,,7\na cat,,red.png,7\n") == DONE
    alone = ["generate", "--model", str(tiny_checkpoint), "--prompt", "a cat", *SIZE, "--seed", "7"]
    assert main([*alone, "--ref", "red.png", "--out", "head.mp4"]) == main([*alone, "--ref-end", "red.png", "--out", "tail.mp4"]) == DONE
    assert same_frames(Path("out/0001_a-cat.mp4"), Path("head.mp4"))
    assert same_frames(Path("out/0002_a-cat.mp4"), Path("tail.mp4"))
    assert Path("head.mp4").read_bytes() != Path("tail.mp4").read_bytes()


def test_a_prompt_that_is_cut_is_named_by_its_row(run, capsys):
    assert run(f"prompt,seed\na,1\n{'a red kite ' * 300},2\nc,3\n") == DONE
    # Behind what a terminal does to take the bars away and back: how many there are by now is a matter of time.
    (said,) = [
        line.split("\r")[-1].replace("\x1b[A", "").strip() for line in capsys.readouterr().err.split("\n") if "tokens longer" in line
    ]
    assert said.startswith("row 2 (line 3): The prompt is ") and said.endswith("that T5 reads; its end was dropped.")


def test_pictures_are_looked_for_beside_the_table(tiny_checkpoint, here, made):
    folder = here / "a list"
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (96, 64), (255, 30, 30)).save(folder / "pictures" / "red.png")
    (folder / "list.csv").write_text("prompt,image\na cat,pictures/red.png\n")
    assert main(["generate", "--model", str(tiny_checkpoint), "--csv", str(folder / "list.csv"), *SIZE, "--out", "my videos"]) == DONE
    assert made[0]["image"] == str(folder / "pictures" / "red.png") and videos("my videos") == ["0001_a-cat.mp4"]


def test_a_size_of_a_row_replaces_the_command_line_s(run, made):
    assert run("prompt,resolution,aspect_ratio,length\na,256px,,1\nb,256px,1:1,1\nc,,,1\n") == DONE
    assert [(call["height"], call["width"]) for call in made] == [(192, 336), (256, 256), (32, 48)]


def test_encoders_are_read_once_for_all_rows_and_the_transformer_too(run, monkeypatch):
    monkeypatch.setattr(networks, "SHARED", LoadedModels())
    read = []
    for name in ("load_transformer", "load_vae", "load_t5", "load_clip"):
        real = getattr(networks, name)
        monkeypatch.setattr(networks, name, lambda *args, real=real, name=name, **more: read.append(name) or real(*args, **more))
    assert run("prompt\na\nb\nc\n") == DONE
    assert sorted(read) == ["load_clip", "load_t5", "load_transformer", "load_vae"]


def test_prompts_beyond_those_encoded_together_come_later(run, made, monkeypatch):
    monkeypatch.setattr(jobs, "ENCODED_TOGETHER", 2)
    encoded, real = [], OpenSoraPipeline.encode_prompts
    monkeypatch.setattr(
        OpenSoraPipeline, "encode_prompts", lambda self, prompts, *rest: encoded.append(len(prompts)) or real(self, prompts, *rest)
    )
    assert run("prompt\na\nb\nc\n") == DONE
    assert encoded == [2, 1] and [call["text"][0] for call in made] == ["a", "b", "c"]


BAD_TABLES = [
    ("", "no row and no header"),
    ("prompt\n", "holds no row"),
    ("prompt\n\n,\n", "holds no row"),
    ("negative,seed\nx,1\n", "no column 'prompt'"),
    ("prompt,sed\nx,1\n", "did you mean 'seed'"),
    ("prompt,negative_prompt\nx,1\n", "did you mean 'negative'"),
    ("prompt,num_frames\nx,1\n", "did you mean 'length'"),
    ("prompt,ref\nx,1\n", "did you mean 'image'"),
    ("prompt,zzzzz\nx,1\n", "has a column 'zzzzz'"),
    ("prompt,seed,Seed\nx,1,2\n", "two columns 'seed'"),
    ("prompt;seed\nx;1\n", "separated by commas"),
    ("prompt,\nx,1\n", "line 2: '1' stands in a column without a name"),
    ('prompt\n"a" cat\n', "row that begins on line 2 has a quote"),
    ('prompt,seed\na cat,1\n"a dog,2\na bird,3\n', "row that begins on line 3 has a quote"),
    (f"prompt\n{'a' * 200_000}\n", "line 2 is longer"),
    ("prompt\ncaf\xe9\n".encode("latin-1"), "not UTF-8 text (line 2)"),
    ("prompt\na cat\n".encode("utf-16"), "not UTF-8"),
    ("prompt\na cat\n".encode("utf-16-le"), "NUL"),
]


@pytest.mark.parametrize(("table", "says"), BAD_TABLES, ids=[says for _, says in BAD_TABLES])
def test_a_table_that_cannot_be_read_is_refused_in_one_sentence(run, no_weights, capsys, table, says):
    assert run(table) == REFUSED
    told = capsys.readouterr()
    assert told.out == "" and says in told.err and told.err.startswith("error: ") and told.err.count("\n") == 1
    assert not Path("out").exists()


def test_every_bad_row_is_listed_before_anything_is_read(run, no_weights, capsys, here):
    (here / "text.png").write_text("not a picture")
    Image.new("RGB", (96, 64)).save("good.png")
    (here / "half.png").write_bytes((here / "good.png").read_bytes()[:60])
    Image.new("RGBA", (96, 64), (255, 0, 0, 128)).save("alpha.png")
    table = (
        "prompt,image,end_image,seed,length,width,motion_score,aspect_ratio\n"
        "a cat,missing.png\na cat,text.png\na cat,half.png\na cat,,,one\na cat,,,-1\na cat,,,,6\na cat,,,,long\na cat,,,,,100\n"
        "a cat,,,,,,99\na cat,,,,,,,7:3\n,good.png\na fine row,good.png,,1,5,,,\na cat,,good.png,,1\na cat, running,,,,,,,,,,\na,b,c,,,,,,extra\na cat,alpha.png\n"
    )
    assert run(table) == REFUSED
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "error: Mend 15 of 16 rows of list.csv that cannot be run; nothing was begun:"
    says = [
        "missing.png does not exist", "text.png is not a picture", "half.png is damaged", "seed 'one' is not a whole number",
        "seed=-1 is out of range", "Use 5 or 9", "the length 'long' is no length", "multiples of 16", "motion_score=99",
        "aspect_ratio='7:3'", "the prompt is empty", None, "1 frame", "running", "in double quotes",
        ": the image alpha.png is transparent in places",
    ]  # fmt: skip
    expected = [(number, part) for number, part in enumerate(says, 1) if part is not None]
    assert len(lines) == len(expected)
    for line, (number, part) in zip(lines, expected, strict=True):
        assert line.startswith(f"  row {number} (line {number + 1}): ") and part in line, line
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--num-samples", "2"], "does not go with --csv"),
        (["--extend", "2"], "--extend makes one prompt's video longer"),
        (["--extend-frames", "9"], "--extend-frames makes"),
        (["--out", "clip.mp4"], "one file"),
        (["--out", "list.csv"], "one file"),
        (["--csv", "absent.csv"], "absent.csv cannot be read"),
        (["--csv", "."], "is a folder"),
        (["--guidance", "nan"], "finite"),
        (["--num-frames", "many"], "is no length"),
        (["--model", "absent"], "not a folder"),
    ],
)
def test_what_does_not_go_with_a_table_is_refused(run, no_weights, capsys, arguments, says):
    assert run("prompt\na\n", *arguments) == REFUSED
    assert says in capsys.readouterr().err and not videos()


def test_a_prompt_and_a_table_are_two_things(capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["generate", "--prompt", "x", "--csv", "y"])
    assert ended.value.code == REFUSED and "not allowed with" in capsys.readouterr().err


def test_wrong_model_files_are_not_said_of_the_rows(run, tiny_checkpoint, capsys, no_weights):
    assert run("prompt\na\nb\n", "--tokenizers", ".") == REFUSED
    told = capsys.readouterr().err
    assert "tokenizer" in told and "row" not in told


def test_the_same_command_makes_only_what_is_missing(run, made, capsys):
    table = "prompt,seed\na,1\nb,\na,1\n"
    assert run(table) == DONE
    names = ["0001_a.mp4", "0002_b.mp4", "0003_a.mp4"]
    assert videos() == names and len(made) == 3
    before = {name: Path("out", name).read_bytes() for name in names}
    capsys.readouterr()
    assert run(table) == DONE
    told = capsys.readouterr()
    assert told.out == "" and told.err == "3 of 3 rows are finished already in out\n" and len(made) == 3

    # A changed row, a new row above the others, and one whose video is gone or cut off.
    Path("out/0003_a.mp4").write_bytes(before["0003_a.mp4"][:-1])
    assert run("prompt,seed\nnew,\na,2\nb,\na,1\na,1\n") == DONE
    assert [(call["text"][:3], call["seed"]) for call in made[3:] if call["text"][0] == "a"] == [("a. ", 2), ("a. ", 1)]
    assert videos() == ["0001_a.mp4", "0001_new.mp4", "0002_a.mp4", "0002_b.mp4", "0003_a.mp4", "0005_a.mp4"]
    assert Path("out/0001_a.mp4").read_bytes() == before["0001_a.mp4"]


@pytest.mark.parametrize(
    "change", [["--num-steps", "1"], ["--guidance", "2"], ["--negative-prompt", "x"], ["--dtype", "bf16"], ["--fps", "8"]]
)
def test_other_settings_are_made_anew_beside_the_old(run, made, change):
    assert run("prompt,seed\na,1\n") == run("prompt,seed\na,1\n", *change) == DONE
    assert len(made) == 2 and videos() == ["0001_a.mp4", "0001_a_1.mp4"]


def test_another_picture_of_the_same_name_is_made_anew_and_a_moved_one_is_not(run, made, here):
    Image.new("RGB", (96, 64), (255, 30, 30)).save("red.png")
    assert run("prompt,image\na,red.png\n") == DONE
    (here / "sub").mkdir()
    (here / "red.png").rename(here / "sub" / "red.png")
    assert run("prompt,image\na,sub/red.png\n") == DONE and len(made) == 1
    Image.new("RGB", (96, 64), (30, 30, 255)).save("red.png")
    assert run("prompt,image\na,red.png\n") == DONE and len(made) == 2


@pytest.mark.parametrize("record", ["", "{", "[]", '{"format": 1}', '{"format": 1, "videos": {"a": {"file": "../x"}}}', '{"format": 9}'])
def test_a_record_that_is_none_is_refused_and_kept(run, no_weights, capsys, record):
    Path("out").mkdir()
    Path("out", NAME).write_text(record)
    assert run("prompt\na\n") == REFUSED
    assert NAME in capsys.readouterr().err and Path("out", NAME).read_text() == record


@pytest.mark.skipif(os.name != "posix", reason="pipes as files")
def test_a_record_that_never_ends_is_not_read(run, no_weights, capsys):
    Path("out").mkdir()
    os.mkfifo(Path("out", NAME))
    assert run("prompt\na\n") == REFUSED and "is not the record of a batch" in capsys.readouterr().err


def test_a_record_leads_nowhere_else(run, no_weights, capsys):
    Path("out").mkdir()
    entry = {"file": "../list.csv", "bytes": 1, "row": 1, "seed": 1, "settings": {}}
    Path("out", NAME).write_text(json.dumps({"about": "", "format": 1, "videos": {"x": entry}}))
    assert run("prompt\na\n") == REFUSED


FAILURES = [
    (OSError(28, "No space left on device"), "No space left", False),
    (MemoryError(), "out of memory", False),
    (OpenSoraError("values that are not numbers"), "not numbers", False),
    (RuntimeError("shape mismatch"), "RuntimeError: shape mismatch", True),
]


@pytest.mark.parametrize(("error", "says", "is_ours"), FAILURES, ids=[says for _, says, _ in FAILURES])
def test_a_row_that_fails_is_named_and_the_others_are_made(run, capsys, monkeypatch, error, says, is_ours):
    real = jobs.save_video

    def fails(frames, path, *args, **kwargs):
        if path.name.startswith("0002"):
            raise error
        return real(frames, path, *args, **kwargs)

    monkeypatch.setattr(jobs, "save_video", fails)
    assert run("prompt\na\nb\nc\n") == SOME_FAILED
    told = capsys.readouterr()
    assert told.out.split() == ["out/0001_a.mp4", "out/0003_c.mp4"] == [f"out/{name}" for name in videos()]
    *_, summary, last = told.err.strip().splitlines()
    assert summary.startswith("1 of 3 rows failed") and last.startswith("  row 2 (line 3): ") and says in last
    assert ("Traceback" in told.err) == is_ours
    monkeypatch.setattr(jobs, "save_video", real)
    assert run("prompt\na\nb\nc\n") == DONE
    assert capsys.readouterr().out == "out/0002_b.mp4\n"


def test_prompts_that_cannot_be_encoded_fail_their_rows(run, capsys, monkeypatch):
    def no_room(self, prompts, progress=None):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(OpenSoraPipeline, "encode_prompts", no_room)
    assert run("prompt\na\nb\n") == SOME_FAILED
    told = capsys.readouterr().err
    assert "2 of 2 rows failed" in told and "row 1 (line 2): the device ran out of memory" in told


def test_latents_that_no_memory_was_left_to_decode_are_kept(run, capsys, monkeypatch):
    from opensora_core.memory import decode as video_vae

    def no_room(*arguments, **more):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(video_vae, "tiled_decode", no_room)
    assert run("prompt\na\nb\n") == SOME_FAILED
    told = capsys.readouterr().err
    for name in ("0001_a.latent", "0002_b.latent"):
        assert name in told and Path("out", name).is_file()


def test_a_full_disk_is_seen_before_a_video_is_begun(run, made, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "_LEAST_ROOM", 2**62)
    assert run("prompt\na\n") == SOME_FAILED
    assert "is full" in capsys.readouterr().err and not made


def start(tiny_checkpoint, folder: Path) -> subprocess.Popen:
    (folder / "list.csv").write_text("prompt,seed\n" + "".join(f"video {number},{number}\n" for number in range(1, 301)))
    command = [sys.executable, "-m", "opensora_core", "generate", "--model", str(tiny_checkpoint), "--csv", "list.csv", *SIZE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    # Python leaves SIGINT ignored where a shell started the tests in the background; a terminal's default is restored.
    return subprocess.Popen(
        [*command, "--out", "out"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="signals cannot be sent to one process on Windows")
@pytest.mark.parametrize("kind", ["SIGINT", "SIGKILL"])
def test_a_stopped_batch_goes_on_where_it_stopped(tiny_checkpoint, tmp_path, kind):
    process = start(tiny_checkpoint, tmp_path)
    try:
        for number in (1, 2):
            assert process.stdout.readline() == f"out/{number:04d}_video-{number}.mp4\n"
        process.send_signal(getattr(signal, kind))
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    finished = 2 + len(output.split())
    if kind == "SIGINT":
        assert process.returncode == INTERRUPTED and "Traceback" not in errors
        assert errors.strip().endswith(f"{finished} of 300 rows are finished; the same command goes on with the others\ninterrupted")
        assert not list((tmp_path / "out").glob(".*partial*"))
    names = videos(tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / NAME).read_text())["videos"].values()
    # Killed between a video and its record, the video is there and does not count.
    assert finished <= len(recorded) <= len(names) <= len(recorded) + 1
    assert all(num_frames(tmp_path / "out" / name) == 5 for name in names)
    again = start(tiny_checkpoint, tmp_path)
    try:
        assert again.stdout.readline() == f"out/{len(recorded) + 1:04d}_video-{len(recorded) + 1}.mp4\n"
    finally:
        again.kill()
        again.communicate()


def test_the_help_page_and_the_table_know_the_same_columns(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert ", ".join(CSV_COLUMNS) in told
    options = vars(build_parser().parse_args(["generate", "--prompt", "x"]))
    assert set(CSV_COLUMNS.values()) <= set(options)


def test_rows_are_numbered_without_empty_ones_and_know_their_line(tmp_path):
    (tmp_path / "list.csv").write_bytes(b'\n prompt ,seed\n\n"two\nlines",1\n,\n last , 2 \n')
    rows = read_rows(tmp_path / "list.csv")
    assert [(row.number, row.line, row.cells) for row in rows] == [
        (1, 4, {"prompt": "two\nlines", "seed": "1"}),
        (2, 7, {"prompt": "last", "seed": "2"}),
    ]


def test_a_line_written_below_the_bars_of_a_batch_is_whole(monkeypatch):
    from opensora_core.commands.progress import Screen

    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with Screen(2, 0) as bars:
        with bars.stages("a title") as stages:
            stages.progress("sampling", 0, 2)
            stages.progress("sampling", 2, 2)
        bars.finished("one.mp4")
        bars.failed("error: two")
    lines = [line.split("\r")[-1].strip() for line in screen.getvalue().split("\n")]
    assert {"a title", "one.mp4", "error: two"} <= set(lines)
    assert "2/2" in lines[-2] and "1 failed" in lines[-2]


class TestShards:
    ROWS = "prompt,seed\n" + "".join(f"a cat {number},{number}\n" for number in range(5))

    def test_two_workers_make_each_row_once(self, tiny_checkpoint, tmp_path):
        (tmp_path / "list.csv").write_text(self.ROWS)
        command = [
            sys.executable,
            "-m",
            "opensora_core",
            "generate",
            "--model",
            str(tiny_checkpoint),
            "--csv",
            "list.csv",
            *SIZE,
            "--out",
            "out",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen([*command, "--shard", f"{number}/2"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
            for number in (1, 2)
        ]
        told = [worker.communicate(timeout=300)[0].split() for worker in workers]
        assert [worker.returncode for worker in workers] == [DONE, DONE]
        assert sorted(Path(path).name for path in told[0] + told[1]) == videos(tmp_path / "out")
        assert len(videos(tmp_path / "out")) == 5 and not list((tmp_path / "out").glob("*.claim"))
        assert len(json.loads((tmp_path / "out" / NAME).read_text())["videos"]) == 5

    def test_a_workers_own_rows_come_first_and_a_lost_ones_are_taken_up(self, run, made, monkeypatch):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert run(self.ROWS) == DONE
        assert [call["seed"] for call in made] == [1, 4, 2, 0, 3]

    def test_a_row_that_another_is_at_work_on_is_waited_for(self, run, made, here, monkeypatch):
        assert run(self.ROWS) == DONE and len(made) == 5
        record = json.loads((here / "out" / NAME).read_text())
        key, entry = next(iter(record["videos"].items()))
        (here / "out" / entry["file"]).unlink()
        held, looks = names.claim(Path("out") / f"{key}.row"), []

        def sleep(seconds):
            looks.append(len(made))
            held.release()

        monkeypatch.setattr(jobs, "time", SimpleNamespace(sleep=sleep))
        assert run(self.ROWS, "--shard", "1/1") == DONE
        assert looks == [5] and len(made) == 6 and len(videos()) == 5

    def test_a_row_that_cannot_be_claimed_is_a_row_that_failed(self, run, made, monkeypatch, capsys):
        real, full = Ledger.claim, iter([OSError(28, "No space left on device", "out/x.row.claim")])

        def claim(*told):
            for error in full:
                raise error
            return real(*told)

        monkeypatch.setattr(Ledger, "claim", claim)
        assert run(self.ROWS, "--shard", "1/1") == SOME_FAILED and len(videos()) == 4
        assert "row 1 (line 2) failed: [Errno 28] No space left on device: 'out/x.row.claim'" in capsys.readouterr().err

    @pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
    def test_a_worker_that_is_none_is_refused(self, run, no_weights, capsys, shard):
        assert run(self.ROWS, "--shard", shard) == REFUSED
        assert f"Use I/N, such as 1/8 for the first of eight: --shard {shard} is no worker." in capsys.readouterr().err


def same_frames(one, other) -> bool:
    """Whether two videos show the same; what they say of how they were made may differ."""
    return torch.equal(*(read_clip(path, 999, from_end=False) for path in (one, other)))
