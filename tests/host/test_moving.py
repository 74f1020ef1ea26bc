"""Workflows of the earlier Open-Sora packs and of the CogVideoX wrapper: the host offers our nodes in the places of theirs."""

import pytest

from demo import host_record

# Widget values as the packs' own example workflows have them (repositories and commits in nodes/host/moving.py), and what ours then has.
EXAMPLES = {
    "OpenSoraRun": (["fp16"], {}),
    "OpenSoraDecoder": (["fp16"], {}),
    "OpenSoraEncoder": (["fp16"], {}),
    "OpenSoraTextEncoder": (
        ["A spaceship", "blurry", "zoom out", "enabled", 20, "disabled", 6.5],
        {"prompt": "A spaceship", "negative_prompt": "blurry", "camera_motion": "zoom out"},
    ),
    "CogVideoXModelLoader": (["cog.safetensors", "bf16", "disabled", "main_device", False, "sdpa"], {"model_name": "cog.safetensors"}),
    "CogVideoXVAELoader": (["vae.safetensors", "bf16"], {"vae_name": "vae.safetensors"}),
    "CogVideoTextEncode": (["a stag", 1, True], {"prompt": "a stag"}),
    "CogVideoSampler": ([49, 25, 6, 11, "fixed", "CogVideoXDDIM", 1], {"steps": 25, "text_guidance": 6, "seed": 11}),
    "CogVideoDecode": ([True, 240, 360, 0.2, 0.2, True], {}),
}
SCHEMAS = {name: host_record.schema_of(info) for name, info in host_record.read()["nodes"].items()}


@pytest.fixture(scope="module")
def offered(server) -> dict:
    """old node -> what the host offers in its place; ours alone."""
    listed = server.get("/node_replacements")
    return {old: each for old, (each, *_) in listed.items() if each["new_node_id"].startswith("OpenSora")}


def test_every_move_is_offered_and_no_other(offered):
    assert set(offered) == set(EXAMPLES)


@pytest.mark.parametrize("old", EXAMPLES)
def test_values_and_wires_go_where_they_mean_the_same(old, offered):
    one, (widgets, expected) = offered[old], EXAMPLES[old]
    schema = SCHEMAS[one["new_node_id"]]
    inputs, names = {item["name"] for item in schema["inputs"]}, one["old_widget_ids"]
    assert {each["new_id"] for each in one["input_mapping"]} <= inputs
    taken = {each["new_id"]: widgets[names.index(each["old_id"])] for each in one["input_mapping"] if each["old_id"] in names}
    assert taken == expected
    assert all(each["new_idx"] < len(schema["outputs"]) for each in one["output_mapping"])


@pytest.mark.parametrize("old", ["OpenSoraLoader", "OpenSoraSampler", "DownloadAndLoadCogVideoModel", "CogVideoImageEncode"])
def test_what_means_something_else_stays_missing(old, offered):
    assert old not in offered


def test_an_old_graph_runs_with_our_nodes_in_place(server, listen):
    old = {"_meta": {"title": "as it was"}}
    graph = {
        "vae": {"class_type": "CogVideoXVAELoader", "inputs": {"model_name": "hunyuan_vae.safetensors", "precision": "bf16"}, **old},
        "picture": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 32, "batch_size": 1, "color": 0}, **old},
        "encode": {"class_type": "OpenSoraEncoder", "inputs": {"vae": ["vae", 0], "image": ["picture", 0], "dtype": "fp16"}, **old},
        "decode": {"class_type": "OpenSoraDecoder", "inputs": {"vae": ["vae", 0], "latents": ["encode", 0], "dtype": "fp16"}, **old},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}, **old},
    }
    events = listen(graph)
    assert events.error is None and len(events.outputs["show"]["images"]) == 1


def test_a_prompt_that_moves_is_encoded_with_its_camera(listen):
    files = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors", "precision": "auto", "device": "auto"}
    text = {"text_encoder": ["clip", 0], "positive_prompt": "A spaceship", "negative_prompt": "", "camera_motion": "none"}
    graph = {
        "clip": {"class_type": "OpenSoraTextEncoderLoader", "inputs": files, "_meta": {}},
        "text": {"class_type": "OpenSoraTextEncoder", "inputs": text, "_meta": {}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}, "_meta": {}},
    }
    assert listen(graph).error is None
