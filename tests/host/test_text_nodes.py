"""Prompts over HTTP: what is shown, and what is said of files and prompts that do not fit."""

import shutil

import pytest

from demo import comfy

T5, CLIP_L = "t5xxl.safetensors", "clip_l.safetensors"


def graph(prompt="raining, sea", t5=T5, clip_l=CLIP_L, loader=None, **changes) -> dict:
    """Encode a prompt and show its text; `loader` is another node to take the CLIP from."""
    files = {"t5_name": t5, "clip_l_name": clip_l, "precision": "auto", "device": "auto"}
    text = {"clip": ["clip", 0], "prompt": prompt, "negative_prompt": "", "motion_score": 4, "fps": 24}
    return {
        "clip": loader or {"class_type": "OpenSoraTextEncoderLoader", "inputs": files},
        "text": {"class_type": "OpenSoraT5TextEncode", "inputs": {**text, **changes}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["text", 2]}},
    }


def test_the_text_as_encoded_is_an_output(listen):
    events = listen(graph())
    assert events.error is None and events.outputs["show"]["text"] == ["raining, sea. 24 FPS. 4 motion score."]
    assert not events.texts
    assert listen(graph("raining, sea", motion_score=0, fps=0)).outputs["show"]["text"] == ["raining, sea."]


def test_a_cut_prompt_is_said_on_the_node(listen):
    [(node, line)] = listen(graph("a red cat, " * 300)).texts
    assert node == "text" and "tokens longer than the 512 that T5 reads; its end was dropped" in line


def test_a_wrong_file_is_one_sentence_and_the_queue_goes_on(server, listen):
    shutil.copy(server.base / "models" / "vae" / "hunyuan_vae.safetensors", server.base / "models" / "text_encoders" / "vae.safetensors")
    message = listen(graph(t5="vae.safetensors")).error["exception_message"].strip()
    assert message.startswith("Give a T5 v1.1 XXL encoder") and "vae.safetensors is a HunyuanVideo-layout VAE" in message
    assert "\n" not in message
    assert listen(graph("a cat")).error is None


def test_another_clip_is_one_sentence(server, listen):
    """CLIP-L alone, as a Stable Diffusion 1.5 CLIP. Written in its released sizes, with the weights left at zero."""
    import torch
    from safetensors.torch import save_file

    from opensora_core.encoders.clip import clip_manifest

    zeros = {name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in clip_manifest().items()}
    save_file(zeros, server.base / "models" / "text_encoders" / "clip_l_zeros.safetensors")
    loader = {
        "class_type": "CLIPLoader",
        "inputs": {"clip_name": "clip_l_zeros.safetensors", "type": "stable_diffusion", "device": "default"},
    }
    message = listen(graph(loader=loader)).error["exception_message"].strip()
    assert (
        message.startswith("Use Open-Sora Load Text Encoders")
        and "this CLIP holds another text encoder (SD1ClipModel); Open-Sora reads T5" in message
    )


@pytest.mark.parametrize("name", ["../vae/hunyuan_vae.safetensors", "/etc/hostname"])
def test_a_path_outside_is_refused(server, name):
    with pytest.raises(comfy.HostError, match="not in list"):
        server.run(graph(t5=name))


def test_numbers_out_of_range_are_refused_when_queued(server):
    for changes in ({"motion_score": 16}, {"fps": -1}):
        with pytest.raises(comfy.HostError, match="bigger than max|smaller than min"):
            server.run(graph(**changes))


@pytest.mark.parametrize("edited", ["", "A red kite climbs."])
def test_the_prompt_helper_loads_no_text_model_for_edited_text(edited, listen):
    """Asked, it says which CLIP it needs; the error's name, which the host prints before the sentence, is the product's."""
    # Values of no other test: a host with much RAM keeps outputs of earlier graphs, and a kept CLIP's loader does not run.
    files = {"t5_name": T5, "clip_l_name": CLIP_L, "precision": "bf16" if edited else "auto", "device": "cpu"}
    asked = {
        "clip": ["clip", 0],
        "prompt": "a kite",
        "kind": "text to video",
        "seed": 1,
        "max_length": 64,
        "temperature": 0.5,
        "edited": edited,
    }
    helper = {"class_type": "OpenSoraPromptHelper", "inputs": asked}
    show = {"class_type": "PreviewAny", "inputs": {"source": ["helper", 0]}}
    events = listen({"clip": {"class_type": "OpenSoraTextEncoderLoader", "inputs": files}, "helper": helper, "show": show})
    ran = {data.get("node") for kind, data in events.messages if kind == "executing"}
    if edited:
        assert events.error is None and events.outputs["show"]["text"] == [edited] and events.outputs["helper"]["text"] == [edited]
        assert "clip" not in ran
    else:
        assert "his CLIP (FluxClipModel) reads prompts and writes none" in events.error["exception_message"]
        assert events.error["exception_type"] == "Open-Sora.OpenSoraError" and "clip" in ran
