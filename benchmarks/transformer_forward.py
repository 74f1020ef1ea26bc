"""One transformer forward against its nearest relatives, interleaved in one run.

    python -m benchmarks.transformer_forward [--hidden 768 --depth 2 --depth-single 4 --rounds 9]

Compares ours with diffusers' Flux transformer and, where a ComfyUI is found (COMFYUI_PATH, with its packages
importable), ComfyUI's Flux: equal widths, depths and tokens, random weights. Every round runs each once, so
that a noisy machine disturbs all alike; the figure that counts is the ratio of medians.
"""

import argparse
import os
import statistics
import sys
import time

import torch

from opensora_core.networks.mmdit.config import TransformerConfig
from opensora_core.networks.mmdit.model import MMDiT

from . import record


def fill(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(0.02).to(parameter)
    return module.requires_grad_(False).train(False)


def ours(args, inputs):
    config = TransformerConfig(
        16, 2, args.hidden, args.hidden // 128, 4 * args.hidden, args.depth, args.depth_single, 4096, 768, True, False
    )
    model = fill(MMDiT(config, dtype=inputs["dtype"], device=inputs["device"]))
    cond = inputs["x"].new_zeros(1, 17, *inputs["x"].shape[2:])
    return lambda: model(inputs["x"], inputs["t"], inputs["context"], inputs["y"], cond)


def diffusers_flux(args, inputs):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=args.depth,
        num_single_layers=args.depth_single,
        num_attention_heads=args.hidden // 128,
    ).to(inputs["device"], inputs["dtype"])
    fill(model)
    kwargs = {
        "hidden_states": inputs["tokens"],
        "encoder_hidden_states": inputs["context"],
        "pooled_projections": inputs["y"],
        "timestep": inputs["t"],
        "img_ids": inputs["img_ids"],
        "txt_ids": inputs["txt_ids"],
        "return_dict": False,
    }
    return lambda: model(**kwargs)


def comfy_flux(args, inputs):
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        raise ImportError("COMFYUI_PATH is not set")
    sys.path.insert(0, path)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = inputs["device"] == "cpu"
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=args.hidden, mlp_ratio=4.0,
        num_heads=args.hidden // 128, depth=args.depth, depth_single_blocks=args.depth_single, axes_dim=[16, 56, 56], theta=10000,
        patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[], dtype=inputs["dtype"], device=inputs["device"],
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    fill(model)
    ids = [inputs[name][None] for name in ("img_ids", "txt_ids")]
    return lambda: model.forward_orig(inputs["tokens"], ids[0], inputs["context"], ids[1], inputs["t"], inputs["y"])


def make_inputs(args, device, dtype):
    frames, height, width = args.latent
    x = torch.randn(1, 16, frames, height, width, dtype=dtype, device=device)
    tokens = frames * height * width // 4
    ids = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, height // 2, width // 2)), indexing="ij"), -1)
    return {
        "device": device,
        "dtype": dtype,
        "x": x,
        "tokens": torch.randn(1, tokens, 64, dtype=dtype, device=device),
        "t": torch.full((1,), 0.7, dtype=dtype, device=device),
        "context": torch.randn(1, 512, 4096, dtype=dtype, device=device),
        "y": torch.randn(1, 768, dtype=dtype, device=device),
        "img_ids": ids.reshape(-1, 3).float(),
        "txt_ids": torch.zeros(512, 3, device=device),
    }


def measure(runs: dict, rounds: int, device: str) -> tuple[dict, dict]:
    """Wall seconds and processor seconds of every run; the second does not count time given to other programs."""
    seconds, processor = {name: [] for name in runs}, {name: [] for name in runs}
    for index in range(rounds + 1):  # the first round warms up
        order = list(runs) if index % 2 else list(reversed(runs))
        for name in order:
            start, worked = time.perf_counter(), time.process_time()
            runs[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - worked)
    return seconds, processor


def ratio_to_fastest(seconds: dict[str, list[float]]) -> tuple[dict[str, float], float | None]:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    others = [value for name, value in medians.items() if name != "opensora_core"]
    return medians, medians["opensora_core"] / min(others) if others else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768, help="width, a multiple of 128")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--depth-single", type=int, default=4)
    parser.add_argument("--latent", type=int, nargs=3, default=(5, 24, 42), metavar=("T", "H", "W"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", help="where to write the JSON (default benchmarks/results)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = make_inputs(args, device, torch.bfloat16 if device == "cuda" else torch.float32)
    runs, absent = {"opensora_core": ours(args, inputs)}, {}
    for name, make in (("diffusers FluxTransformer2DModel", diffusers_flux), ("ComfyUI Flux", comfy_flux)):
        try:
            runs[name] = make(args, inputs)
        except ImportError as error:
            absent[name] = str(error)
    with torch.inference_mode():
        seconds, processor = measure(runs, args.rounds, device)
    medians, ratio = ratio_to_fastest(seconds)
    work, work_ratio = ratio_to_fastest(processor)
    for name in runs:
        print(f"{name:34s} median {medians[name]:.4f} s, processor {work[name]:.4f} s   {[round(t, 3) for t in seconds[name]]}")
    for name, why in absent.items():
        print(f"{name:34s} not compared: {why}")
    print(f"ours / fastest other = {ratio:.3f} (processor time {work_ratio:.3f})" if ratio else "nothing to compare with")
    figures = {"settings": vars(args), "dtype": str(inputs["dtype"]), "seconds": seconds, "median": medians, "ratio": ratio}
    figures |= {"processor_seconds": processor, "processor_ratio": work_ratio, "absent": absent}
    print("written:", record.write("transformer_forward", figures, args.out).name)


if __name__ == "__main__":
    main()
