"""What web/js adds, in the real front-end with a new user's settings: the clip moves in its colours, a length and a prompt are answered."""

import json

import pytest

from demo import comfy, front_end

pytestmark = pytest.mark.browser
WHOLE = "app.rootGraph.nodes.find((one) => one.isSubgraphNode?.())"
# (test, seconds) -> what the test says first that is something, null after so many seconds.
PROMISED = """(async (test, seconds) => {
  for (const until = Date.now() + 1000 * seconds; Date.now() < until; await new Promise((done) => setTimeout(done, 200))) {
    const said = await test()
    if (said) return said
  }
  return null
})"""
# What is seen of a run on the one node: its line, and of each picture the corner's colour and where the redness lies from left to right.
PANEL = """(async () => {
  const node = WHOLE
  const line = node.widgets.find((one) => one.name === '$$node-text-preview')?.value ?? ''
  const element = node.widgets.find((one) => one.name === 'open_sora_panel')?.element
  if (!element?.src) return { line, said: element?.textContent ?? '' }
  const data = await fetch(element.src).then((reply) => reply.arrayBuffer()).catch(() => null)
  if (!data) return { line } // the next one came meanwhile
  const decoder = new ImageDecoder({ data, type: 'image/webp' })
  await decoder.tracks.ready
  const pictures = []
  for (let index = 0; index < decoder.tracks.selectedTrack.frameCount; index++) {
    const { image } = await decoder.decode({ frameIndex: index })
    const paint = new OffscreenCanvas(image.displayWidth, image.displayHeight).getContext('2d')
    paint.drawImage(image, 0, 0)
    const { displayWidth, displayHeight } = image
    image.close()
    const { data: pixels, width } = paint.getImageData(0, 0, displayWidth, displayHeight)
    let [sum, weight] = [0, 0]
    for (let at = 0; at < pixels.length; at += 4) {
      const red = Math.max(0, pixels[at] - pixels[at + 2])
      sum += red * ((at / 4) % width)
      weight += red
    }
    pictures.push({ corner: [...pixels.slice(0, 3)], red: weight / (pixels.length / 4), at: sum / (weight || 1) / width })
  }
  return { line, pictures, step: Number(element.alt.split('/')[0]) }
})""".replace("WHOLE", WHOLE)
# A run of so many steps, or of as many as take this machine eight seconds.
RUN = """(() => {
  const widget = (name) => WHOLE.widgets.find((one) => one.name === name)
  widget('steps').value = STEPS || Math.min(1000, Math.max(40, Math.round(8 * sessionStorage.pace)))
  widget('length').value = LENGTH
  sessionStorage.began = Date.now()
  app.queuePrompt(0)
})()""".replace("WHOLE", WHOLE)
SEEN = """(PROMISED)(async () => {
  const said = await PANEL()
  if (!said.pictures) return null
  sessionStorage.pace = 2 * said.step / (Date.now() - sessionStorage.began) * 1000
  return said
}, 60)""".replace("PROMISED", PROMISED).replace("PANEL", PANEL)
GONE = f"({PROMISED})(async () => {{ const said = await {PANEL}(); return !said.line && !said.pictures && 'gone' }}, 20)"
# Every line that is shown until the run is done, and the pictures that were shown last.
LINES = """(async () => {
  const lines = new Set()
  let pictures
  await (PROMISED)(async () => {
    const said = await PANEL()
    lines.add(said.line)
    pictures = said.pictures ?? pictures
    return said.line.includes(DONE)
  }, 90)
  return { lines: [...lines], pictures }
})()""".replace("PROMISED", PROMISED).replace("PANEL", PANEL)
SAVED = f"app.rootGraph.serialize().nodes.find((one) => String(one.id) === String({WHOLE}.id)).size[1]"
OFF = f"({PROMISED})(async () => (await {PANEL}()).said, 60)"
TYPE = """(() => {
  const node = LiteGraph.createNode(KIND)
  app.rootGraph.add(node)
  for (const [name, value] of Object.entries(VALUES)) {
    const widget = node.widgets.find((one) => one.name === name)
    widget.value = value
    widget.callback?.(value)
  }
  window.tried = node
})()"""
SET = "app.extensionManager.setting.set(NAME, VALUE)"
SAID = "window.tried.widgets.find((one) => one.name === NAME)?.element.textContent"
ANSWER = f"({PROMISED})(() => {SAID}, 20)"
GREY = "['width', 'height'].map((name) => Boolean(window.tried.widgets.find((one) => one.name === name).disabled))"
# Heights of a node and of two copies, each of the one before; then what is said once a wire brings the length, and inside the one node of the template.
COPIES = """(async () => {
  const heights = []
  for (let node = window.tried; heights.length < 3; app.rootGraph.add((node = node.clone()))) {
    await new Promise((done) => setTimeout(done, 1500))
    heights.push(node.size[1])
  }
  return heights
})()"""
WIRED = f"""(async () => {{
  const text = LiteGraph.createNode('PrimitiveString')
  app.rootGraph.add(text)
  text.connect(0, window.tried, window.tried.inputs.findIndex((one) => one.name === 'length'))
  await new Promise((done) => setTimeout(done, 1500))
  const lines = (node) => (node.widgets ?? []).filter((one) => /^open_sora_/.test(one.name)).map((one) => one.element.textContent)
  return [lines(window.tried), {WHOLE}.subgraph.nodes.flatMap(lines)]
}})()"""
LOADER = """(async () => {
  const [text, loader] = ['OpenSoraT5TextEncode', 'OpenSoraTextEncoderLoader'].map((kind) => app.rootGraph.add(LiteGraph.createNode(kind)))
  loader.connect(0, text, 0)
  const said = []
  for (const name of ['t5xxl_fp16.safetensors', SMALL]) {
    const widget = loader.widgets.find((one) => one.name === 't5_name')
    widget.value = name
    widget.callback?.(name)
    await new Promise((done) => setTimeout(done, 3000))
    said.push(text.widgets.find((one) => one.name === 'open_sora_tokens')?.element.textContent)
  }
  return said
})()"""

