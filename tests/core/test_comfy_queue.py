"""clients/comfy_queue.py against servers that answer as ComfyUI does, fail, or go away. Against ComfyUI itself: tests/host/test_comfy_queue.py."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from clients import comfy_queue

GRAPH = {"1": {"class_type": "Text", "inputs": {"text": "of {{prompt}}, slowly", "seed": "{{seed}}", "steps": 3}}}


class Fake:
    """A ComfyUI in which a graph is one text. fails: which seeds end in an error. is_away: it breaks every connection."""

    def __init__(self, fails=(), is_away=False):
        self.ran, fake = [], self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, content) -> None:
                if is_away:
                    self.connection.close()
                    return
                self.send_response(200)
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
                    files = {
                        "9": {"images": [{"filename": f"v{inputs['seed']}.mp4", "subfolder": "a b", "type": "output"}], "animated": [True]}
                    }
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
