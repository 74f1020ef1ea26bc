"""Makes the moving pictures of workflows/ from what the built-in model makes of prompts: `python tests/browser/thumbnails.py`, those that are missing.

The template browser shows NAME.jpg, and shows it moving where the file is an animated WebP: so they are, whatever their ending says.
"""

from pathlib import Path

import numpy
from PIL import Image

from demo import run
from opensora_core.evaluation.world import SIZE, Combination
from opensora_core.pipeline import OpenSoraPipeline

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SIDE, MILLISECONDS = 320, 80
SHAPES, COLOURS, GROUNDS, WAYS = (
    ("circle", "square", "triangle"), ("red", "yellow", "green", "blue", "purple", "white"), ("blue", "black", "gray", "white"),
    ("right", "up", "left", "down"),
)  # fmt: skip
GRIDS = ("11", "12", "24")  # several videos of one run


def combination(number: int) -> Combination:
    """Another one for every number."""
    colour = COLOURS[number % 6]
    ground = next(one for one in (*GROUNDS[number % 4 :], *GROUNDS) if one != colour)
    return Combination(SHAPES[number % 3], colour, ground, WAYS[number % 4])


def video(pipe: OpenSoraPipeline, asked: Combination) -> list[Image.Image]:
    """What the built-in model makes of a prompt, in enlarged frames."""
    frames = pipe(asked.prompt(), height=SIZE, width=SIZE, num_frames=17, num_inference_steps=40, seed=run.SEED).frames[0]
    return [Image.fromarray(numpy.asarray(frame)) for frame in frames]


def main() -> None:
    pipe = OpenSoraPipeline.from_pretrained("small")
    made = [video(pipe, combination(number)) for number in range(12)]
    for number, path in enumerate(sorted(WORKFLOWS.glob("*.json"))):
        if path.with_suffix(".jpg").exists():
            continue
        chosen = [made[(number + more) % 12] for more in range(4 if path.name[:2] in GRIDS else 1)]
        columns = 2 if len(chosen) > 1 else 1
        frames = []
        for pictures in zip(*chosen, strict=True):
            sheet = Image.new("RGB", (columns * SIZE, columns * SIZE))
            for at, picture in enumerate(pictures):
                sheet.paste(picture, (at % columns * SIZE, at // columns * SIZE))
            frames.append(sheet.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        there_and_back = frames + frames[-2:0:-1]
        there_and_back[0].save(
            path.with_suffix(".jpg"),
            "WEBP",
            save_all=True,
            append_images=there_and_back[1:],
            duration=MILLISECONDS,
            loop=0,
            quality=70,
            method=4,
        )


if __name__ == "__main__":
    main()