SMALL = "small (built in)"
PLANNED = {
    "1": {"class_type": "OpenSoraPreflight", "inputs": {"width": 64, "height": 64, "num_frames": 17, "model_name": SMALL, "precision": "auto", "offload": "auto"}},
    "2": {"class_type": "OpenSoraModelLoader", "inputs": {"model_name": SMALL, "precision": ["1", 1], "offload": ["1", 2], "budget_gib": 8}},
    "3": {"class_type": "OpenSoraLoadedModels", "inputs": {"any": ["2", 0], "unload": "none", "keep_gib": 0}},
}  # fmt: skip
# What the two nodes that report show, line by line, and how much of it a person has to scroll for.
REPORTS = f"""(async () => {{
  await app.loadApiJson({json.dumps(PLANNED)}, 'plan')
  app.queuePrompt(0)
  const boxes = () => ['1', '3'].map((id) => app.rootGraph.getNodeById(id).widgets.find((one) => one.name === 'open_sora_report')?.element)
  await ({PROMISED})(() => boxes().every(Boolean), 60)
  await new Promise((done) => setTimeout(done, 1000))
  return boxes().map((box) => ({{ lines: [...box.children].map((one) => one.textContent), hidden: box.scrollHeight - box.clientHeight }}))
}})()"""


def fill(script: str, **values) -> str:
    for name, value in values.items():
        script = script.replace(name, json.dumps(value))
    return script


def set_to(name: str, value: str) -> list:
    return [fill(SET, NAME=name, VALUE=value), 0]


def ask_for(steps: int, frames: int = 17) -> list:
    return [fill(RUN, STEPS=steps, LENGTH=str(frames)), 0]


def typed(kind: str, values: dict) -> list:
    return [fill(TYPE, KIND=kind, VALUES=values), 0]


@pytest.fixture(scope="module")
def said(server) -> dict:
    template = json.loads((comfy.PACK / "workflows" / "01 Text to video, no download.json").read_text(encoding="utf-8"))
    length, tokens = fill(ANSWER, NAME="open_sora_size"), fill(ANSWER, NAME="open_sora_tokens")
    run = [
        ask_for(1000, 33), [SEEN, 0], ["reload", 0], [SEEN, 0], ["app.api.interrupt()", 0], [GONE, 0],
        ask_for(0), [fill(LINES, DONE="Done"), 0],
        set_to("Comfy.Execution.PreviewMethod", "none"), ask_for(11), [OFF, 0],
        set_to("Comfy.Execution.PreviewMethod", "default"), [SAVED, 0],
    ]  # fmt: skip
    typing = [
        typed("OpenSoraEmptyLatentVideo", {"length": "7s"}), [length, 1], [GREY, 0],
        typed("OpenSoraEmptyLatentVideo", {"resolution": "custom", "width": 64, "height": 64, "length": "abc"}), [length, 1], [GREY, 0],
        typed("OpenSoraT5TextEncode", {"prompt": "waves roll in, " * 300}), [tokens, 1],
    ]  # fmt: skip
    copied = [
        typed("OpenSoraEmptyLatentVideo", {"length": "7s"}),
        [COPIES, 0],
        [WIRED, 0],
        typed("OpenSoraEmptyLatentHighCompression", {"length": "0"}),
        [length, 1],
        [fill(LOADER, SMALL=SMALL), 0],
    ]
    chinese = [set_to("Comfy.Locale", "zh"), typed("OpenSoraEmptyLatentVideo", {"length": "7s"}), [length, 1],
               ask_for(10), [fill(LINES, DONE="完成"), 0],
               set_to("Comfy.Locale", "en")]  # fmt: skip
    jobs = [
        {"name": "run", "then": run},
        {"name": "typed", "then": typing},
        {"name": "copied", "then": copied},
        {"name": "zh", "then": chinese},
        {"name": "plan", "then": [[REPORTS, 0]]},
    ]
    return front_end.look(server.url, [job | {"workflow": template, "vue": job["name"] == "typed"} for job in jobs])


