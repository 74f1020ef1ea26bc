"""The host's own MultiGPU CFG Split under our guider: its clones, its scheduler of passes and its threads, on two devices that are both the CPU."""

from collections import Counter

import pytest
import torch
from test_speed import pair, parts

DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]  # two names of one device; the host keeps a model for each


@pytest.fixture
def loaders(run_node):
    return {
        "stock": lambda: run_node("UNETLoader", unet_name="Open_Sora_v2.safetensors", weight_dtype="default")[0],
        "ours": lambda: run_node("OpenSoraModelLoader", model_name="Open_Sora_v2.safetensors", precision="fp32")[0],
    }


@pytest.mark.parametrize(("loader", "speed", "is_given"), [("stock", "exact", True), ("ours", "draft", False), ("ours", "draft", True)])
def test_passes_are_shared_out_over_two_devices(loaders, run_node, conditioning, relative_error, monkeypatch, loader, speed, is_given):
    import comfy.model_management
    import comfy.patcher_extension

    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES)
    rows = Counter()

    def counting(executor, x, timestep, context, y, control, transformer_options):
        rows[transformer_options.get("multigpu_thread_device")] += x.shape[0]
        return executor(x, timestep, context, y, control, transformer_options)

    model = loaders[loader]().clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "count", counting)
    both = pair(conditioning, is_given)
    expected = parts(run_node, model, both, speed, speed)
    alone, _ = rows[None], rows.clear()
    (split,) = run_node("MultiGPU_WorkUnits", model=model, max_gpus=2)
    assert len(split.get_additional_models_with_key("multigpu")) == 1
    found = parts(run_node, split, both, speed, speed)
    assert relative_error(found, expected) < 2e-5
    assert rows.total() == alone and set(rows) == set(DEVICES)
    # Of a step with two or three passes one goes to the second device, or two; a step with one stays.
    assert min(rows.values()) >= alone / 4
