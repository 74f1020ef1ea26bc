"""The real front-end with the pack beside the same one without: nothing new is complained of, videos bring their graphs back, and all works without web/js."""

import json
import re
from pathlib import Path

import pytest

from demo import comfy, front_end, help_pages, host_record

pytestmark = pytest.mark.browser
NODES = [name for name in host_record.read()["nodes"] if name.startswith("OpenSora")]
TEMPLATE = comfy.PACK / "workflows" / "01 Text to video, no download.json"
EMPTY = {"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "last_node_id": 0, "last_link_id": 0}
STOCK = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 9, "color": 255}},
    "2": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 24, "bit_depth": 8}},
    "3": {"class_type": "SaveVideo", "inputs": {"video": ["2", 0], "filename_prefix": "video/stock", "format": "auto", "codec": "auto"}},
}
# Nothing of a run before can be used again.
ANEW = "(() => { app.rootGraph.nodes.find((one) => one.isSubgraphNode?.()).widgets.find((one) => one.name === 'seed').value = SEED })()"
# Runs what is on the canvas to its end, and gives the last video's entry in the history, how many of the host's own previews came, and what failed.
RUN = """(async () => {
  const seen = { previews: 0 }
  for (const kind of ['b_preview', 'b_preview_with_metadata']) app.api.addEventListener(kind, () => (seen.previews += 1))
  app.api.addEventListener('executed', ({ detail }) => detail.output?.images && (seen.video = detail.output.images[0]))
  app.api.addEventListener('execution_error', ({ detail }) => (seen.error = detail.exception_message))
  const done = new Promise((end) => ['execution_success', 'execution_error'].map((kind) => app.api.addEventListener(kind, end)))
  await app.queuePrompt(0)
  await Promise.race([done, new Promise((end) => setTimeout(end, 120000))])
  return (window.ran = seen)
})()"""
# Drops the video that was saved on an empty canvas: [the graph before, the graph after].
DROP = """(async () => {
  const graph = async () => (await app.graphToPrompt()).output
  const before = await graph()
  const { filename, subfolder, type } = window.ran.video
  const video = await (await fetch(`/api/view?${new URLSearchParams({ filename, subfolder, type })}`)).blob()
  await app.loadGraphData(EMPTY, true, true)
  const dataTransfer = new DataTransfer()
  dataTransfer.items.add(new File([video], filename, { type: 'video/mp4' }))
  app.canvas.canvas.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true, clientX: 800, clientY: 600 }))
  await new Promise((done) => setTimeout(done, 4000))
  return [before, await graph()]
})()""".replace("EMPTY", json.dumps(EMPTY))
# What the search finds first for what a person types.
SEARCHED = {"seconds": "Open-Sora Empty Latent", "length": "Open-Sora Empty Latent", "text to video": "Open-Sora Text to Video",
            "文生视频": "Open-Sora Text to Video 文生视频", "图生视频": "Open-Sora Image to Video 图生视频",
            "长视频": "Open-Sora Long Video 长视频", "首尾帧": "Open-Sora Image to Video"}  # fmt: skip
SEARCH = """(() => {
  const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s
  return TERMS.map((term) => stores.get('nodeDef').nodeSearchService.searchNode(term, [], { limit: 5 }).map((one) => one.display_name))
})()""".replace("TERMS", json.dumps(list(SEARCHED)))
MADE = "NODES.filter((kind) => { try { return !LiteGraph.createNode(kind)?.outputs } catch { return true } })"


def told(lines: list[str]) -> set[str]:
    """What is complained of, without numbers, ids and addresses."""
    return {re.sub(r"https?://[^\s/]+|[0-9a-f]{8}-[0-9a-f-]+|0x[0-9a-f]+|\d+", "#", line.strip()) for line in lines}


def complaints(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"warn|error|fail|deprecat|traceback", line, re.IGNORECASE)]


@pytest.fixture(scope="module")
def with_pack(server) -> dict:
    workflow = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    jobs = [
        {"name": "canvas", "vue": False, "then": [[RUN, 0], [DROP, 0], [SEARCH, 0]]},
        {"name": "vue", "vue": True, "then": [[ANEW.replace("SEED", "1"), 0], [RUN, 0]]},
        {"name": "no script", "vue": False, "blocked": "**/extensions/open-sora/**/*.js",
         "then": [[MADE.replace("NODES", json.dumps(NODES)), 0], [ANEW.replace("SEED", "2"), 0], [RUN, 0]]},
    ]  # fmt: skip
    return front_end.look(server.url, [job | {"workflow": workflow} for job in jobs])


def test_nothing_is_complained_of_that_the_host_alone_does_not_complain_of(server, with_pack, tmp_path):
    load = f"app.loadApiJson({json.dumps(STOCK)}, 'stock')"
    jobs = [{"name": way, "vue": way == "vue", "workflow": EMPTY, "then": [[load, 0], [RUN, 0]]} for way in ("canvas", "vue")]
    with comfy.Server(server.installation, tmp_path, ("--cpu", "--preview-method", "auto", "--whitelist-custom-nodes", "none")) as alone:
        assert not [name for name in alone.get("/object_info") if name.startswith("OpenSora")]
        said = front_end.look(alone.url, jobs, bare=True)
        assert said["canvas"]["then"][1].get("video")
        allowed = told([line for way in said.values() for line in way["noticed"]]) | told(complaints(alone.log))
    assert told([line for way in with_pack.values() for line in way["noticed"]]) - allowed == set(), "with its script and without it"
    assert told(complaints(server.log)) - allowed == set()


@pytest.mark.parametrize("way", ["canvas", "vue"])
def test_the_first_template_runs_to_its_video_in_both_ways_to_draw(with_pack, way):
    ran = with_pack[way]["then"][0 if way == "canvas" else 1]
    assert ran.get("error") is None and Path(ran["video"]["filename"]).suffix == ".mp4"


def test_a_video_that_is_dropped_on_the_canvas_restores_its_graph(with_pack):
    before, after = with_pack["canvas"]["then"][1]
    assert "OpenSoraRectifiedFlowSampler" in {node["class_type"] for node in before.values()}
    assert after == before


def test_the_search_finds_the_right_nodes_first(with_pack):
    for (term, wanted), found in zip(SEARCHED.items(), with_pack["canvas"]["then"][2], strict=True):
        ours = [one for one in found if "Open-Sora" in one]  # the host may have a node of the very name, such as one of lengths
        assert ours and wanted in ours[0], f"{term}: {found}"
        assert term.isascii() or ours == found, "of several that do it, all are ours"


def test_without_its_script_every_node_is_there_and_a_run_shows_its_first_frame(with_pack):
    failed, _, ran = with_pack["no script"]["then"]
    assert failed == [] and with_pack["no script"]["errors"] == []
    assert ran.get("error") is None and ran["video"] and ran["previews"] > 0


@pytest.mark.parametrize("language", help_pages.WORDS)
def test_every_help_page_is_where_the_front_end_asks_for_it_with_its_picture(server, language):
    import urllib.request

    for node in NODES:
        page = f"/extensions/{comfy.PACK_FOLDER}/docs/{node}/{language}.md"
        with urllib.request.urlopen(server.url + page) as reply:
            text = reply.read().decode()
            assert reply.headers.get_content_type() != "text/html" and text.startswith("# ")
