"""Every node has a help page and texts in both languages, complete, true to its schema, and up to date."""

import json
import re

import pytest
from PIL import Image

from demo import comfy, help_pages, host_record
from opensora_core.text.prompt_1x import CAMERA_MOTIONS

NODES = {name: info for name, info in host_record.read()["nodes"].items() if name.startswith("OpenSora")}
LANGUAGES = tuple(help_pages.WORDS)
SHIFTS = ("5.73", "11.87")  # 256px and 768px, 129 frames


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODES)
def test_help_page_names_every_input_and_output(node_id, language):
    page = help_pages.page_path(node_id, language).read_text(encoding="utf-8")
    schema = host_record.schema_of(NODES[node_id])
    for name in [item["name"] for item in schema["inputs"]] + [name for _, name in schema["outputs"]]:
        assert f"\n- `{name}`" in page
    hand_written = re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", page, flags=re.S)
    assert len(hand_written) > 200, "a page says more than its lists"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODES)
def test_help_page_has_a_picture_a_cost_and_three_errors_with_cures(node_id, language):
    page, words = help_pages.page_path(node_id, language).read_text(encoding="utf-8"), help_pages.WORDS[language]
    assert f"](pictures/{node_id}.webp)" in page
    with Image.open(help_pages.DOCS / "pictures" / f"{node_id}.webp") as picture:
        assert picture.width > 250 and picture.height > 100
    cost, errors = (page.split(f"## {words[name]}\n\n")[1].split("\n<!-- ")[0] for name in ("cost", "errors"))
    assert len(cost) > 10 and len(re.findall("^- .{15}", errors, re.M)) == 3


def test_what_pages_say_goes_wrong_is_said_so():
    """The English quotes stand in our sources, piece by piece between what changes."""
    sources = [path.read_text(encoding="utf-8") for room in ("opensora_core", "nodes") for path in (comfy.PACK / room).rglob("*.py")]
    whole = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    pattern = re.compile(r"(?<!\*)\*([^*]+)\*(?!\*)")
    for said, *_ in json.loads(help_pages.FACTS.read_text(encoding="utf-8"))["errors"].values():
        for quote in pattern.findall(said):
            for piece in filter(None, (piece.strip(" ;,:") for piece in re.split("…|/", quote))):
                assert piece in whole, f"{quote!r}: nothing says {piece!r}"


def test_help_pages_and_readme_are_up_to_date():
    stale = [path.name for path, text in help_pages.pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    assert not stale, "run python -m demo.help_pages"


def test_no_help_page_for_a_node_that_is_not_there():
    pages = {path.stem for path in help_pages.DOCS.glob("*.md")} | {path.name for path in help_pages.DOCS.iterdir() if path.is_dir()} - {
        "pictures"
    }
    assert pages == set(NODES)


@pytest.mark.parametrize("node_id", ["OpenSoraScheduler", "OpenSoraRectifiedFlowSampler"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_sampling_pages_give_the_shifts_a_stock_sampler_needs(node_id, language):
    page = help_pages.page_path(node_id, language).read_text(encoding="utf-8")
    assert "KSampler" in page
    for shift in SHIFTS:
        assert shift in page


def test_the_shifts_of_the_pages_are_the_schedules():
    from opensora_core.sampling.schedule import flow_shift

    # tokens of a frame = pixels / 16^2
    found = [round(flow_shift(height * width // 256, 33), 2) for height, width in ((192, 336), (576, 1024))]
    assert tuple(f"{shift:.2f}" for shift in found) == SHIFTS


KEEPS = ("RectifiedFlowSampler", "Guider", "TiledVAEDecode", "FluxPicture", "FluxToVideo", "ContinueVideo")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node", KEEPS)
def test_pages_say_where_kept_latents_are(node, language):
    page = help_pages.page_path(f"OpenSora{node}", language).read_text(encoding="utf-8")
    assert "open-sora-kept" in page and "LoadLatent" in page


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODES)
def test_translation_is_complete(node_id, language):
    text, schema = help_pages.texts(language)[node_id], host_record.schema_of(NODES[node_id])
    assert text["display_name"] and text["description"]
    assert set(text["inputs"]) == {item["name"] for item in schema["inputs"]}
    assert list(text["outputs"]) == [str(number) for number in range(len(schema["outputs"]))]
    for part in (*text["inputs"].values(), *text["outputs"].values()):
        assert part["name"] and part["tooltip"]


def test_english_texts_are_the_schemas():
    assert help_pages.texts("en") == host_record.english(NODES)


def test_the_tooltip_names_every_camera_motion():
    assert ", ".join(CAMERA_MOTIONS) in help_pages.texts("en")["OpenSoraT5TextEncode"]["inputs"]["camera_motion"]["tooltip"]


def test_translations_name_only_nodes_that_are_there():
    assert set(help_pages.texts("zh")) == set(NODES)


def test_every_part_of_a_category_has_a_chinese_name():
    names = json.loads((comfy.PACK / "locales" / "zh" / "main.json").read_text(encoding="utf-8"))["nodeCategories"]
    for info in NODES.values():
        assert set(info["category"].split("/")) <= set(names)
        assert info["category"].startswith("Open-Sora/")


@pytest.mark.parametrize(
    "word, nodes",
    [
        ("seconds", ("EmptyLatentVideo", "EmptyLatent", "EmptyLatentHighCompression")),
        ("length", ("EmptyLatentVideo", "EmptyLatent", "EmptyLatentHighCompression")),
        ("时长", ("EmptyLatentVideo", "EmptyLatent", "EmptyLatentHighCompression")),
        ("text to video", ("T5TextEncode", "EmptyLatentVideo", "EmptyLatent", "RectifiedFlowSampler", "FluxToVideo")),
        ("文生视频", ("T5TextEncode", "EmptyLatentVideo", "EmptyLatent", "RectifiedFlowSampler", "FluxToVideo")),
        ("图生视频", ("ImageToVideo", "VideoToVideo", "RectifiedFlowSampler")),
        ("首尾帧", ("ImageToVideo",)),
        ("长视频", ("ContinueVideo",)),
        ("显存", ("Preflight",)),
        ("提示词", ("T5TextEncode", "PromptHelper")),
    ],
)
def test_words_that_people_look_for_find_the_right_nodes(word, nodes):
    """By an alias that is the word itself, which the front-end's search puts before names that only hold it."""
    assert {name.removeprefix("OpenSora") for name, info in NODES.items() if word in info.get("search_aliases", ())} == set(nodes)
