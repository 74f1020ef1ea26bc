"""The table of speeds: seconds, forwards, memory and nearness to exact for every speed, size and mode, kernels, 8 bits, GPUs, beside the reference.

    python -m benchmarks.speed_table --model Open-Sora-v2 [--reference CHECKOUT --reference-python PYTHON] [--sizes 256px 768px] [--gpus 2 4 8]
    python -m benchmarks.speed_table --count 2      (no GPU: the built-in model; says what cannot be measured)

All lines are of one run on one machine. Each prompt is made exactly once more per line, on the same noise; the first video of a line warms up and its
seconds do not count. The reference is run as its guide says (its Python has its packages and its ckpts/ are in the checkout); its seconds are those between its first
file and its last. --keep DIR keeps the videos, for VBench, which is not run here.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F

from benchmarks import record
from opensora_core.errors import OpenSoraError
from opensora_core.evaluation import prompts
from opensora_core.evaluation.score import mean, psnr
from opensora_core.media.video import save_video
from opensora_core.pipeline import OpenSoraPipeline
from opensora_core.sampling.plan import POINTS

SUBJECTS = ("A red fox", "An old sailor", "A steam train", "A paper kite")
SCENES = ("in falling snow", "on a beach at dusk", "in a crowded market", "high above a valley")
SEED, STEPS = 42, 50


@dataclass(frozen=True)
class Line:
    """A row of the table. load: keywords of the pipeline's making; call: of each call. apart: processes of `generate --gpus`; 0 = here."""

    name: str
    size: str
    mode: str = "t2v"
    load: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    attention: str = ""
    is_compiled: bool = False
    gpus: int = 0


def lines(sizes: list[str], gpus: list[int]) -> Iterator[Line]:
    for size in sizes:
        for mode in ("t2v", "i2v"):
            yield Line("exact", size, mode)
            yield from (Line(speed, size, mode, call={"speed": speed}) for speed in POINTS)
        yield from (Line(f"attention {name}", size, attention=name) for name in ("sdpa", "cudnn", "sage"))
        yield Line("compiled", size, is_compiled=True)
        yield Line("fp8", size, load={"precision": "fp8_e4m3fn"})
        yield from (Line(f"{count} GPUs", size, gpus=count) for count in gpus)


def cannot(line: Line) -> str:
    """Why this machine cannot measure a line; "" if it can."""
    cards = torch.cuda.device_count()
    if line.gpus > cards:
        return f"needs {line.gpus} GPUs, and there are {cards}"
    if (line.is_compiled or line.load or line.attention in ("cudnn", "sage")) and not cards:
        return "needs a GPU"
    if line.attention == "sage" and importlib.util.find_spec("sageattention") is None:
        return "sageattention is not installed"
    return ""


def ssim(frames: numpy.ndarray, others: numpy.ndarray) -> float:
    """Structural similarity of uint8 frames [T, H, W, 3]: mean over windows of 7x7 (Wang et al. 2004, uniform weights)."""
    one, other = (torch.from_numpy(clip).double().permute(0, 3, 1, 2) for clip in (frames, others))

    def local(x):
        return F.avg_pool2d(x, 7, 1)

    m1, m2 = local(one), local(other)
    v1, v2, v12 = local(one * one) - m1 * m1, local(other * other) - m2 * m2, local(one * other) - m1 * m2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (((2 * m1 * m2 + c1) * (2 * v12 + c2)) / ((m1**2 + m2**2 + c1) * (v1 + v2 + c2))).mean().item()


def lpips_of():
    """LPIPS of two clips, or None where its library is not installed."""
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False)

    def measure(frames, others) -> float:
        one, other = (torch.from_numpy(clip).float().permute(0, 3, 1, 2) / 127.5 - 1 for clip in (frames, others))
        with torch.inference_mode():
            return mean([network(a[None], b[None]).item() for a, b in zip(one, other, strict=True)])

    return measure


