"""Names of files: claimed once whoever asks, given up by the dead, swept when nobody owns them, refused where no file can have them."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opensora_core import names
from opensora_core.errors import OpenSoraError

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *arguments, wait: bool = True):
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process.communicate()[0].strip() if wait else process


TAKE = """
import sys, time
from pathlib import Path
from opensora_core import names
for _ in range(8):
    with names.claim_unused(Path(sys.argv[1]) / "clip.mp4") as claim:
        time.sleep(0.01)
        assert not claim.path.exists()
        claim.path.write_text(sys.argv[2])
"""


def test_processes_that_write_into_one_folder_never_share_a_name(tmp_path):
    workers = [run(TAKE, tmp_path, number, wait=False) for number in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    written = [path.read_text() for path in tmp_path.glob("*.mp4")]
    assert sorted(written) == sorted(str(number) for number in range(4) for _ in range(8))
    assert {path.suffix for path in tmp_path.iterdir()} == {".mp4"}, "claims and clocks are gone"


def test_a_claim_holds_for_everything_that_a_run_writes_beside_its_video(tmp_path):
    with names.claim(tmp_path / "clip.mp4") as held:
        assert names.claim(tmp_path / "clip.png") is None
        assert names.claim_unused(tmp_path / "clip.latent").path.name == "clip_1.latent"
        about = json.loads(held.file.read_bytes())
        assert about["process"] == os.getpid() and about["host"] and abs(about["time"] - time.time()) < 60
    assert names.claim(tmp_path / "clip.png").path.name == "clip.png"


def test_a_claim_of_a_process_that_was_killed_is_free_at_once(tmp_path):
    worker = run("import sys; from pathlib import Path; from opensora_core import names; names.claim(Path(sys.argv[1])); "
                 "print('claimed', flush=True); sys.stdin.read(); import time; time.sleep(60)", tmp_path / "clip.mp4", wait=False)  # fmt: skip
    assert worker.stdout.readline() == "claimed\n"
    assert names.claim(tmp_path / "clip.mp4") is None
    worker.kill()
    worker.wait()
    with names.claim(tmp_path / "clip.mp4") as taken:
        assert taken is not None


def test_a_claim_of_another_machine_is_free_when_it_was_not_renewed_for_ten_minutes(tmp_path):
    file = tmp_path / "clip.claim"
    file.write_text(json.dumps({"host": "elsewhere", "process": 1, "time": 0, "system": "00000000"}))
    assert names.claim(tmp_path / "clip.mp4") is None
    minutes_ago = time.time() - 599
    os.utime(file, (minutes_ago, minutes_ago))
    assert names.claim(tmp_path / "clip.mp4") is None
    os.utime(file, (minutes_ago - 5, minutes_ago - 5))
    assert names.claim(tmp_path / "clip.mp4") is not None
    assert json.loads(file.read_text())["process"] == os.getpid()


def test_what_is_held_is_renewed_each_minute_and_nothing_else(tmp_path):
    assert names.RENEWED_EVERY == 60
    with names.claim(tmp_path / "clip.mp4") as held:
        os.utime(held.file, (1, 1))
        held.renew()
        assert time.time() - held.file.stat().st_mtime < 60
        assert [thread.name for thread in threading.enumerate()].count("open-sora-claims") == 1
        held.file.write_text("somebody else")
        os.utime(held.file, (1, 1))
        held.renew()
        assert held.file.stat().st_mtime == 1


@pytest.mark.skipif(os.name == "nt", reason="limits")
def test_a_claim_that_a_full_disk_has_no_room_for_is_named_and_not_left_empty(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="clip.claim"):
            names.claim(tmp_path / "clip.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_claim_that_was_taken_over_is_not_released_by_its_first_owner(tmp_path):
    held = names.claim(tmp_path / "clip.mp4")
    held.file.write_text("somebody else")
    held.release()
    assert held.file.read_text() == "somebody else"


ADD = """
import sys
from pathlib import Path
from opensora_core import names
file = Path(sys.argv[1])
for _ in range(20):
    with names.one_at_a_time(file):
        number = int(file.read_text())
        with names.complete_or_absent(file) as partial:
            partial.write_text(str(number + 1))
