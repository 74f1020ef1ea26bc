"""Offload modes of the transformer: seconds for a forward, peak bytes, and whether the result is the resident one, bit for bit.

    python -m benchmarks.offload [--hidden 768 --depth 2 --depth-single 4 --precision bf16 int8 --rounds 3]
    python -m benchmarks.offload --released [--precision bf16] [--budget-gib 8]

The first makes a model of random weights of any size (the released one with --hidden 3072 --depth 19 --depth-single 38,
which wants 24 GB of RAM) and runs it in every mode. The second makes a file of the released 11.9-billion-parameter layout
with one real block (the others are a hole: zeros that take no disk), maps it and runs whole forwards of all 57 blocks,
counting the anonymous memory that it takes. Without a CUDA device the copies are made on the CPU, and the file says so.
"""

import argparse
import gc
import json
import math
import statistics
import struct
import tempfile
import time
from pathlib import Path

import torch

from opensora_core.checkpoint.files import read_header
from opensora_core.checkpoint.quantised import QuantisedOperations, precision_format
from opensora_core.choices import BUDGET, MINIMAL, QUANTISED, RESIDENT
from opensora_core.families.table import DEFAULT, manifest
from opensora_core.memory.count import AllocationCounter
from opensora_core.memory.residency import GIB, at_least, least_bytes, make_residency
from opensora_core.memory.stream import BlockStream, module_bytes
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.networks.mmdit.layout import module_name
from opensora_core.networks.mmdit.model import MMDiT
from opensora_core.shapes import manifest_of

from . import record

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16}
REAL = "single_blocks.20."


def random_model(config: TransformerConfig, precision: str) -> MMDiT:
    """On the CPU, layer by layer, so that no second copy of the weights exists."""
    dtype = PLAIN.get(precision, torch.bfloat16)
    model = MMDiT(config, QuantisedOperations, dtype=dtype, device="meta").requires_grad_(False)
    form = None if precision in PLAIN else precision_format(precision)
    quantised = set() if form is None else set(DEFAULT.layers_to_quantise(manifest_of(model)))
    generator = torch.Generator().manual_seed(0)
    for layer_name, layer in list(model.named_modules()):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            values = torch.randn(parameter.shape, generator=generator).mul_(0.02).to(dtype)
            if name == "weight" and layer_name in quantised:
                layer.hold(form, *form.quantise(values))
            else:
                setattr(layer, name, torch.nn.Parameter(values, requires_grad=False))
    return model.train(False)


def make_inputs(config: TransformerConfig, dtype, device, latent):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    frames, height, width = latent
    cond = noise(1, config.in_channels + 1, frames, height, width)
    t = torch.full((1,), 0.6, device=device)
    return noise(1, config.in_channels, frames, height, width), t, noise(1, 512, config.context_in_dim), noise(1, config.vec_in_dim), cond


def plans(model, budget_gib):
    sizes = module_bytes(model, model.blocks())
    least, total = least_bytes(sizes, BUDGET), sizes.total
    budgets = [budget_gib] if budget_gib else [(least + share * (total - least)) / GIB for share in (0.75, 0.5, 0)]
    return [make_residency(sizes, RESIDENT), *(make_residency(sizes, BUDGET, budget) for budget in budgets), make_residency(sizes, MINIMAL)]


@torch.inference_mode()
def measure(model, plan, inputs, rounds: int) -> tuple[dict, torch.Tensor]:
    """Seconds of each round after the first, and the peak: on CUDA as allocated, on the CPU weights that stay and tensors made."""
    device, seconds = inputs[0].device, []
    on_cuda = device.type == "cuda"
    staying = 0 if on_cuda else plan.device_bytes - plan.num_buffers * plan.buffer_bytes
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with AllocationCounter() as counter, BlockStream(model, plan, device, model.blocks()):
        result = model(*inputs)
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else staying + counter.peak
    with BlockStream(model, plan, device, model.blocks()) as stream:
        for index in range(rounds + 1):  # the first warms up, and page-locks
            begun = time.perf_counter()
            model(*inputs)
            if on_cuda:
                torch.cuda.synchronize(device)
            if index:
                seconds.append(round(time.perf_counter() - begun, 4))
        pinned = stream.pinned_bytes
    figures = {
        "mode": plan.mode, "plan": plan.sentence(), "planned_weight_bytes": plan.device_bytes, "peak_bytes": peak,
        "copied_bytes_a_forward": plan.copied_bytes, "page_locked_bytes": pinned, "seconds": seconds, "median": statistics.median(seconds),
    }  # fmt: skip
    return figures, result


