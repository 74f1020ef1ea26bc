"""One forward of STDiT3 (Open-Sora 1.2) against upstream's own module, interleaved in one run, and the peak memory of each in a process of its own.

    OPENSORA_REF=REPOSITORY python -m benchmarks.stdit3_forward [--depth 2 --latent 5 30 53 --rounds 5]

OPENSORA_REF names a git repository of hpcaitech/Open-Sora with its tags; PYTHONPATH and what stands in for its kernels are as of
tests/golden/make_open_sora_1.py. Both attend by torch's fused attention, upstream too, whose kernels need a GPU: so neither is slowed by a formula.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from opensora_core.networks.stdit.config import STDiTConfig
from opensora_core.networks.stdit.stdit import STDiT3

from . import record
from .transformer_forward import fill, measure, ratio_to_fastest

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
OURS, UPSTREAM = "opensora_core", "Open-Sora v1.2.0 STDiT3"
HIDDEN, HEADS, TEXT, LENGTH = 1152, 16, 4096, 300


def ours(args, inputs):
    config = STDiTConfig(4, 8, HIDDEN, HIDDEN // HEADS, 4 * HIDDEN, args.depth, LENGTH, TEXT, in_turn=True)
    model = fill(STDiT3(config, dtype=torch.float32))
    sizes = torch.tensor([[24.0, *inputs["size"]]]).expand(2, -1)
    return lambda: model(inputs["x"], inputs["t"], context=inputs["context"][:, 0], sizes=sizes, attention_mask=inputs["mask"])


def _attend(q, k, v, p=0.0, attn_bias=None):
    """What upstream asks xformers for: [1, L, H, D], each sample over its own keys."""
    queries, keys = attn_bias
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = zip(q.split(queries, 2), k.split(keys, 2), v.split(keys, 2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(a, b, c) for a, b, c in parts], 2).transpose(1, 2).contiguous()


def upstream(args, inputs):
    sys.path.insert(0, str(GOLDEN))
    import make_open_sora_1

    root = Path(tempfile.mkdtemp())
    archive = subprocess.run(["git", "-C", os.environ["OPENSORA_REF"], "archive", "v1.2.0"], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", root], input=archive, check=True)
    make_open_sora_1.block_diagonal_attention = _attend
    make_open_sora_1.activate(root)
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    sizes = {"hidden_size": HIDDEN, "num_heads": HEADS, "depth": args.depth, "caption_channels": TEXT, "model_max_length": LENGTH}
    model = STDiT3(STDiT3Config(input_size=(None, None, None), in_channels=4, qk_norm=True, enable_flash_attn=True, **sizes))
    positions = {name: tensor.clone() for name, tensor in model.named_buffers() if "pos_embed" in name or "freqs" in name}
    model = fill(model)
    model.load_state_dict(positions, strict=False)
    frames, height, width = (torch.tensor([float(side)] * 2) for side in inputs["size"])
    told = {"fps": torch.tensor([24.0] * 2), "height": height, "width": width}
    return lambda: model(inputs["x"], inputs["t"], inputs["context"], mask=inputs["mask"], **told)


def make_inputs(args) -> dict:
    torch.manual_seed(0)
    frames, height, width = args.latent
    return {
        "x": torch.randn(2, 4, frames, height, width),
        "t": torch.full((2,), 700.0),
        "context": torch.randn(2, 1, LENGTH, TEXT),
        "mask": (torch.arange(LENGTH) < torch.tensor([[40], [40]])).long(),
        "size": (51, 8 * height, 8 * width),
    }


def peak_mib(name: str, args) -> float:
    """Of one forward beyond what stands before it, the largest resident memory of a process that does nothing else."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.stdit3_forward",
        "--only",
        name,
        "--depth",
        str(args.depth),
        "--latent",
        *map(str, args.latent),
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _measure_peak(run) -> float:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    run()
    after = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(after.split()[1]) / 2**10 - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--latent", type=int, nargs=3, default=(5, 30, 53), metavar=("T", "H", "W"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=(OURS, UPSTREAM), help=argparse.SUPPRESS)
    parser.add_argument("--out", help="where to write the JSON (default benchmarks/results)")
    args = parser.parse_args()
    inputs, makers = make_inputs(args), {OURS: ours, UPSTREAM: upstream}
    with torch.inference_mode():
        if args.only:
            print(json.dumps(_measure_peak(makers[args.only](args, inputs))))
            return
        runs = {name: make(args, inputs) for name, make in makers.items()}
        seconds, processor = measure(runs, args.rounds, "cpu")
    (medians, ratio), (work, work_ratio) = ratio_to_fastest(seconds), ratio_to_fastest(processor)
    peaks = {name: peak_mib(name, args) for name in runs}
    for name in runs:
        print(
            f"{name:26s} median {medians[name]:.3f} s, processor {work[name]:.3f} s, peak {peaks[name]:.0f} MiB, {statistics.fmean(seconds[name]):.3f} s"
        )
    print(f"ours / upstream = {ratio:.3f} (processor time {work_ratio:.3f})")
    figures = {"settings": vars(args), "seconds": seconds, "median": medians, "ratio": ratio, "processor_seconds": processor}
    print("written:", record.write("stdit3_forward", {**figures, "processor_ratio": work_ratio, "peak_mib": peaks}, args.out).name)


if __name__ == "__main__":
    main()
