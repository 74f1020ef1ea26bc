"""Every node of the host that takes a MODEL and gives one, on our network: a run with it is made of numbers, or it fails on the host's own
Flux too (FAIL_ON_FLUX_TOO: a list that is held, not hidden)."""

import pytest
import torch
from test_flux import files  # noqa: F401 a small Flux in the host's model folders

SHAPE = (1, 16, 3, 6, 8)
# What these take is no part of a test machine, or of any model of this kind: patches, audio, pictures' encodings, devices, a compiler
# (which has a test of its own), files of a folder that is empty.
NOT_GIVEN = ("MODEL_PATCH", "AUDIO", "AUDIO_VAE", "AUDIO_ENCODER_OUTPUT", "CLIP_VISION_OUTPUT", "LORA_MODEL", "CLIP")
ELSEWHERE = {
    "TorchCompileModel",
    "MultiGPU_WorkUnits",
    "SelectModelDevice",
    "HypernetworkLoader",
    "LoraLoaderModelOnly",
    "LoraLoaderBypassModelOnly",
}
# UNets alone (FreeU), the attention of UNets (HyperTile and Tome know no positions), other models' own.
FAIL_ON_FLUX_TOO = {"FreeU", "FreeU_V2", "HyperTile", "TomePatchModel", "HiDreamO1PatchSeamSmoothing", "TripoSplatSamplingPreview"}


def nodes_on_models() -> dict:
    """{id: required inputs} of what takes a MODEL and gives one, and can be given what it takes."""
    import nodes

    found = {}
    for node_id, node in nodes.NODE_CLASS_MAPPINGS.items():
        if node_id.startswith(("OpenSora", "Test")) or node_id in ELSEWHERE or "MODEL" not in node.RETURN_TYPES:
            continue
        required = node.INPUT_TYPES().get("required", {})
        kinds = [entry[0] for entry in required.values()]
        if "MODEL" in kinds and not any(kind in NOT_GIVEN for kind in kinds if isinstance(kind, str)):
            found[node_id] = required
    return found


@pytest.fixture(scope="module")
def given(conditioning, run_node):
    """What a node is given: given(required, model) -> inputs by name."""
    latent = {"samples": torch.zeros(SHAPE)}
    by_kind = {
        "CONDITIONING": conditioning(2), "LATENT": latent, "IMAGE": torch.rand(1, 48, 64, 3), "MASK": torch.ones(1, 48, 64),
        "SIGMAS": torch.linspace(1, 0, 5),
    }  # fmt: skip

    def inputs(required: dict, model) -> dict:
        made = {}
        for name, (kind, *rest) in required.items():
            options = rest[0] if rest else {}
            if kind == "MODEL":
                made[name] = model
            elif kind == "VAE":
                made[name] = run_node("OpenSoraVAELoader", vae_name="hunyuan_vae.safetensors")[0]
            elif kind == "LATENT_OPERATION":
                made[name] = run_node("LatentOperationTonemapReinhard", multiplier=1.0)[0]
            elif isinstance(kind, list):
                made[name] = options.get("default", kind[0])
            elif kind == "COMBO":
                made[name] = options.get("default") or options["options"][0]
            elif kind in by_kind:
                made[name] = by_kind[kind]
            else:
                made[name] = options.get("default", {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}.get(kind))
        return made

    return inputs


def patched(run_node, node_id, inputs):
    import nodes

    outputs = run_node(node_id, **inputs)
    return outputs[nodes.NODE_CLASS_MAPPINGS[node_id].RETURN_TYPES.index("MODEL")]


def on_ours(run_node, model, conditioning):
    """The outcome of a run beyond the steps where oscillation begins."""
    return run_node(
        "OpenSoraRectifiedFlowSampler", model=model, positive=conditioning(1), negative=conditioning(2), latent={"samples": torch.zeros(SHAPE)},
        seed=3, steps=12,
    )[0]["samples"]  # fmt: skip


def on_flux(run_node, model, conditioning):
    text = [conditioning(seed)[0] for seed in (1, 2)]
    positive, negative = ([[context, {**values, "guidance": 3.5}]] for context, values in text)
    return run_node(
        "KSampler", model=model, seed=1, steps=4, cfg=3.0, sampler_name="euler", scheduler="simple", positive=[*positive], negative=[*negative],
        latent_image={"samples": torch.zeros(1, 16, 8, 8)}, denoise=1.0,
    )[0]["samples"]  # fmt: skip


def outcome(work) -> str:
    """ "" for a result that is made of numbers, else what went wrong."""
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 whatever a stock node raises
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if torch.isfinite(found).all() else "not finite"


def test_every_stock_node_on_a_model(run_node, model, given, conditioning, files):  # noqa: F811
    (flux,) = run_node("UNETLoader", unet_name=files[0].name, weight_dtype="default")
    assert not outcome(lambda: on_flux(run_node, flux, conditioning)) and not outcome(lambda: on_ours(run_node, model, conditioning))
    found, also = nodes_on_models(), {}
    ours_alone = {}
    for node_id, required in found.items():
        wrong = outcome(lambda: on_ours(run_node, patched(run_node, node_id, given(required, model.clone())), conditioning))  # noqa: B023
        if wrong:
            there = outcome(lambda: on_flux(run_node, patched(run_node, node_id, given(required, flux.clone())), conditioning))  # noqa: B023
            (also if there else ours_alone)[node_id] = f"{wrong} | Flux: {there}"
    assert not ours_alone, ours_alone
    assert len(found) > 60 and set(also) == FAIL_ON_FLUX_TOO, also