"""


def test_a_record_is_changed_by_one_process_at_a_time(tmp_path):
    file = tmp_path / "batch.json"
    file.write_text("0")
    workers = [run(ADD, file, wait=False) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0] * 3
    assert file.read_text() == "60"


def test_the_next_run_sweeps_what_no_living_process_owns(tmp_path):
    dead = run("import os; print(os.getpid())")
    ours = tmp_path / f".clip.{names._SYSTEM}-{os.getpid()}.partial"
    theirs = tmp_path / f".clip.{names._SYSTEM}-{dead}.partial"
    elsewhere = tmp_path / ".clip.00000000-1.partial"
    old = tmp_path / ".old.latent.00000000-1.partial"
    named = tmp_path / ".notes.partial"
    for file in (ours, theirs, elsewhere, old, named):
        file.touch()
    os.utime(old, (1, 1))
    assert set(names.sweep(tmp_path)) == {theirs, old}
    assert {path for path in tmp_path.iterdir()} == {ours, elsewhere, named}


def test_the_next_run_sweeps_claims_too_and_nothing_of_a_users_own(tmp_path):
    dead = run("import os; print(os.getpid())")
    (tmp_path / "dead.claim").write_text(json.dumps({"host": "here", "process": int(dead), "time": 0, "system": names._SYSTEM}))
    (tmp_path / "elsewhere.claim").write_text(json.dumps({"host": "there", "process": 1, "time": 0, "system": "00000000"}))
    held = names.claim(tmp_path / "held.mp4")
    mine = [tmp_path / "insurance.claim", tmp_path / "list.claim"]
    for file, text in zip(mine, ("a letter", '["host"]'), strict=True):
        file.write_text(text)
        os.utime(file, (1, 1))
    assert names.sweep(tmp_path) == [tmp_path / "dead.claim"]
    os.utime(tmp_path / "elsewhere.claim", (1, 1))
    assert names.sweep(tmp_path) == [tmp_path / "elsewhere.claim"]
    assert names.claim(tmp_path / "insurance.mp4") is None
    assert {path for path in tmp_path.iterdir()} == {held.file, *mine}
    held.release()


def test_everything_that_is_not_to_stay_has_a_name_that_is_swept(tmp_path, monkeypatch):
    from opensora_core.commands.output import check_writable
    from opensora_core.media.video import check_can_be_written

    made = []
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **how: made.append(self.name) if self.parent == tmp_path else real(self, **how))
    with names.complete_or_absent(tmp_path / "a.mp4") as partial:
        partial.touch()
    names._time_there(tmp_path)
    check_writable(tmp_path, "clip.mp4")
    check_can_be_written(tmp_path / "clip.mp4", (5, 64, 64), 24)
    monkeypatch.undo()
    left = {path.name for path in tmp_path.iterdir()} - {"a.mp4"}
    assert left and left <= set(made)
    monkeypatch.setattr(names, "_is_alive", lambda process: False)
    names.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "name", ["con", "NUL.mp4", "out/aux/clip.mp4", "com1.png", "http://example.com/x.mp4", "rtsp://cam", "a\0b.mp4", "\ud800.mp4"]
)
def test_names_that_no_file_can_have_everywhere_are_refused(name):
    with pytest.raises(OpenSoraError, match="--out"):
        names.check_name(name, "--out")


@pytest.mark.parametrize("name", ["12:30.mp4", "9:15.mp4", "-y.mp4", "console.mp4", "%03d.mp4", "caf\u00e9/\u732b.mp4", "C:/videos/x.mp4"])
def test_odd_names_are_plain_files(name):
    assert names.check_name(name, "--out") == Path(name)


def test_a_long_name_is_said_short():
    assert names.shown("clips/a.mp4") == "clips/a.mp4"
    assert names.shown(Path("/" + "a" * 200) / "b.mp4") == "b.mp4"
    assert names.shown(Path("/a/b") / ("x" * 300 + ".mp4")) == f"{'x' * 60}...{'x' * 26}.mp4 (304 characters)"


def test_a_report_never_overwrites_another(tmp_path, capsys):
    from opensora_core.commands.output import write_report

    (tmp_path / "report.mp4").touch()  # is no report
    for number in range(2):
        write_report(tmp_path / "report.json", {"number": number})
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "report.json"), str(tmp_path / "report_1.json")]
    assert [json.loads((tmp_path / name).read_text())["number"] for name in ("report.json", "report_1.json")] == [0, 1]
