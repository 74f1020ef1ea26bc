"""What every node asks of its inputs: defaults for what is left out, limits in its own code, one sentence for one fault under one input."""

import asyncio
import inspect
import math
import re

import pytest
import torch

FILES = {
    "OpenSoraModelLoader": {"model_name": "Open_Sora_v2.safetensors"},
    "OpenSoraTextEncoderLoader": {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"},
    "OpenSoraVAELoader": {"vae_name": "hunyuan_vae.safetensors"},
    "OpenSoraLoraLoader": {"lora_name": "any.safetensors"},
    "OpenSoraQuantize": {"model_name": "Open_Sora_v2.safetensors"},
    "OpenSoraPreflight": {"model_name": "Open_Sora_v2.safetensors"},
    "OpenSoraVideoDataset": {"folder": "clips"},
}
TEXTS = {"prompt": "a cat", "prompts": "a cat\na dog"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


@pytest.fixture(scope="module")
def ours(pack, base) -> dict:
    (base / "input/clips").mkdir(parents=True, exist_ok=True)
    (base / "input/clips/a.txt").write_text("a cat")
    return {node.GET_SCHEMA().node_id: node for node in pack("nodes").NODES}


@pytest.fixture(scope="module")
def error(pack):
    return pack("opensora_core.errors").OpenSoraError


def widgets(node) -> list:
    return [item for item in node.define_schema().inputs if item.get_io_type() in WIDGETS]


def defaulted(node) -> list:
    return [item for item in widgets(node) if item.default is not None]


class Anything:
    """A node whose output goes into any socket, as some of other packs'."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("*",), "run", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (None,)


@pytest.fixture
def check(monkeypatch, base):
    """The host's own check of a prompt with one node: check(id, inputs) -> [(input, sentence)] of what is wrong."""
    import execution

    import nodes

    (base / "models/loras/any.safetensors").touch()
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "TestAnything", Anything)

    def run(node_id: str, inputs: dict, node=None) -> list[tuple[str, str]]:
        sockets = [item.id for item in node.define_schema().inputs if item.get_io_type() not in WIDGETS and not item.optional]
        wired = {name: ["any", 0] for name in sockets}
        prompt = {"any": {"class_type": "TestAnything", "inputs": {}}, "it": {"class_type": node_id, "inputs": {**inputs, **wired}}}
        is_valid, errors, _ = asyncio.run(execution.validate_inputs("prompt", prompt, "it", {}, []))
        assert is_valid == (not errors)
        return [(one["extra_info"].get("input_name", ""), f"{one['message']}: {one['details']}") for one in errors]

    return run


def given(node_id: str, node) -> dict:
    """Every widget at its default."""
    return {**{item.id: item.default for item in defaulted(node)}, **FILES.get(node_id, {}),
            **{name: text for name, text in TEXTS.items() if name in {item.id for item in widgets(node)}}}  # fmt: skip


def test_an_input_with_a_default_may_be_left_out(ours, check):
    count = 0
    for node_id, node in ours.items():
        whole = given(node_id, node)
        assert check(node_id, whole, node) == [], node_id
        for item in defaulted(node):
            if item.id in TEXTS:
                continue
            count += 1
            assert check(node_id, {name: value for name, value in whole.items() if name != item.id}, node) == [], f"{node_id}.{item.id}"
    assert count > 100


def test_the_signatures_agree_with_the_schemas(ours):
    for node_id, node in ours.items():
        parameters = inspect.signature(inspect.unwrap(vars(node)["execute"].__func__)).parameters
        for item in defaulted(node):
            assert parameters[item.id].default in (inspect.Parameter.empty, item.default), f"{node_id}.{item.id}"


def test_what_was_left_out_is_the_default_when_it_runs(run_node):
    latent, width, height, _ = run_node("OpenSoraEmptyLatentVideo")
    assert latent["samples"].shape == (1, 16, 33, 24, 42) and (width, height) == (336, 192)


def test_fingerprints_too(ours):
    for node_id, node in ours.items():
        if "fingerprint_inputs" in vars(node) and node_id != "OpenSoraLoraLoader":
            node.fingerprint_inputs(**FILES.get(node_id, {}))


FAULTS = [
    ("OpenSoraEmptyLatentVideo", {"num_frames": 10}, "num_frames", "Use 9 or 13"),
    ("OpenSoraEmptyLatentVideo", {"resolution": "custom", "width": 100}, "width", "64x96|192x96"),
    ("OpenSoraEmptyLatentVideo", {"resolution": "custom", "height": 100}, "height", "96x336"),
    ("OpenSoraEmptyLatentVideo", {"height": 8208}, "height", "height=8208 is out of range"),
    ("OpenSoraEmptyLatentVideo", {"width": 10**6}, "width", "is out of range"),
    ("OpenSoraEmptyLatentVideo", {"num_frames": 10**12 + 1}, "num_frames", "is out of range"),
    ("OpenSoraEmptyLatentVideo", {"num_frames": 10**400 + 1}, "num_frames", "more than 40 digits"),
    ("OpenSoraEmptyLatentVideo", {"resolution": "300px"}, "resolution", "Use one of 256px"),
    ("OpenSoraEmptyLatentVideo", {"batch_size": 0}, "batch_size", "smaller than min"),
    ("OpenSoraEmptyLatentHighCompression", {"num_frames": 126}, "num_frames", "Use 124 or 128"),
    ("OpenSoraEmptyLatentHighCompression", {"height": 8224}, "height", "is out of range"),
    ("OpenSoraPreflight", {"num_frames": 10}, "num_frames", "Use 9 or 13"),
    ("OpenSoraPreflight", {"height": 8208}, "height", "is out of range"),
    ("OpenSoraFluxToVideo", {"num_frames": 10**12 + 1}, "num_frames", "is out of range"),
    ("OpenSoraContinueVideo", {"context_frames": 10}, "context_frames", "Use 9 or 13"),
    ("OpenSoraContinueVideo", {"num_frames": 1029}, "num_frames", "is out of range"),
    ("OpenSoraTiledVAEDecode", {"tile_size": 100}, "tile_size", "tile_size=100"),
    ("OpenSoraTiledVAEDecode", {"tile_size": 8192}, "tile_size", "is out of range"),
    ("OpenSoraTiledVAEDecode", {"temporal_tile": 5}, "temporal_tile", "temporal_tile=5"),
    ("OpenSoraTiledVAEEncode", {"tile_size": 100}, "tile_size", "tile_size=100"),
    ("OpenSoraVAELoader", {"vae_name": "no\0such"}, "vae_name", "no such|not"),
]


@pytest.mark.parametrize(("node_id", "changes", "name", "words"), FAULTS)
def test_one_fault_is_one_sentence_under_one_input(node_id, changes, name, words, ours, check):
    for reverse in (False, True):  # whatever the order of the inputs in the prompt
        inputs = {**given(node_id, ours[node_id]), **changes}
        inputs = dict(reversed(inputs.items())) if reverse else inputs
        found = check(node_id, inputs, ours[node_id])
        assert [input_name for input_name, _ in found] == [name], found
        assert re.search(words, found[0][1]), found


def test_two_faults_are_two_sentences(ours, check):
    inputs = {**given("OpenSoraEmptyLatentVideo", ours["OpenSoraEmptyLatentVideo"]), "num_frames": 10, "resolution": "custom", "width": 100}
    found = dict(check("OpenSoraEmptyLatentVideo", inputs, ours["OpenSoraEmptyLatentVideo"]))
    assert found.keys() == {"num_frames", "width"} and "9 or 13" in found["num_frames"] and "multiples of 16" in found["width"]


def test_a_longer_video_is_not_refused_the_lengths_of_the_other_models(ours, check):
    inputs = {**given("OpenSoraContinueVideo", ours["OpenSoraContinueVideo"]), "num_frames": 51, "context_frames": 34}
    assert check("OpenSoraContinueVideo", inputs, ours["OpenSoraContinueVideo"]) == []


def test_every_limit_holds_when_a_node_runs(ours, error):
    """Whatever came over a wire: before anything else is looked at."""
    count, taken = 0, []
    for node_id, node in ours.items():
        whole = {**dict.fromkeys(item.id for item in node.define_schema().inputs if not item.optional), **given(node_id, node)}
        for item in widgets(node):
            if item.get_io_type() in ("INT", "FLOAT"):
                wrong = [
                    item.min - 1,
                    item.max + 1,
                    10**400,
                    "7",
                    True,
                    *([math.nan, math.inf] if item.get_io_type() == "FLOAT" else [1.5]),
                ]
            elif item.get_io_type() == "STRING":
                wrong = ["a\0b", "a\ud800b", 7, ["x"]]
            elif item.get_io_type() == "COMBO" and item.default is not None:
                wrong = ["no such thing", 7, ["x"], {"a": 1}]
            else:
                continue
            for value in wrong:
                count += 1
                try:
                    with torch.inference_mode():
                        node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**{**whole, item.id: value})
                    taken.append((node_id, item.id, value, "taken"))
                except error as refused:
                    if not re.search(rf"(^|[:.] ){item.id}[= ]", str(refused)):
                        taken.append((node_id, item.id, value, str(refused)))
    assert not taken
    assert count > 400


def test_what_people_see_is_as_declared(ours):
    for node in ours.values():
        shown = node.GET_NODE_INFO_V1()["input"]
        declared = {item.id for item in node.define_schema().inputs if not item.optional}
        assert set(shown["required"]) == declared


def test_an_empty_clip_that_no_machine_holds_is_refused(run_node, error):
    with pytest.raises(error, match="GiB"):
        run_node("OpenSoraEmptyLatentVideo", resolution="custom", width=8192, height=8192, num_frames=1025, batch_size=64)


def test_null_is_the_default(run_node):
    latent, *_ = run_node("OpenSoraEmptyLatentVideo", resolution=None, num_frames=None, batch_size=None)
    assert latent["samples"].shape == (1, 16, 33, 24, 42)


def test_the_defaults_of_a_node_of_lists_are_lists(ours, pack):
    found = pack("nodes.host.node")._defaults(ours["OpenSoraCalibrate"])
    assert found == {"seed": [0], "text_guidance": [7.5], "image_guidance": [3.0]}
