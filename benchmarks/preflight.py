"""What preflight predicts beside what is allocated.

    python -m benchmarks.preflight

Every case runs one network once. Predicted is footprint.py's figure, from the module on the meta device. Measured on a CPU are the
storages that torch makes (counted) and what torch's allocator gave out by its own profiler (allocator), which is more
where a convolution library takes workspace through it; on a CUDA device it is the allocator's peak above what was there
before. On a CPU the networks are small, and one block of each kind of the released width; on a CUDA device they are the released
ones, at 256px and 768px. The released sizes are listed with what is predicted for them, measured or not.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from opensora_core.checkpoint.quantised import QuantisedOperations, precision_format
from opensora_core.choices import QUANTISED
from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.hunyuan.config import HUNYUAN_VAE, VAEConfig
from opensora_core.codecs.hunyuan.model import CausalVAE
from opensora_core.families.table import DEFAULT
from opensora_core.geometry import Tiling
from opensora_core.memory.count import AllocationCounter
from opensora_core.memory.estimate import Memory, Request, Settings, estimate
from opensora_core.memory.footprint import ModelSizes, forward_peak, tiled_peak
from opensora_core.memory.residency import GIB
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.shapes import manifest_of

from . import record

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"256px, 129 frames": (192, 336), "768px, 129 frames": (576, 1024)}
MEDIUM = TransformerConfig(16, 2, 512, 4, 2048, 2, 4, 4096, 768, True, False)
ONE_OF_EACH = replace(OPEN_SORA_2, depth=1, depth_single_blocks=1)


@dataclass(frozen=True)
class Case:
    name: str
    config: TransformerConfig | VAEConfig
    precision: str
    latent: tuple[int, ...]


CPU_CASES = (
    *(Case("transformer, width 512", MEDIUM, precision, (1, 16, 9, 24, 42)) for precision in ("fp32", "bf16", "fp8_e4m3fn")),
    Case("transformer, released width, one block of each kind", ONE_OF_EACH, "fp32", (1, 16, 2, 24, 42)),
    *(Case("VAE decode, widths 32 to 128", VAEConfig(16, (32, 64, 128, 128), 2), precision, (1, 16, 5, 16, 16)) for precision in PLAIN),
    Case("VAE decode, released widths", HUNYUAN_VAE, "fp32", (1, 16, 2, 8, 8)),
)


def cuda_cases():
    for name, (height, width) in SIZES.items():
        shape = Request(height, width).latent_shape(16)
        for precision in ("bf16", *QUANTISED):
            yield Case(f"transformer, released, {name}", OPEN_SORA_2, precision, shape)
        tile = (*shape[:3], min(32, shape[3]), min(32, shape[4]))
        yield Case(f"VAE decode, released, one tile of {name}", HUNYUAN_VAE, "bf16", tile)


def zeros(module: torch.nn.Module, device: str) -> torch.nn.Module:
    module.to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module.requires_grad_(False)


def transformer(case: Case, device: str) -> Callable[[], torch.Tensor]:
    dtype = PLAIN.get(case.precision, torch.bfloat16)
    model = MMDiT(case.config, QuantisedOperations, dtype=dtype, device="meta").requires_grad_(False)
    if case.precision in QUANTISED:
        form = precision_format(case.precision)
        for layer in DEFAULT.layers_to_quantise(manifest_of(model)):
            model.get_submodule(layer).keep_in(form)
    zeros(model, device)
    batch, channels, *extent = case.latent
    shapes = ((512, case.config.context_in_dim), (case.config.vec_in_dim,), (channels + 1, *extent))
    context, pooled, cond = (torch.zeros(batch, *shape, dtype=dtype, device=device) for shape in shapes)
    x, t = torch.zeros(case.latent, dtype=dtype, device=device), torch.ones(batch, device=device)
    return lambda: model(x, t, context, pooled, cond)


def decoder(case: Case, device: str) -> Callable[[], torch.Tensor]:
    model = zeros(CausalVAE(case.config, dtype=PLAIN[case.precision], device="meta"), device)
    latents = torch.zeros(case.latent, dtype=model.dtype, device=device)
    return lambda: model.decode(latents)


def predicted(case: Case) -> int:
    if isinstance(case.config, VAEConfig):
        return tiled_peak(case.config, case.precision, case.latent, Tiling(0))[0]
    return forward_peak(case.config, case.precision, case.latent)


def profiled(run: Callable) -> int:
    """Peak of what torch's CPU allocator gave out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    live = peak = 0
    events = (event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measured(case: Case, device: str) -> dict[str, int]:
    run = decoder(case, device) if isinstance(case.config, VAEConfig) else transformer(case, device)
    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            return {"allocator": torch.cuda.max_memory_allocated() - before}
        with AllocationCounter() as counter:
            run()
        return {"counted": counter.peak, "allocator": profiled(run)}


def released_plans() -> list[dict]:
    """Every stage of the released model in the least memory (offload minimal), in GiB."""
    memory = Memory("cuda", "any card", 80 * GIB, 80 * GIB, 128 * GIB, 128 * GIB)
    plans = []
    for name, (height, width) in SIZES.items():
        for precision in ("bf16", *QUANTISED):
            settings = Settings(precision, "minimal")
            request = Request(height, width, settings=settings)
            found = estimate(
                request, settings, ModelSizes(stored=precision if precision in ("bf16", "fp8_e4m3fn", "int8") else "bf16"), memory
            )
            stages = {stage.name: {item.name: round(item.num_bytes / GIB, 3) for item in stage.items} for stage in found.stages}
            totals = {stage.name: round(stage.num_bytes / GIB, 3) for stage in found.stages}
            plans.append({"size": name, "precision": precision, "gib": totals, "made_of": stages, "measured": None})
    return plans


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="where to write the JSON (default benchmarks/results)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        layers.CHUNK_ELEMENTS = layers.CHUNK_ELEMENTS_CPU  # the VAE's chunks are smaller here; the prediction's too
    rows = []
    for case in cuda_cases() if device == "cuda" else CPU_CASES:
        row = {"case": case.name, "precision": case.precision, "latent": case.latent, "predicted": predicted(case)}
        try:
            row |= {"measured": measured(case, device)}
        except torch.cuda.OutOfMemoryError:
            row |= {"measured": "out of memory"}
            torch.cuda.empty_cache()
        rows.append(row)
        ratios = (
            {name: round(row["predicted"] / value, 3) for name, value in row["measured"].items()}
            if isinstance(row["measured"], dict)
            else {}
        )
        row["predicted_over_measured"] = ratios
        print(
            f"{case.name:52s} {case.precision:11s} predicted {row['predicted'] / 2**20:9.1f} MiB   predicted / measured: {ratios}",
            flush=True,
        )
    layers.CHUNK_ELEMENTS = 2**26
    figures = {
        "device": device,
        "released_on_a_gpu": "measured above" if device == "cuda" else "not measured: there was no CUDA device",
        "cases": rows,
        "released_plans_gib": released_plans(),
    }
    print("written:", record.write("preflight", figures, args.out).name)


if __name__ == "__main__":
    main()