class Table:
    """Measures lines one after another. exact: frames by (size, mode, prompt), of the lines named exact."""

    def __init__(self, args):
        self._args, self._device = args, "cuda" if torch.cuda.is_available() else "cpu"
        is_small = args.model == "small"
        cases = prompts.text_cases(prompts.SEEN, args.count, 0) if is_small else ()
        texts = [f"{subject} {scene}" for scene in SCENES for subject in SUBJECTS]
        self.prompts = [case.prompt for case in cases] or texts[: args.count]
        self._exact: dict[tuple, numpy.ndarray] = {}
        self._lpips = lpips_of()

    def pipeline(self, line: Line) -> OpenSoraPipeline:
        pipe = OpenSoraPipeline.from_pretrained(self._args.model, **line.load).to(self._device)
        if self._device == "cuda":
            pipe.enable_offload("auto")
        pipe.keep_loaded = pipe.keep_encoded = True
        if line.attention:
            pipe.use_attention(line.attention)
        return pipe.compile() if line.is_compiled else pipe

    def measure(self, line: Line) -> dict:
        pipe = self.pipeline(line)
        size = self.arguments(pipe, line.size)
        found: dict[str, list] = {name: [] for name in ("total", "row", "psnr", "ssim", "lpips")}
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for index, prompt in enumerate([self.prompts[0], *self.prompts]):  # the first warms up
            image = self._exact[line.size, "t2v", prompt][0] if line.mode == "i2v" else None
            result = pipe(prompt, image=image, seed=SEED, **size, **line.call)
            frames = numpy.stack(result.frames[0])
            if not index:
                continue
            found["total"].append(sum(result.seconds.values()))
            found["row"].append(result.seconds["sampling"] / result.forwards)
            if line.name == "exact":
                self._exact[line.size, line.mode, prompt] = frames
            else:
                exact = self._exact[line.size, line.mode, prompt]
                found["psnr"].append(psnr(frames, exact))
                found["ssim"].append(ssim(frames, exact))
                found["lpips"] += [self._lpips(frames, exact)] if self._lpips else []
            self._keep(line, index, result.frames[0])
        peak = torch.cuda.max_memory_allocated() / 2**30 if self._device == "cuda" else None
        return {"rows": result.forwards, "peak_gib": peak, **found}

    def arguments(self, pipe: OpenSoraPipeline, size: str) -> dict:
        if self._args.model == "small":
            return {}
        height, width = pipe.files.grid.named_size(size, "16:9")
        return {"height": height, "width": width, "num_frames": 129, "num_inference_steps": STEPS}

    def _keep(self, line: Line, index: int, frames) -> None:
        if self._args.keep:
            folder = Path(self._args.keep) / f"{line.size}_{line.mode}_{line.name.replace(' ', '_')}"
            folder.mkdir(parents=True, exist_ok=True)
            save_video(frames, folder / f"{index:04d}.mp4", fps=24)

    def several(self, line: Line) -> dict:
        """Of a command of its own, from its first file to its last."""
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "opensora_core",
                "generate",
                "--model",
                self._args.model,
                "--prompt",
                self.prompts[0],
                "--seed",
                str(SEED),
            ]
            command += [] if self._args.model == "small" else ["--resolution", line.size]
            command += ["--gpus", str(line.gpus), "--num-samples", "3", "--out", folder]
            return {"total": between_files(command, folder)}

    def reference(self, size: str, mode: str) -> dict:
        """The reference's own script, on the same prompts and pictures."""
        with tempfile.TemporaryDirectory() as folder:
            rows = ["text,ref" if mode == "i2v" else "text"]
            for index, prompt in enumerate(self.prompts):
                picture = Path(folder) / f"{index}.png"
                if mode == "i2v":
                    save_video(self._exact[size, "t2v", prompt][:1], picture)
                rows.append(f'"{prompt}",{picture}' if mode == "i2v" else f'"{prompt}"')
            (Path(folder) / "prompts.csv").write_text("\n".join(rows) + "\n")
            command = [
                self._args.reference_python,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "1",
                "scripts/diffusion/inference.py",
            ]
            command += ["configs/diffusion/inference/256px.py", "--save-dir", folder, "--dataset.data-path", f"{folder}/prompts.csv"]
            command += ["--sampling_option.resolution", size, "--cond_type", "i2v_head" if mode == "i2v" else "t2v"]
            return {"total": between_files(command, folder, self._args.reference)}


