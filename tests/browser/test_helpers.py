"""What web/js adds, in the real front-end with a new user's settings: the clip moves in its colours, a length and a prompt are answered."""

import json

import pytest

from demo import comfy, front_end

pytestmark = pytest.mark.browser
# The panel's picture as pixels: [how many blob pictures, colour of its corner, reddest pixel].
PANEL = """(() => {
  const node = app.rootGraph.nodes.find((one) => one.isSubgraphNode?.())
  const picture = node.widgets.find((one) => one.name === 'open_sora_panel')?.element
  if (!picture?.complete || !picture.naturalWidth) return null
  const canvas = Object.assign(document.createElement('canvas'), { width: picture.naturalWidth, height: picture.naturalHeight })
  const paint = canvas.getContext('2d')
  paint.drawImage(picture, 0, 0)
  const data = paint.getImageData(0, 0, canvas.width, canvas.height).data
  let reddest = -255
  for (let at = 0; at < data.length; at += 4) reddest = Math.max(reddest, data[at] - data[at + 2])
  return { corner: [data[0], data[1], data[2]], reddest, line: node.widgets.find((one) => one.name === '$$node-text-preview')?.value }
})()"""
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
LOCALE = "app.extensionManager.setting.set('Comfy.Locale', 'LANGUAGE')"
SAID = "window.tried.widgets.find((one) => one.name === NAME)?.element.textContent"
GREY = "['width', 'height'].map((name) => Boolean(window.tried.widgets.find((one) => one.name === name).disabled))"


def typed(kind: str, values: dict) -> str:
    return TYPE.replace("KIND", json.dumps(kind)).replace("VALUES", json.dumps(values))


@pytest.fixture(scope="module")
def said(server) -> dict:
    template = json.loads((comfy.PACK / "workflows" / "01 Text to video, no download.json").read_text(encoding="utf-8"))
    length, tokens = SAID.replace("NAME", "'open_sora_size'"), SAID.replace("NAME", "'open_sora_tokens'")
    watched = [[PANEL, 1] for _ in range(60)]
    helpers = [
        [typed("OpenSoraEmptyLatentVideo", {"length": "7s"}), 0], [length, 3], [GREY, 0],
        [typed("OpenSoraEmptyLatentVideo", {"resolution": "custom", "width": 64, "height": 64, "length": "abc"}), 0], [length, 3], [GREY, 0],
        [typed("OpenSoraT5TextEncode", {"prompt": "waves roll in, " * 300}), 0], [tokens, 8],
    ]  # fmt: skip
    moves = {"name": "run", "then": [["app.queuePrompt(0)", 0], *watched]}
    chinese = {
        "name": "zh",
        "then": [[LOCALE.replace("LANGUAGE", "zh"), 0], [typed("OpenSoraEmptyLatentVideo", {"length": "7s"}), 1], [length, 3],
                 [LOCALE.replace("LANGUAGE", "en"), 0]],
    }  # fmt: skip
    jobs = [moves, {"name": "typed", "then": helpers}, chinese]
    return front_end.look(server.url, [job | {"workflow": template, "vue": False} for job in jobs])


def test_the_clip_is_seen_in_its_colours_and_its_progress_in_words(said):
    pictures = [one for one in said["run"]["then"] if isinstance(one, dict)]
    assert pictures, "the panel was never there"
    red, _, blue = pictures[-1]["corner"]
    assert blue > red + 40 and pictures[-1]["reddest"] > 40, "a red circle on blue"
    lines = [one["line"] for one in pictures if one["line"]]
    assert lines and all(len(line) <= 40 for line in lines)
    assert said["run"]["errors"] == []


def test_a_length_in_seconds_is_answered_and_sides_are_grey_unless_custom(said):
    _, frames, grey, _, wrong, sides, _, tokens = said["typed"]["then"]
    assert frames == "169 frames, 7.0 s · 336 x 192" and grey == [True, True]
    assert wrong == "abc? · 64 x 64" and sides == [False, False]
    assert tokens.startswith("T5 ") and "/512 · CLIP " in tokens and "cut: " in tokens
    assert said["typed"]["errors"] == []


def test_answers_are_in_the_language_of_the_front_end(said):
    assert said["zh"]["then"][-2] == "169 帧,7.0 秒 · 336 x 192"
