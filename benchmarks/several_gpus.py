"""What several GPUs bring for one video of Open-Sora 2.0, COMPUTED from stated speeds and bandwidths: nothing here is measured.

    python -m benchmarks.several_gpus [--linear 790 --attention 620 --bandwidth 300] [--out FILE]

A forward is its matrix products (shared out by tokens), its attention (by heads) and two exchanges an attention; a step its guidance passes, shared out
as opensora_core.parallel chooses. Text, VAE, launches and waiting are left out. To measure: generate --gpus N, or benchmarks.speed_table.
"""

import argparse

from benchmarks import record
from opensora_core.networks.mmdit.config import OPEN_SORA_2
from opensora_core.parallel import groups_for
from opensora_core.sampling.guidance import PICTURES, Guidance
from opensora_core.sampling.plan import POINTS, StepPlan, planned
from opensora_core.sampling.schedule import flow_schedule

SIZES = {"256px": ((192, 336), 5.73), "768px": ((576, 1024), 11.87)}  # 129 frames; the shift of the schedule
LATENT_FRAMES, TEXT, STEPS, BYTES = 33, 512, 50, 2
COUNTS = (1, 2, 4, 8)


def work(config, tokens: int) -> tuple[float, float, float]:
    """(FLOP of matrix products, FLOP of attention, bytes of the exchanges of one process times n**2 / (n - 1)) of a forward."""
    hidden, mlp, blocks = config.hidden_size, config.mlp_hidden_size, config.depth + config.depth_single_blocks
    linear = blocks * 2 * tokens * (4 * hidden**2 + 2 * hidden * mlp)
    return linear, blocks * 4 * tokens**2 * hidden, blocks * 4 * tokens * hidden * BYTES


def passes_of(speed: str, shift: float, use) -> list[int]:
    """Guidance passes of every step."""
    whole, guidance = flow_schedule(STEPS, shift), Guidance()
    if speed == "exact":
        return [len(guidance.at_step(step, STEPS, LATENT_FRAMES, use).passes) for step in range(STEPS)]
    way, averaged = planned(guidance, whole, StepPlan.uncalibrated(speed))
    return [len(averaged.at_step(step, way.num_steps, LATENT_FRAMES, use).passes) for step in range(way.num_steps)]


def seconds(passes: list[int], of_forward: tuple[float, float, float], count: int, args) -> tuple[float, int, float]:
    """(of all steps on so many GPUs, groups that passes are shared out over, GB that a GPU sends in a forward)."""
    linear, attention, sent = of_forward
    heads = OPEN_SORA_2.num_heads
    groups = groups_for(passes, heads, count)
    members = count // groups
    gigabytes = sent * (members - 1) / members**2 / 1e9
    forward = linear / members / args.linear / 1e12 + attention * -(-heads // members) / heads / args.attention / 1e12
    forward += gigabytes / args.bandwidth
    return sum(-(-number // groups) for number in passes) * forward, groups, gigabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--linear", type=float, default=790.0, help="TFLOP/s of matrix products (default: an H100 in bf16, as stated)")
    parser.add_argument("--attention", type=float, default=620.0, help="TFLOP/s of attention (default: cuDNN or FA3 on an H100, as stated)")
    parser.add_argument(
        "--bandwidth", type=float, nargs="*", default=[300.0, 25.0], help="GB/s that a GPU sends (default: NVLink 4, PCIe 4)"
    )
    parser.add_argument("--out", help="where the figures go; by default nowhere")
    args, rows = parser.parse_args(), []
    bandwidths = args.bandwidth
    print(
        f"COMPUTED, not measured: {args.linear:g} and {args.attention:g} TFLOP/s for products and attention; seconds of sampling, 129 frames"
    )
    print(f"{'size':6} {'mode':4} {'speed':9} {'GB/s':>5}" + "".join(f"{f'{count} GPU' + 's' * (count > 1):>20}" for count in COUNTS))
    for size, ((height, width), shift) in SIZES.items():
        of_forward = work(OPEN_SORA_2, LATENT_FRAMES * height * width // 256 + TEXT)
        for mode, use in (("t2v", None), ("i2v", PICTURES)):
            for speed in ("exact", *POINTS):
                passes = passes_of(speed, shift, use)
                for args.bandwidth in bandwidths:
                    found = [seconds(passes, of_forward, count, args) for count in COUNTS]
                    cells = [
                        f"{time:9.1f} {found[0][0] / time:4.1f}x ({groups}x{n // groups})"
                        for n, (time, groups, _) in zip(COUNTS, found, strict=True)
                    ]
                    print(f"{size:6} {mode:4} {speed:9} {args.bandwidth:5g}" + "".join(f"{cell:>20}" for cell in cells))
                    rows.append({"size": size, "mode": mode, "speed": speed, "gb_per_s": args.bandwidth, "seconds": [one[0] for one in found],
                                 "groups": [one[1] for one in found], "gb_sent_a_forward": [one[2] for one in found]})  # fmt: skip
    print("(groups that share guidance passes x GPUs that share the tokens of one)")
    if args.out:
        settings = {"linear": args.linear, "attention": args.attention, "gpus": COUNTS}
        print(record.write("several_gpus", {"computed": "from stated speeds, not measured", "settings": settings, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
