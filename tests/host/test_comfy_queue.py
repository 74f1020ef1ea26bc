"""clients/comfy_queue.py against the host itself."""

import json

from clients import comfy_queue
from tests.host.test_sampling import graph


def test_a_table_is_made_on_a_real_server(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comfy_queue, "LOOK_AGAIN", 0.2)
    asked = graph(steps=1, seed="{{seed}}")
    asked["text"]["inputs"]["prompt"] = "{{prompt}}"
    (tmp_path / "graph.json").write_text(json.dumps(asked))
    (tmp_path / "rows.csv").write_text("prompt,seed\nraining,11\nsnowing,-5\n")  # no seed is negative: the host refuses the row
    paths = ["--graph", str(tmp_path / "graph.json"), "--csv", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "out")]
    assert comfy_queue.main([*paths, "--server", server.url, "--metrics", str(tmp_path / "prom")]) == 1
    made = sorted((tmp_path / "out").iterdir())
    assert len(made) == 5 and all(path.read_bytes().startswith(b"\x89PNG") and path.name.startswith("0001_video") for path in made)
    assert "row 2 failed" in capsys.readouterr().err
    metrics = (tmp_path / "prom").read_text()
    assert (
        f'open_sora_videos_total{{server="{server.url}"}} 1' in metrics
        and f'open_sora_failures_total{{server="{server.url}"}} 3' in metrics
    )
    assert f'open_sora_queue_length{{server="{server.url}"}} 0' in metrics