def between_files(command: list[str], folder: str, where: str | None = None) -> list[float]:
    """Seconds between the videos that a command writes below a folder, the first of which is not counted."""
    process, seen, times = subprocess.Popen(command, cwd=where, stdout=subprocess.DEVNULL), set(), []
    while process.poll() is None or set(Path(folder).rglob("*.mp4")) - seen:
        for path in set(Path(folder).rglob("*.mp4")) - seen:
            seen.add(path)
            times.append(time.monotonic())
        time.sleep(0.05)
    if process.returncode or len(times) < 2:
        raise OpenSoraError(f"the command ended with {process.returncode} after {len(times)} videos")
    return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]


def shown(line: str, size: str, mode: str, found: dict) -> str:
    def figure(name: str, form: str, how=statistics.median) -> str:
        values = found.get(name)
        return form.format(how(values)) if values else "-"

    peak = f"{found['peak_gib']:.1f}" if found.get("peak_gib") else "-"
    near = f"{figure('psnr', '{:.1f}', mean)}/{figure('psnr', '{:.1f}', min)}"
    cells = [
        found.get("rows", "-"),
        figure("row", "{:.3f}"),
        figure("total", "{:.2f}"),
        peak,
        near,
        figure("ssim", "{:.4f}", mean),
        figure("lpips", "{:.4f}", mean),
    ]
    return f"{size:6} {mode:4} {line:16}" + "".join(f"{cell!s:>11}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="the released model's folder (default: the built-in one)")
    parser.add_argument("--reference", help="an Open-Sora checkout with its ckpts/")
    parser.add_argument("--reference-python", default=sys.executable, help="the Python that has the reference's packages")
    parser.add_argument("--sizes", nargs="+", default=["256px", "768px"])
    parser.add_argument("--gpus", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--count", type=int, default=16, help="prompts (default 16)")
    parser.add_argument("--keep", help="a folder for the videos, for VBench")
    parser.add_argument("--out", help="where the figures go; by default benchmarks/results/")
    args = parser.parse_args()
    sizes = ["64x64"] if args.model == "small" else args.sizes
    table, figures, absent = Table(args), [], {}
    wanted = [(line.name, line.size, line.mode, cannot(line), line) for line in lines(sizes, args.gpus)]
    missing = "no --reference was given" if not args.reference else "" if torch.cuda.is_available() else "the reference needs a GPU"
    wanted += [("reference", size, mode, missing, None) for size in sizes for mode in ("t2v", "i2v")]
    print(
        f"{'size':6} {'mode':4} {'line':16}"
        + "".join(f"{name:>11}" for name in ("rows", "s/row", "s/video", "peak GiB", "PSNR/worst", "SSIM", "LPIPS"))
    )
    for name, size, mode, why, line in wanted:
        try:
            if not why:
                found = table.reference(size, mode) if line is None else table.several(line) if line.gpus else table.measure(line)
        except (OpenSoraError, torch.cuda.OutOfMemoryError) as error:
            why = str(error).splitlines()[0]
        if why:
            absent[f"{size} {mode} {name}"] = why
        else:
            print(shown(name, size, mode, found), flush=True)
            figures.append({"line": name, "size": size, "mode": mode, **found})
    if importlib.util.find_spec("lpips") is None:
        absent["LPIPS"] = "lpips is not installed"
    absent["VBench"] = "not run here; --keep DIR keeps the videos for it"
    for what, why in absent.items():
        print(f"not measured: {what}: {why}")
    settings = {"model": "small" if args.model == "small" else Path(args.model).name, "count": args.count, "steps": STEPS, "seed": SEED}
    print("written:", record.write("speed_table", {"settings": settings, "lines": figures, "not_measured": absent}, args.out).name)


if __name__ == "__main__":
    main()