def test_the_clip_moves_in_its_colours(said):
    pictures = said["run"]["then"][7]["pictures"]
    assert len(pictures) == 5, "of 17 frames"
    for picture in pictures:
        red, _, blue = picture["corner"]
        assert blue > red + 40 and picture["red"] > 3, "a red circle on blue is red on blue"
    assert pictures[-1]["at"] > pictures[0]["at"] + 0.05, "it goes right, as the prompt says"
    assert said["run"]["errors"] == []


def test_the_clip_is_there_after_a_reload(said):
    before, after = said["run"]["then"][1], said["run"]["then"][3]
    assert before and after and after["step"] >= before["step"] and len(after["pictures"]) == 9


def test_a_picture_does_not_change_the_height_that_is_saved(said):
    template = json.loads((comfy.PACK / "workflows" / "01 Text to video, no download.json").read_text(encoding="utf-8"))
    height = next(node["size"][1] for node in template["nodes"] if node["id"] == 11)
    assert said["run"]["then"][12] <= height + 40, "the front-end's own line; also where the page was reloaded meanwhile"


def test_words_and_pictures_go_when_a_run_is_stopped(said):
    assert said["run"]["then"][5] == "gone"


def test_progress_is_in_words_that_fit_a_line_and_in_the_language_of_the_front_end(said):
    english, chinese = said["run"]["then"][7]["lines"], said["zh"]["then"][4]["lines"]
    assert len(english) > 2 and all(len(line) <= 40 for line in english + chinese)
    assert any(line.startswith("Step ") for line in english) and english[-1].startswith("Done in ")
    assert any(line.startswith("第 ") for line in chinese) and "完成" in chinese[-1]


def test_where_previews_are_off_the_node_says_where_they_are_switched_on(said):
    assert "Live preview method: auto" in said["run"]["then"][10]


def test_reports_begin_with_the_verdict_and_are_seen_whole(said):
    plan, loaded = said["plan"]["then"][0]
    assert plan["lines"][0].startswith("Fits: ") and [line.split(":")[0] for line in plan["lines"][1:4]] == ["text", "sampling", "decode"]
    assert "80 forwards" in plan["lines"][4] and " loaded: " in loaded["lines"][0]
    assert any("OpenSora2Model" in line for line in loaded["lines"][1:])
    assert plan["hidden"] <= 0 and loaded["hidden"] <= 0, "the node is tall enough"
    assert said["plan"]["errors"] == []


def test_a_length_in_seconds_is_answered_and_sides_are_grey_unless_custom(said):
    _, frames, grey, _, wrong, sides, _, tokens = said["typed"]["then"]
    assert frames == "169 frames, 7.0 s · 336 x 192" and grey == [True, True]
    assert wrong == "abc? · 64 x 64" and sides == [False, False]
    assert tokens.startswith("T5 ") and "/512 · CLIP " in tokens and "cut: " in tokens
    assert said["typed"]["errors"] == []


def test_a_node_that_is_copied_does_not_grow(said):
    first, *others = said["copied"]["then"][1]
    assert others == [first, first]


def test_of_what_comes_over_a_wire_nothing_is_said(said):
    outside, inside = said["copied"]["then"][2]
    assert outside == ["336 x 192"] and inside == ["64 x 64"]
    assert said["copied"]["errors"] == []


def test_a_length_that_the_host_refuses_is_called_wrong(said):
    assert said["copied"]["then"][4].startswith("0? · ")


def test_a_prompt_is_counted_by_the_encoder_that_is_chosen(said):
    other, small = said["copied"]["then"][5]
    assert "/512 · CLIP " in other and "/32 · CLIP " in small


def test_answers_are_in_the_language_of_the_front_end(said):
    assert said["zh"]["then"][2] == "169 帧,7.0 秒 · 336 x 192"
