"""The host's own Flux against the library's, the same weights and text: one picture; when Flux leaves the device; what is no Flux."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

SIZE = {"aspect_ratio": "1:1", "resolution": "256px", "steps": 2}


@pytest.fixture(scope="module")
def files(base, pack):
    """A small random Flux dev in the official layout, under the host's model folders, in fp32: (transformer, autoencoder)."""
    config, autoencoder = pack("opensora_core.networks.mmdit.config"), pack("opensora_core.codecs.picture")
    sizes = {"hidden_size": 128, "num_heads": 1, "mlp_hidden_size": 512, "depth": 1, "depth_single_blocks": 1, "context_in_dim": 64}
    small = replace(config.FLUX_DEV, **sizes, vec_in_dim=64)
    dit = base / "models" / "diffusion_models" / "flux1-dev.safetensors"
    save_file(random(pack("opensora_core.families.table").manifest(small)), dit)
    decoder = autoencoder.PictureConfig(widths=(32, 64, 128, 128), has_encoder=False)
    weights = random(pack("opensora_core.families.table").manifest(decoder))
    vae = base / "models" / "vae" / "ae.safetensors"
    save_file(weights | {"encoder.down.0.block.0.conv1.weight": torch.zeros(128, 128, 3, 3)}, vae)
    return dit, vae


def random(manifest: dict) -> dict:
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in manifest.items():
        value = torch.randn(shape, generator=generator)
        is_gain = len(shape) == 1 and (name.endswith(".scale") or ("norm" in name and name.endswith("weight")))
        weights[name] = 1 + 0.1 * value if is_gain else value / max(1, value[0].numel()) ** 0.5 if len(shape) > 1 else 0.1 * value
    return weights


@pytest.fixture
def parts(files, run_node):
    (model,) = run_node("UNETLoader", unet_name=files[0].name, weight_dtype="default")
    (vae,) = run_node("VAELoader", vae_name=files[1].name)
    return model, vae


@pytest.fixture
def clip(run_node):
    names = {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"}
    return run_node("OpenSoraTextEncoderLoader", **names, precision="auto", device="auto")[0]


@pytest.mark.parametrize("schedule", ["open-sora", "flux"])
def test_the_host_s_picture_is_the_library_s(pack, parts, files, conditioning, relative_error, monkeypatch, schedule):
    host, painter = pack("nodes.host.flux"), pack("opensora_core.run.picture")
    request = painter.PictureRequest(64, 96, steps=4, schedule=schedule)
    model, vae = parts
    network, forwards = model.model.diffusion_model, []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *a, **k: forwards.append(k.get("guidance")) or forward(*a, **k))
    positive = conditioning(3)
    with torch.inference_mode():
        found = host.paint(model, vae, positive, request, 7, None)
    assert len(forwards) == 4 and float(forwards[0]) == 4.0
    side = {"context": positive[0][0], "y": positive[0][1]["pooled_output"]}
    text = pack("opensora_core.run.request").EncodedPrompt("", pack("opensora_core.sampling.run").TextCondition(side, side))
    placement = pack("opensora_core.memory.component").Placement(torch.device("cpu"), torch.float32)
    (expected,) = painter.paint(pack("opensora_core.run.parts").PictureNetworks(*files, placement), [(text, request, 7)])
    assert found.shape == expected.shape == (1, 64, 96, 3)
    assert expected.float().std() > 10
    assert (found * 255 - expected).abs().max() < 3  # the library rounds to 8 bits; the host may compute in half precision


def test_flux_leaves_the_device_when_asked(parts, clip, run_node):
    import comfy.model_management

    def is_loaded():
        return any(type(entry.model.model).__name__ == "Flux" for entry in comfy.model_management.current_loaded_models)

    given = {"flux_model": parts[0], "flux_vae": parts[1], "clip": clip, "prompt": "rain", "seed": 1, **SIZE}
    run_node("OpenSoraFluxPicture", **given)
    assert is_loaded()
    run_node("OpenSoraFluxPicture", **given, unload=True)
    assert not is_loaded()
    assert run_node("OpenSoraFluxPicture", **given)[0].shape == (1, 256, 256, 3)


def other(name: str, **unet_config):
    """A MODEL of another of the host's classes; nothing of it but its name is there."""
    import comfy.model_base

    inner = object.__new__(getattr(comfy.model_base, name))
    inner.__dict__["model_config"] = SimpleNamespace(unet_config=unet_config)
    return SimpleNamespace(model=inner)


@pytest.mark.parametrize(
    "name, config, sentence",
    [
        ("SDXL", {}, "flux_model holds SDXL, not Flux.1"),
        ("Chroma", {"image_model": "chroma"}, "flux_model holds Chroma, not Flux.1"),
        ("Flux2", {"image_model": "flux2"}, "flux_model holds Flux2, not Flux.1"),
        ("Flux", {"image_model": "flux", "in_channels": 96, "out_channels": 16}, "a Flux that begins with a picture"),
    ],
)
def test_other_models_get_a_sentence(pack, name, config, sentence):
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match=sentence):
        pack("nodes.host.flux").require_flux(other(name, **config))