def compare_modes(args, device) -> dict:
    config = TransformerConfig(
        16, 2, args.hidden, args.hidden // 128, 4 * args.hidden, args.depth, args.depth_single, 4096, 768, True, False
    )
    found = {}
    for precision in args.precision:
        model = random_model(config, precision)
        inputs = make_inputs(config, PLAIN.get(precision, torch.bfloat16), device, args.latent)
        expected, rows = None, []
        for plan in plans(model, args.budget_gib):
            figures, result = measure(model, plan, inputs, args.rounds)
            expected = result if expected is None else expected
            figures["is_resident_result"] = torch.equal(result, expected)
            rows.append(figures)
            print(f"{precision:10s} {plan.mode:9s} {figures['median']:.4f} s  peak {at_least(figures['peak_bytes'])} GiB  "
                  f"same {figures['is_resident_result']}  {figures['plan']}", flush=True)  # fmt: skip
        found[precision] = rows
    return found


def write_file_of_holes(path: Path) -> None:
    """The released layout in bf16; only the block REAL has numbers, and only they take disk."""
    header, end, real = {}, 0, []
    for key, shape in manifest(OPEN_SORA_2).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
        if key.startswith(REAL):
            real.append((begin, math.prod(shape)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin, count in real:
            file.seek(8 + len(text) + begin)
            values = torch.randn(count, generator=torch.Generator().manual_seed(count)).mul_(0.02).to(torch.bfloat16)
            file.write(values.view(torch.uint8).numpy())
        file.truncate(8 + len(text) + end)


def mapped_model(path: Path) -> MMDiT:
    header = read_header(path)
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    state = {
        module_name(key): whole[info.end - 2 * info.num_elements : info.end].view(torch.bfloat16).view(info.shape)
        for key, info in header.tensors.items()
    }
    model = MMDiT(OPEN_SORA_2, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    model.load_state_dict(state, strict=True, assign=True)
    return model.train(False)


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def released_file(args, device) -> dict:
    """Whole forwards of the 57 blocks from the mapped file, in one mode after another."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="offload-") as folder:
        path = Path(folder) / "Open_Sora_v2.safetensors"
        write_file_of_holes(path)
        disk = path.stat().st_blocks * 512
        model = mapped_model(path)
        inputs = make_inputs(OPEN_SORA_2, torch.bfloat16, device, args.latent)
        sizes = module_bytes(model, model.blocks())
        expected = None
        for plan in (make_residency(sizes, RESIDENT), make_residency(sizes, BUDGET, args.budget_gib or 8), make_residency(sizes, MINIMAL)):
            gc.collect()
            before, held, begun = anonymous_bytes(), [], time.perf_counter()
            hook = model.single_blocks[-1].register_forward_hook(lambda *_, held=held: held.append(anonymous_bytes()))
            with BlockStream(model, plan, device, model.blocks()):
                result = model(*inputs)
            hook.remove()
            seconds = time.perf_counter() - begun
            expected = result if expected is None else expected
            rows.append({
                "mode": plan.mode, "plan": plan.sentence(), "planned_weight_bytes": plan.device_bytes,
                "buffer_bytes": plan.num_buffers * plan.buffer_bytes, "anonymous_bytes_taken": held[0] - before,
                "seconds_of_one_forward": round(seconds, 2), "is_resident_result": torch.equal(result, expected),
            })  # fmt: skip
            print(json.dumps(rows[-1], indent=2), flush=True)
    return {"file_bytes": sizes.total, "disk_bytes": disk, "parameters": 11_891_390_528, "runs": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768, help="width, a multiple of 128")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--depth-single", type=int, default=4)
    parser.add_argument("--latent", type=int, nargs=3, default=(5, 24, 42), metavar=("T", "H", "W"))
    parser.add_argument("--precision", nargs="+", choices=(*PLAIN, *QUANTISED), default=["fp32", "bf16", "fp8_e4m3fn", "int8", "nf4"])
    parser.add_argument("--budget-gib", type=float, help="one budget (default: three between the least and everything; 8 with --released)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--released", action="store_true", help="the released layout from a file of which one block is real")
    parser.add_argument("--out", help="where to write the JSON (default benchmarks/results)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = (
        ("latent", "budget_gib") if args.released else ("hidden", "depth", "depth_single", "latent", "precision", "budget_gib", "rounds")
    )
    figures = {"settings": {name: getattr(args, name) for name in names} | {"device": str(device)}}
    if device.type == "cpu":
        figures["cuda"] = (
            "not measured: there is no CUDA device on this machine; here blocks are copied within main memory, one after another"
        )
    figures["released_file" if args.released else "precisions"] = (
        released_file(args, device) if args.released else compare_modes(args, device)
    )
    print("written:", record.write("offload_released" if args.released else "offload", figures, args.out).name)


if __name__ == "__main__":
    main()
