"""Every template, opened from the front-end's own list, runs to its video in both ways to draw; all on one host, with small random files of the models."""

import json
import os
from pathlib import Path

import pytest

from demo import comfy, front_end
from tests.golden import host_files

TEMPLATES = sorted(path.stem for path in (comfy.PACK / "workflows").glob("*.json"))
WAYS = ("canvas", "vue")  # to draw nodes
pytestmark = pytest.mark.browser
EMPTY = {"version": 0.4, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {}, "last_node_id": 0, "last_link_id": 0}
UNTIL = """async (test, seconds) => {
  for (const end = Date.now() + 1000 * seconds; Date.now() < end; await new Promise((done) => setTimeout(done, 100))) {
    const said = await test()
    if (said) return said
  }
}"""
# Finds a template in the list as a person does, and opens it.
OPEN = f"""(async () => {{
  const until = {UNTIL}
  const setting = app.extensionManager.setting
  if (Boolean(setting.get('Comfy.VueNodes.Enabled')) !== VUE) await setting.set('Comfy.VueNodes.Enabled', VUE)
  const store = app.extensionManager.workflow
  for (const one of [...store.openWorkflows]) if (one !== store.activeWorkflow) await store.closeWorkflow(one) // whose videos play on
  await app.extensionManager.command.execute('Comfy.BrowseTemplates')
  const named = (words) => [...document.querySelectorAll('[role=dialog] *')].find((one) => !one.children.length && one.textContent.trim() === words)
  if (await until(() => named('Extensions') ?? named('EXTENSIONS'), 30) && !(await until(() => named(PACK), 2))) (named('Extensions') ?? named('EXTENSIONS')).click()
  const entry = await until(() => named(PACK), 10)
  if (!entry) return 'the list has no place for the pack'
  entry.click()
  const cards = () => [...document.querySelectorAll('[data-testid^="template-workflow-"]')]
  const card = await until(() => {{
    const found = cards().find((one) => one.dataset.testid === 'template-workflow-' + NAME)
    if (!found) cards().at(-1)?.scrollIntoView() // more of them come into sight
    return found
  }}, 30)
  if (!card) return 'not in the list'
  card.click()
  await until(() => app.extensionManager.workflow.activeWorkflow?.filename?.startsWith(NAME.replace('.app', '')) && app.rootGraph.nodes.length, 30)
  await until(() => !document.querySelector('[data-testid^="template-workflow-"]'), 10)
}})()"""
# Makes it small, by its widgets; presses Run; waits until the video plays, or for what went wrong.
RUN = f"""(async () => {{
  const until = {UNTIL}
  const graphs = [app.rootGraph, ...(app.rootGraph.subgraphs?.values() ?? [])]
  for (const widget of graphs.flatMap((graph) => graph.nodes.flatMap((node) => (node.widgets ?? []).filter((one) => one.name === 'steps' || (OURS)(node))))) {{
    const [value, offered] = [CHANGES[widget.name], widget.options?.values]
    if (value === undefined || widget.value === BUILT_IN || (Array.isArray(offered) && !offered.includes(value))) continue
    widget.value = value
    widget.callback?.(value)
  }}
  const seen = {{ shown: [] }}
  const hear = (kind, take) => app.api.addEventListener(kind, take)
  hear('executed', ({{ detail }}) => seen.shown.push(...(detail.output?.images ?? []).map((one) => one.filename)))
  hear('execution_error', ({{ detail }}) => (seen.error = detail.exception_message))
  hear('execution_success', () => (seen.done = true))
  await new Promise((done) => setTimeout(done, 300))
  const form = [...document.querySelectorAll('[data-testid="linear-run-button-icon"]')].find((one) => one.getClientRects().length)
  ;(form ?? document.querySelector('[data-testid="queue-button"]')).closest('button').click()
  await until(() => seen.done || seen.error || app.extensionManager.toast?.messages?.some?.((one) => one.severity === 'error'), 120)
  const plays = () => [...document.querySelectorAll('video')].find((one) => one.videoWidth && seen.shown.some((name) => one.src.includes(encodeURIComponent(name))))
  seen.plays = Boolean(seen.done && (await until(plays, 10)))
  seen.errors = Object.values(app.lastNodeErrors ?? {{}}).flatMap((node) => node.errors.map((one) => one.details))
  return seen
}})()"""


@pytest.fixture(scope="module")
def host(tmp_path_factory, tiny_checkpoint):
    installation, lacking = comfy.find(), front_end.missing()
    if installation is None or lacking:
        pytest.skip(f"tests/browser did not run: {lacking or 'no ComfyUI found'} (README.md, Tests)")
    base = tmp_path_factory.mktemp("runs")
    comfy.prepare_base(base)
    host_files.lay_out(base, tiny_checkpoint, tmp_path_factory.mktemp("flux"))
    (base / "models" / "text_encoders" / "t5xxl_fp16.safetensors").touch()  # which every template names: no page says that it is missing
    with comfy.Server(installation, base, ("--cpu", "--preview-method", "auto")) as running:
        yield running


def job(name: str, way: str) -> dict:
    """What is done with a template. With OPEN_SORA_PICTURES, a folder, a picture of the page is taken at the end."""
    changes = host_files.smaller(name[:2]) | {"seed": WAYS.index(way)}  # so that nothing of a run before is used again
    ours = "(node) => node.isSubgraphNode?.() || /^(OpenSora|Primitive)/.test(node.type)"
    words = {"VUE": way == "vue", "NAME": name, "CHANGES": changes, "BUILT_IN": "small (built in)", "PACK": comfy.PACK_FOLDER}
    if name[:2] == "08":
        del changes["resolution"]  # its picture chooses the shape, of one that is released
    if name[:2] in ("01", "02", "33"):
        words["CHANGES"] = {"steps": 2, "seed": changes["seed"]}

    def fill(script: str) -> str:
        for word, value in words.items():
            script = script.replace(word, json.dumps(value))
        return script.replace("OURS", ours)

    folder = os.environ.get("OPEN_SORA_PICTURES")
    picture = folder and str(Path(folder) / f"{name} {way}.png")
    return {"name": f"{name} {way}", "workflow": EMPTY, "vue": way == "vue", "then": [[fill(OPEN), 0], [fill(RUN), 0, picture]]}


@pytest.fixture(scope="module")
def ran(host, request) -> dict:
    """ "NAME canvas" and "NAME vue" -> what came of each that was chosen."""
    chosen = {(item.callspec.params["name"], item.callspec.params["way"]) for item in request.session.items if "ran" in item.fixturenames}
    return front_end.check(host.url, [job(name, way) for name, way in sorted(chosen)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_of_the_list_runs_to_its_video(name, way, ran):
    said = ran[f"{name} {way}"]
    opened, run = said["then"]
    assert opened is None and run.get("error") is None and run["errors"] == [] and said["errors"] == []
    assert run["plays"], run