def test_text_of_another_width_gets_a_sentence(pack, parts):
    request = pack("opensora_core.run.picture").PictureRequest(64, 64)
    positive = [[torch.zeros(1, 3, 4096), {"pooled_output": torch.zeros(1, 768)}]]
    with pytest.raises(pack("opensora_core.errors").OpenSoraError, match="give 4096 and 768 features and this Flux reads 64 and 64"):
        pack("nodes.host.flux").paint(*parts, positive, request, 1, None)


def test_prompts_are_encoded_once_for_picture_and_video(pack, clip, monkeypatch):
    host, text = pack("nodes.host.flux"), pack("nodes.host.text")
    pack("opensora_core.memory.loaded").PROMPTS.clear()
    asked, encode = [], text.encode
    monkeypatch.setattr(text, "encode", lambda clip, prompt, recipe: asked.append(prompt) or encode(clip, prompt, recipe))
    with torch.inference_mode():
        for _ in range(2):
            assert host.keep_prompts(clip, ["rain", "rain. 24 FPS.", ""], None)
    assert asked == ["rain", "rain. 24 FPS.", ""]


def test_the_nodes_that_stand_for_flux_to_video_are_given_all_that_it_was_given(parts, clip, run_node):
    """Every input at a value of its own. Flux is told to leave the device before the video's model enters."""
    from comfy_api.latest import io
    from comfy_execution.graph import DynamicPrompt

    import nodes

    (model,) = run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="default")
    (vae,) = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")
    wires = {name: [name, 0] for name in ("flux_model", "flux_vae", "clip", "model", "vae")}
    given = {"flux_model": parts[0], "flux_vae": parts[1], "clip": clip, "model": model, "vae": vae}
    settings = {
        "prompt": "a kite", "negative_prompt": "blur", "resolution": "768px", "aspect_ratio": "9:16", "num_frames": 9, "seed": 3, "steps": 6,
        "image_steps": 7, "flux_schedule": "flux", "flux_guidance": 2.5, "motion_score": 5, "fps": 12, "text_guidance": 5.0,
        "image_guidance": 2.0, "speed": "fast", "image_seed": 8, "image_resolution": "256px", "image_prompt": "a red kite",
    }  # fmt: skip
    prompt = DynamicPrompt({"1": {"class_type": "OpenSoraFluxToVideo", "inputs": wires | settings}})
    hidden = {io.Hidden.dynprompt: prompt, io.Hidden.unique_id: "1"}
    node = nodes.NODE_CLASS_MAPPINGS["OpenSoraFluxToVideo"].PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    with torch.inference_mode():
        output = node.EXECUTE_NORMALIZED(**given, **settings)
    made = {part["class_type"]: part["inputs"] for part in output.expand.values()}
    places = {part["class_type"]: name for name, part in output.expand.items()}

    def link(kind: str, slot: int) -> list:
        return [places[kind], slot]

    drawn, begun, finished = (link(kind, 0) for kind in ("OpenSoraFluxPicture", "OpenSoraImageToVideo", "OpenSoraRectifiedFlowSampler"))
    assert made == {
        "OpenSoraFluxPicture": {
            "flux_model": wires["flux_model"], "flux_vae": wires["flux_vae"], "clip": wires["clip"], "prompt": "a red kite", "aspect_ratio": "9:16",
            "seed": 8, "steps": 7, "flux_schedule": "flux", "flux_guidance": 2.5, "resolution": "256px", "unload": True,
        },
        "PreviewImage": {"images": drawn},
        "OpenSoraT5TextEncode": {
            "clip": wires["clip"], "prompt": "a kite", "negative_prompt": "blur", "motion_score": 5, "fps": 12, "keep_encoded": True,
        },
        "OpenSoraEmptyLatentVideo": {"resolution": "768px", "aspect_ratio": "9:16", "num_frames": 9},
        "OpenSoraImageToVideo": {
            "positive": link("OpenSoraT5TextEncode", 0), "negative": link("OpenSoraT5TextEncode", 1), "vae": wires["vae"],
            "latent": link("OpenSoraEmptyLatentVideo", 0), "start_image": drawn,
        },
        "OpenSoraRectifiedFlowSampler": {
            "model": wires["model"], "positive": begun, "negative": link("OpenSoraImageToVideo", 1), "latent": link("OpenSoraImageToVideo", 2),
            "seed": 3, "steps": 6, "text_guidance": 5.0, "image_guidance": 2.0, "speed": "fast",
        },
        "OpenSoraTiledVAEDecode": {"vae": wires["vae"], "latent": finished},
    }  # fmt: skip
    assert list(output.args) == [link("OpenSoraTiledVAEDecode", 0), drawn, finished]
