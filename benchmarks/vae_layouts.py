"""Two ways of decoding that other programs use, against ours: weights and latents at channels-last, and tiles of one size in batches.

    python -m benchmarks.vae_layouts [--rounds 5 --threads 1]

In turns in one process, same weights; the figures that count are ratios of medians, and how far the result is from ours. Neither is in the
codec: on a CPU both take between 0.95 and 1.07 of our time, the batch holds all its tiles in memory at once, and neither gives the same frames bit for bit.
"""

import argparse
import statistics
import time

import torch

from opensora_core.codecs.hunyuan.config import VAEConfig
from opensora_core.codecs.hunyuan.model import CausalVAE

from . import record
from .vae_decode import weights

SIZES = {"narrow": ((32, 64, 64, 64), (4, 16, 16)), "released width": ((128, 256, 512, 512), (2, 8, 8))}
TILES = 2


def model(config: VAEConfig, device: str, dtype: torch.dtype) -> CausalVAE:
    made = CausalVAE(config, dtype=dtype)
    made.load_state_dict(weights(config))
    return made.to(device).requires_grad_(False)


@torch.inference_mode()
def measured(config: VAEConfig, latent: tuple[int, ...], rounds: int, device: str, dtype: torch.dtype) -> dict:
    plain, last = (model(config, device, dtype) for _ in range(2))
    last = last.to(memory_format=torch.channels_last_3d)
    tiles = torch.randn(TILES, config.latent_channels, *latent, device=device, dtype=dtype)
    ways = {
        "one by one": lambda: torch.cat([plain.decode(tile) for tile in tiles.split(1)]),
        "channels last": lambda: torch.cat([last.decode(tile.to(memory_format=torch.channels_last_3d)) for tile in tiles.split(1)]),
        "in a batch": lambda: plain.decode(tiles),
    }
    seconds, found = {name: [] for name in ways}, {}
    clock = time.perf_counter if device == "cuda" else time.process_time  # a busy machine disturbs the one, hardly the other
    for _ in range(rounds):
        for name, run in ways.items():
            begun = clock()
            found[name] = run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ours = found.pop("one by one")
    return {
        "seconds": seconds,
        "ratio": {name: round(median[name] / median["one by one"], 3) for name in found},
        "largest_difference": {name: float((other - ours).abs().max()) for name, other in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae_layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = {}
    for name, (widths, latent) in SIZES.items():
        rows[name] = measured(VAEConfig(16, widths, 2), latent, args.rounds, device, dtype)
        print(name, rows[name]["ratio"], rows[name]["largest_difference"], flush=True)
    print("written:", record.write("vae_layouts", {"tiles": TILES, "rows": rows}).name)


if __name__ == "__main__":
    main()
