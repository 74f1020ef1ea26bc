"""A video that ComfyUI saved is read, and the line that is printed of it makes the same video on the command line."""

import shlex

import imageio_ffmpeg
import numpy

from opensora_core.cli import main

SMALL = "small (built in)"


def graph(prompt: str) -> dict:
    text = {"clip": ["clip", 0], "prompt": ["words", 0], "negative_prompt": "", "motion_score": 6, "fps": 24}
    size = {"resolution": "custom", "aspect_ratio": "16:9", "num_frames": 129, "length": "9", "width": 64, "height": 48, "batch_size": 1}
    run = {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["size", 0], "seed": 5, "steps": 4}
    nodes = {
        "model": ("OpenSoraModelLoader", {"model_name": SMALL, "precision": "auto"}),
        "clip": ("OpenSoraTextEncoderLoader", {"t5_name": SMALL, "clip_l_name": SMALL, "precision": "auto", "device": "auto"}),
        "vae": ("OpenSoraVAELoader", {"vae_name": SMALL}),
        "words": ("PrimitiveStringMultiline", {"value": prompt}),
        "text": ("OpenSoraT5TextEncode", text),
        "size": ("OpenSoraEmptyLatentVideo", size),
        "run": ("OpenSoraRectifiedFlowSampler", {**run, "text_guidance": 5.0, "image_guidance": 3.0}),
        "frames": ("OpenSoraTiledVAEDecode", {"vae": ["vae", 0], "latent": ["run", 0]}),
        "video": ("CreateVideo", {"images": ["frames", 0], "fps": 24.0}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": "recipe", "format": "mp4", "codec": "h264"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def frames(path) -> numpy.ndarray:
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return numpy.stack([numpy.frombuffer(frame, numpy.uint8).reshape(height, width, 3) for frame in reader]).astype(float)


def test_the_line_of_a_saved_video_makes_it_again(server, listen, small_checkpoint, tmp_path, capsys, monkeypatch):
    prompt = "a red circle moving right on a blue background"
    assert listen(graph(prompt)).error is None
    (saved,) = (server.base / "output").glob("recipe*.mp4")
    assert main(["inspect", "--as-command", str(saved)]) == 0
    line = shlex.split(capsys.readouterr().out)
    assert "--model" in line and prompt in line
    monkeypatch.setattr("opensora_core.run.files.SMALL", small_checkpoint)
    assert main([*line[3:], "--device", "cpu", "--out", str(tmp_path / "again.mp4")]) == 0
    one, two = frames(saved), frames(tmp_path / "again.mp4")
    assert one.shape == two.shape == (9, 48, 64, 3)
    assert numpy.abs(one - two).mean() < 4, "but for what each encoder loses"
    assert numpy.abs(one - one[:, ::-1]).mean() > 4, "frames that could be any others would say nothing"
