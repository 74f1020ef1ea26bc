"""clients/comfy_queue.py against servers that answer as ComfyUI does, fail, or go away. Against ComfyUI itself: tests/host/test_comfy_queue.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import pytest

from clients import comfy_queue

GRAPH = {"1": {"class_type": "Text", "inputs": {"text": "of {{prompt}}, slowly", "seed": "{{seed}}", "steps": 3}}}


class Fake:
    """A ComfyUI in which a graph is one text. fails: which seeds end in an error. is_away: it breaks every connection.

    code: that it answers a graph with. cuts: it goes away within an answer to these addresses. folders: of the server, in which files of one name are.
    """

    def __init__(self, fails=(), is_away=False, code=200, cuts=(), folders=("a b",)):
        self.ran, fake = [], self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, content) -> None:
                if is_away:
                    self.connection.close()
                    return
                self.send_response(code if self.command == "POST" else 200)
                if urlparse(self.path).path in cuts:
                    self.send_header("Content-Length", "99999")
                self.end_headers()
                self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

            def do_POST(self):
                inputs = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]["1"]["inputs"]
                fake.ran.append(inputs)
                self.answer({"prompt_id": f"id{len(fake.ran)}"})

            def do_GET(self):
                address = urlparse(self.path)
                if address.path.startswith("/history/"):
                    inputs = fake.ran[int(address.path[len("/history/id") :]) - 1]
                    is_failed = inputs["seed"] in fails
                    messages = [["execution_error", {"exception_message": "no memory\n"}]] if is_failed else []
                    named = [{"filename": f"v{inputs['seed']}.mp4", "subfolder": folder, "type": "output"} for folder in folders]
                    previews = [{"filename": "preview.png", "subfolder": "", "type": "temp"}]
                    files = {"9": {"images": named, "animated": [True]}, "10": {"images": previews}}
                    self.answer(
                        {address.path.split("/")[-1]: {"status": {"completed": not is_failed, "messages": messages}, "outputs": files}}
                    )
                elif address.path == "/view":
                    self.answer("|".join(parse_qs(address.query)[key][0] for key in ("filename", "subfolder", "type")).encode())
                else:
                    self.answer({"queue_running": [1], "queue_pending": [2, 3]})

            def log_message(self, *said):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    for name, seconds in (("LOOK_AGAIN", 0.02), ("REST", 0.2)):
        monkeypatch.setattr(comfy_queue, name, seconds)
    (tmp_path / "graph.json").write_text(json.dumps(GRAPH))
    (tmp_path / "rows.csv").write_text('prompt,seed\n"sea, rain",1\na kite,2\nmoss,3\n')

    def call(*fakes, metrics="metrics.prom"):
        servers = [word for fake in fakes for word in ("--server", fake.url)]
        paths = ["--graph", str(tmp_path / "graph.json"), "--csv", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]
        return comfy_queue.main([*paths, *servers, "--metrics", str(tmp_path / metrics)])

    return call


def test_rows_are_filled_in_and_shared_and_their_files_kept(run, tmp_path):
    one, other = Fake(), Fake()
    assert run(one, other) == 0
    ran = sorted(one.ran + other.ran, key=lambda inputs: inputs["seed"])
    assert [inputs["text"] for inputs in ran] == ["of sea, rain, slowly", "of a kite, slowly", "of moss, slowly"]
    assert [(inputs["seed"], inputs["steps"]) for inputs in ran] == [(1, 3), (2, 3), (3, 3)]
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        f"000{n}_v{n}.mp4": f"v{n}.mp4|a b|output" for n in (1, 2, 3)
    }
    metrics = (tmp_path / "metrics.prom").read_text()
    assert f'open_sora_queue_length{{server="{one.url}"}} 3\n' in metrics and "open_sora_rows_waiting 0\n" in metrics
    made = [line.split()[-1] for line in metrics.splitlines() if line.startswith("open_sora_videos_total{")]
    assert sum(map(float, made)) == 3 and metrics.count("# TYPE ") == 5
    (tmp_path / "out" / "0002_v2.mp4").unlink()
    assert run(one, other) == 0 and len(one.ran + other.ran) == 4


def test_a_row_that_fails_is_tried_three_times_and_the_others_are_made(run, tmp_path, capsys):
    fake = Fake(fails=(2,))
    assert run(fake) == 1
    assert [inputs["seed"] for inputs in fake.ran].count(2) == 3 and len(list((tmp_path / "out").iterdir())) == 2
    assert f"row 2 failed: {fake.url}: no memory\n" in capsys.readouterr().err
    assert f'open_sora_failures_total{{server="{fake.url}"}} 3\n' in (tmp_path / "metrics.prom").read_text()


def test_rows_of_a_server_that_is_away_are_made_by_another(run, tmp_path):
    away, there = Fake(is_away=True), Fake()
    assert run(away, there) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3 and len(there.ran) == 3


def test_a_server_that_fails_at_every_row_fails_none_that_another_can_make(run, tmp_path):
    broken, there = Fake(code=500), Fake()
    (tmp_path / "rows.csv").write_text("prompt,seed\n" + "".join(f"a,{number}\n" for number in range(1, 9)))
    assert run(broken, there) == 0
    assert len(list((tmp_path / "out").iterdir())) == 8 and len(broken.ran) <= 8


def test_a_server_that_answers_500_to_a_graph_is_not_asked_for_ever(run, capsys):
    fake = Fake(code=500)
    assert run(fake) == 1 and len(fake.ran) == 9
    assert "row 3 failed: " in capsys.readouterr().err


@pytest.mark.parametrize("address", ["/queue", "/view"])
def test_a_server_that_goes_away_within_an_answer_is_away(run, tmp_path, address):
    cut, there = Fake(cuts=[address]), Fake()
    assert run(cut, there) == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert address == "/view" or f'open_sora_queue_length{{server="{cut.url}"}} -1\n' in (tmp_path / "metrics.prom").read_text()


def test_files_that_cannot_be_kept_are_no_servers_fault(run, tmp_path, capsys, monkeypatch):
    def full(path, content):
        if path.parent.name == "out" and "0002" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, content)

    real = comfy_queue._written
    monkeypatch.setattr(comfy_queue, "_written", full)
    fake = Fake()
    assert run(fake) == 1 and len(fake.ran) == 3
    assert "row 2 failed: its files cannot be kept: [Errno 28] No space left on device\n" in capsys.readouterr().err


def test_files_of_one_name_are_all_kept(run, tmp_path):
    assert run(Fake(folders=("a", "b"))) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "out").glob("0001*")} == {
        "0001_v1.mp4": "v1.mp4|a|output",
        "0001_v1_1.mp4": "v1.mp4|b|output",
    }


def test_cells_of_any_name_and_number_and_rows_without_text(run, tmp_path):
    graph = {"1": {"class_type": "Text", "inputs": {"text": "{{ motion score }}", "seed": "{{种子}}", "year": "{{year}}"}}}
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    (tmp_path / "rows.csv").write_text("motion score, 种子 ,year\n4,7,007\n,,\n5.5,8,٣\n", encoding="utf-8")
    fake = Fake()
    assert run(fake) == 0
    assert fake.ran == [{"text": 4, "seed": 7, "year": "007"}, {"text": 5.5, "seed": 8, "year": "٣"}]


def test_metrics_are_in_their_file_while_rows_are_made(run, tmp_path, monkeypatch):
    seen, look = [], comfy_queue.Work.look
    monkeypatch.setattr(comfy_queue.Work, "look", lambda *told: (look(*told), seen.append((tmp_path / "metrics.prom").exists())))
    assert run(Fake()) == 0 and all(seen)


def test_counts_keep_their_digits():
    metrics = comfy_queue.Metrics()
    metrics.add("open_sora_seconds_total", 12345678.25)
    assert "open_sora_seconds_total 12345678.25\n" in metrics.text()


@pytest.mark.parametrize(
    ("name", "text", "server", "says"),
    [
        ("graph.json", "{", "http://a:1", "graph.json or "),
        ("graph.json", '{"last_node_id": 9, "nodes": []}', "http://a:1", "graph.json is not in ComfyUI's API form"),
        ("graph.json", json.dumps(GRAPH).replace("seed}}", "the-seed}}"), "http://a:1", "rows.csv has no column the-seed"),
        ("rows.csv", "prompt,seed\n,\n", "http://a:1", "rows.csv has no row"),
        ("rows.csv", "prompt,seed\na,1\n", "gpu1:8188", "--server gpu1:8188 is not of the form http://HOST:PORT"),
        ("rows.csv", "prompt,seed\na,1\n", "http://gpu1:81 88", "Port could not be cast to integer"),
    ],
)
def test_what_no_server_could_run_is_one_sentence(run, tmp_path, capsys, name, text, server, says):
    (tmp_path / name).write_text(text)
    assert run(SimpleNamespace(url=server)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1


def test_a_table_without_a_column_of_the_graph_is_refused(run, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    assert run(Fake()) == 2
    assert "rows.csv has no column seed" in capsys.readouterr().err


def test_metrics_are_served():
    import urllib.request

    metrics = comfy_queue.Metrics()
    metrics.add("open_sora_videos_total", 2, server="http://a")
    server = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as answer:
        assert 'open_sora_videos_total{server="http://a"} 2\n' in answer.read().decode()
    server.shutdown()
