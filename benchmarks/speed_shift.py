"""Plans at the shifts of the released sizes, measured on the built-in model: how far each comes from its exact run.

    python -m benchmarks.speed_shift [--count N] [--folder DIR] [--out FILE]

The released model's schedule is shifted harder than the built-in one's own: by 5.73 at 256px and 11.87 at 768px (129 frames). So the
built-in model is run with those, plans are calibrated on seen prompts, and they are measured on held-out ones, beside the plans that a
speed takes where nothing was calibrated. Errors are the distance to the exact run of 50 steps as a share of the latents' length, in the
mean of the prompts. Prompts differ by far more than plans: uncalibrated at 11.87, the first 8 held-out ones are at .018, .043 and .061 (20, 12 and 9
steps), the first 8 seen ones at .028, .060 and .088. What is done is kept in the folder, so that a run that was stopped goes on.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import record
from opensora_core.commands.options import JudgeOptions
from opensora_core.evaluation import prompts
from opensora_core.evaluation.clips import Job, arguments
from opensora_core.memory.component import Placement
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.run.calibrate import runs_of
from opensora_core.run.files import ModelFiles
from opensora_core.run.given import encode_references
from opensora_core.run.parts import Networks
from opensora_core.run.text import encode
from opensora_core.sampling.guidance import num_forwards
from opensora_core.sampling.plan import POINTS, StepPlan, planned
from opensora_core.sampling.schedule import flow_schedule

SHIFTS = {"the built-in model's own": 0.0, "256px": 5.73, "768px": 11.87}
CASES = {"t2v": lambda name, count: prompts.text_cases(name, count, 0), "i2v": lambda name, count: prompts.closing_cases("both", count, 0)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed_shift", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=12, help="prompts to calibrate on, and as many others to measure on (default 12)")
    parser.add_argument("--folder", help="where what is done is kept (default: a temporary one)")
    parser.add_argument("--out", help="a JSON report")
    args = parser.parse_args()
    folder, rows = Path(args.folder or tempfile.mkdtemp()), []
    for mode in CASES:
        for title, shift in SHIFTS.items():
            for row in measured(mode, shift, args.count, folder / f"{mode}_{shift}"):
                rows.append({"mode": mode, "shift of": title, **row})
                print(
                    f"{mode}  shift {row['shift']:5.2f}  {row['points']:2} steps  {row['forwards']:3} forwards  {row['error']:.4f}  {row['plan']}",
                    flush=True,
                )
    if args.out:
        print(record.write("speed_shift", {"count": args.count, "rows": rows}, args.out))
    return 0


@torch.inference_mode()
def measured(mode: str, shift: float, count: int, folder: Path) -> list[dict]:
    """Errors on held-out prompts of the plans that were calibrated at a shift, and of those that were not."""
    pipe, how = OpenSoraPipeline.from_pretrained("small"), JudgeOptions(num_steps=50)
    cases = [*CASES[mode](prompts.SEEN, 2 * count)[:count], *CASES[mode](prompts.HELD_OUT, 2 * count)[count:]]
    requests = pipe.checked(
        [(case.prompt, case.seed, {name: value for name, value in arguments(how, Job(case)).items() if name != "seed"}) for case in cases]
    )
    networks = Networks(ModelFiles.in_folder("small"), Placement(torch.device("cpu")), None)
    given = [encode_references(networks, request, lambda done, total: None) for request in requests]
    runs = list(zip(requests, encode(networks, [request.asked for request in requests]), given, strict=True))
    with networks.transformer.at_work(0) as transformer:
        trial, make = runs_of(networks, transformer, runs)
        whole, guidance = flow_schedule(trial.whole.num_steps, shift) if shift else trial.whole, trial.guidance
        trial = replace(trial, whole=whole, keys=trial.keys[:count])
        found = [plan for plan, _, _ in trial.run(make, folder, lambda done, total: None).rows]
        exact = [make(index, whole, guidance) for index in range(count, 2 * count)]
        rows = []
        for name, plan in [
            *(("calibrated", plan) for plan in found),
            *((f"uncalibrated, {speed}", StepPlan.uncalibrated(speed)) for speed in POINTS),
        ]:
            schedule, averaged = planned(guidance, whole, plan)
            made = [make(index, schedule, averaged) for index in range(count, 2 * count)]
            error = sum(float((one - other).norm() / other.norm()) for one, other in zip(made, exact, strict=True)) / count
            forwards = num_forwards(averaged, len(plan.steps), trial.latent_frames, trial.use)
            alpha = float(whole.points[25] / (1 - whole.points[25]))  # of the point that is at one half without a shift
            rows.append(
                {
                    "shift": round(alpha, 2),
                    "plan": name,
                    "points": len(plan.steps),
                    "steps": list(plan.steps),
                    "forwards": forwards,
                    "error": round(error, 4),
                }
            )
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
