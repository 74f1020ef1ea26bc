"""Decoding with the causal VAE against diffusers' HunyuanVideo VAE, and against the reference's way of masking.

    python -m benchmarks.vae_decode [--widths 32 64 64 64 --latent 4 16 16 --rounds 7 --memory-latent 13 32 32]

Time: ours and diffusers' AutoencoderKLHunyuanVideo with the same weights (their results are compared), run in turns in
one process so that a noisy machine disturbs both alike; the figure that counts is the ratio of medians.
Memory: every variant decodes once in a process of its own; what is reported is how far the process's peak resident
set rises above its size before the decode (on a GPU: the allocator's peak above what was allocated). "dense mask" is our
module with what the reference does in place of its attention: one (T * H * W)^2 mask, kept until the decode ends.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from opensora_core.codecs.hunyuan import layers
from opensora_core.codecs.hunyuan.config import VAEConfig
from opensora_core.codecs.hunyuan.memory import decode_bytes
from opensora_core.codecs.hunyuan.model import CausalVAE

from . import record

OURS, DENSE, DIFFUSERS = "opensora_core", "opensora_core with a dense mask", "diffusers AutoencoderKLHunyuanVideo"


def weights(config: VAEConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def value(name, shape):
        spread = 0.1 if len(shape) == 1 else (1.5 / shape[1:].numel()) ** 0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return centre + spread * torch.randn(shape, generator=generator)

    return {name: value(name, tensor.shape) for name, tensor in CausalVAE(config, device="meta").state_dict().items()}


def ours(config: VAEConfig, device: str, dtype: torch.dtype):
    model = CausalVAE(config, dtype=dtype)
    model.load_state_dict(weights(config))
    return model.to(device).requires_grad_(False).decode


def dense_mask(config: VAEConfig, device: str, dtype: torch.dtype):
    decode = ours(config, device, dtype)
    kept = []

    def attend(q, k, v):
        frames, per_frame = q.shape[1:3]
        frame = torch.arange(frames, device=q.device).repeat_interleave(per_frame)
        mask = torch.zeros(len(frame), len(frame), dtype=q.dtype, device=q.device).masked_fill_(frame[:, None] < frame, float("-inf"))
        kept.append(mask)
        out = F.scaled_dot_product_attention(*(x.flatten(1, 2)[:, None] for x in (q, k, v)), attn_mask=mask)
        return out[:, 0].unflatten(1, (frames, per_frame))

    def run(latents):
        before, layers.frame_causal_attention = layers.frame_causal_attention, attend
        try:
            return decode(latents)
        finally:
            layers.frame_causal_attention = before
            kept.clear()

    return run


def diffusers_vae(config: VAEConfig, device: str, dtype: torch.dtype):
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo(
        latent_channels=config.latent_channels,
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
    )
    model.load_state_dict(weights(config))  # the names are the same
    model.to(device, dtype).requires_grad_(False).train(False)
    return lambda latents: model.decoder(model.post_quant_conv(latents))  # its decode() would cut the clip in time


VARIANTS = {OURS: ours, DENSE: dense_mask, DIFFUSERS: diffusers_vae}


def compare_time(args, config: VAEConfig, device: str, dtype: torch.dtype) -> dict:
    latents = torch.randn(1, config.latent_channels, *args.latent, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    runs = {name: VARIANTS[name](config, device, dtype) for name in (OURS, DIFFUSERS)}
    with torch.inference_mode():
        results = [run(latents) for run in runs.values()]
        difference = ((results[0] - results[1]).abs().max() / results[1].abs().max()).item()
        del results
        seconds = {name: [] for name in runs}
        processor = {name: [] for name in runs}
        for index in range(args.rounds):
            for name in list(runs) if index % 2 else reversed(list(runs)):
                start, worked = time.perf_counter(), time.process_time()
                runs[name](latents)
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - worked)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    work = {name: statistics.median(times) for name, times in processor.items()}
    for name in runs:
        print(f"{name:40s} median {median[name]:.4f} s, processor {work[name]:.4f} s   {[round(t, 3) for t in seconds[name]]}")
    ratio = median[OURS] / median[DIFFUSERS]
    print(
        f"ours / diffusers = {ratio:.3f} (processor time {work[OURS] / work[DIFFUSERS]:.3f}); largest relative difference {difference:.1e}"
    )
    return {"seconds": seconds, "median": median, "ratio": ratio, "processor_median": work, "difference": difference}


def peak_bytes(name: str, config: VAEConfig, latent: list[int], device: str, dtype: torch.dtype) -> int:
    """Rise of the peak of this process over one decode."""
    decode = VARIANTS[name](config, device, dtype)
    with torch.inference_mode():
        decode(torch.zeros(1, config.latent_channels, 2, 4, 4, device=device, dtype=dtype))  # libraries and kernels
        latents = torch.randn(1, config.latent_channels, *latent, device=device, dtype=dtype)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            decode(latents)
            return torch.cuda.max_memory_allocated() - before
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        decode(latents)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def compare_memory(args, config: VAEConfig, dtype: torch.dtype) -> dict:
    peaks = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.vae_decode", "--peak", name, "--threads", str(args.threads)]
        command += ["--memory-widths", *map(str, args.memory_widths), "--memory-latent", *map(str, args.memory_latent)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:40s} peak {peaks[name] / 2**20:.0f} MiB")
    ratios = {name: peaks[OURS] / peaks[name] for name in (DENSE, DIFFUSERS)}
    tokens = args.memory_latent[0] * args.memory_latent[1] * args.memory_latent[2]
    mask = tokens**2 * dtype.itemsize
    estimate = decode_bytes(config, tuple(args.memory_latent), dtype.itemsize)
    print(f"ours / dense mask = {ratios[DENSE]:.3f}, ours / diffusers = {ratios[DIFFUSERS]:.3f}; one mask is {mask / 2**20:.0f} MiB")
    return {"peak_bytes": peaks, "ratio": ratios, "mask_bytes": mask, "estimated_bytes": estimate}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs=4, default=(32, 64, 64, 64))
    parser.add_argument("--latent", type=int, nargs=3, default=(4, 16, 16), metavar=("T", "H", "W"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-widths", type=int, nargs=4, default=(16, 32, 32, 32))
    parser.add_argument("--memory-latent", type=int, nargs=3, default=(13, 32, 32), metavar=("T", "H", "W"))
    parser.add_argument(
        "--threads", type=int, default=1, help="0: as many as torch takes; on a busy machine waiting for them is most of the time"
    )
    parser.add_argument("--peak", choices=VARIANTS, help="measure the memory of one variant and print its bytes")
    parser.add_argument("--out", help="where to write the JSON (default benchmarks/results)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    timed, measured = (VAEConfig(16, tuple(widths), 2) for widths in (args.widths, args.memory_widths))
    if args.peak:
        print(peak_bytes(args.peak, measured, args.memory_latent, device, dtype))
        return
    figures = {"settings": vars(args), "dtype": str(dtype), "time": compare_time(args, timed, device, dtype)}
    figures["memory"] = compare_memory(args, measured, dtype)
    print("written:", record.write("vae_decode", figures, args.out).name)


if __name__ == "__main__":
    main()
