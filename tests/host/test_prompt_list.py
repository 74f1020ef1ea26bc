"""Many videos from one graph, over HTTP: a list of prompts through the host's list execution, into the output folder and nowhere else."""

import shutil

import imageio_ffmpeg
import pytest
from PIL import Image

from demo.comfy import HostError

PROMPTS = "a red kite\n\n  雨中的海, at dusk  \n# not this one\n../../../etc/passwd\n"
NAMES = ["open-sora_0001_a-red-kite_00001_.mp4", "open-sora_0002_雨中的海-at-dusk_00001_.mp4", "open-sora_0003_etc-passwd_00001_.mp4"]


@pytest.fixture
def outputs(server):
    """The host's output folder, emptied."""
    folder = server.base / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def graph(num_frames=5, seed=21, **changes) -> dict:
    """A video of 64x48 for each line; `changes` go into the list's inputs."""
    latent = {"resolution": "custom", "num_frames": num_frames, "width": 64, "height": 48}
    sampler = {"model": ["model", 0], "positive": ["text", 0], "negative": ["text", 1], "latent": ["latent", 0], "seed": seed, "steps": 2}
    nodes = {
        "list": ("OpenSoraPromptList", {"prompts": PROMPTS, "first": 1, "count": 0, "filename_prefix": "video/open-sora"} | changes),
        "model": ("OpenSoraModelLoader", {"model_name": "Open_Sora_v2.safetensors"}),
        "clip": ("OpenSoraTextEncoderLoader", {"t5_name": "t5xxl.safetensors", "clip_l_name": "clip_l.safetensors"}),
        "vae": ("OpenSoraVAELoader", {"vae_name": "hunyuan_vae.safetensors"}),
        "text": ("OpenSoraT5TextEncode", {"clip": ["clip", 0], "prompt": ["list", 0]}),
        "latent": ("OpenSoraEmptyLatentVideo", latent),
        "sampler": ("OpenSoraRectifiedFlowSampler", sampler),
        "frames": ("OpenSoraTiledVAEDecode", {"vae": ["vae", 0], "latent": ["sampler", 0]}),
        "video": ("CreateVideo", {"images": ["frames", 0], "fps": 24.0}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": ["list", 1], "format": "auto", "codec": "auto"}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def with_defaults(prompt: dict, info: dict) -> dict:
    """The same with the default of every widget that it leaves out, as the front-end would send it."""
    for node in prompt.values():
        for name, spec in info[node["class_type"]]["input"].get("required", {}).items():
            kind, options = (*spec, {})[:2]
            choices = kind if isinstance(kind, list) else options.get("options") or [None]
            if name not in node["inputs"]:
                node["inputs"][name] = options.get("default", choices[0])
    return prompt


@pytest.fixture
def run(server):
    """Run a graph with every widget that it leaves out at its default: the files that it saved."""
    info = server.get("/object_info")

    def run(prompt: dict) -> list:
        return sorted(server.files(server.run(with_defaults(prompt, info), seconds=300)))

    return run


def decoded(path) -> list[bytes]:
    reader = imageio_ffmpeg.read_frames(str(path))
    assert next(reader)["size"] == (64, 48)
    return list(reader)


def test_every_line_becomes_a_video_of_its_own_name(run, outputs):
    videos = run(graph())
    assert [path.relative_to(outputs) for path in videos] == [outputs.joinpath("video", name).relative_to(outputs) for name in NAMES]
    clips = [decoded(path) for path in videos]
    assert [len(clip) for clip in clips] == [5, 5, 5]
    assert clips[0] != clips[1] != clips[2] != clips[0]
    assert sorted(path for path in outputs.rglob("*") if path.is_file()) == sorted(videos)
    # Alone, a line gives the video that it gave among the others, as the next file of its name.
    (alone,) = run(graph(first=2, count=1))
    assert alone.name == NAMES[1].replace("00001", "00002") and decoded(alone) == clips[1]


def test_a_list_of_pictures_goes_along_item_by_item(server, run, outputs):
    for name, colour in (("1.png", "red"), ("2.png", "blue")):
        (server.base / "input" / "beginnings").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), colour).save(server.base / "input" / "beginnings" / name)
    prompt = graph(prompts="a kite\na kite\n", num_frames=9)
    prompt["pictures"] = {"class_type": "LoadImageDataSetFromFolder", "inputs": {"folder": "beginnings"}}
    prompt["begin"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {
            **{"positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["latent", 0], "start_image": ["pictures", 0]}
        },
    }
    prompt["sampler"]["inputs"] |= {"positive": ["begin", 0], "negative": ["begin", 1], "latent": ["begin", 2]}
    first, second = (decoded(path) for path in run(prompt))
    assert len(first) == len(second) == 9 and first[0] != second[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": " \n# only this\n"}, "Write a prompt on each line"),
        ({"first": 4}, "first=4 is past the end of the list, which has 3 prompts"),
    ],
)
def test_a_list_that_has_nothing_to_run_is_refused(listen, server, changes, sentence):
    events = listen(with_defaults(graph(**changes), server.get("/object_info")))
    assert sentence in events.error["exception_message"] and events.error["node_type"] == "OpenSoraPromptList"


@pytest.mark.parametrize("prefix", ["../outside", "video/../../outside", "/tmp/outside"])
def test_files_outside_the_output_folder_are_refused(listen, server, outputs, prefix):
    prompt = with_defaults(graph(filename_prefix=prefix, prompts="a kite"), server.get("/object_info"))
    events = listen(prompt)
    assert events.error["node_type"] == "SaveVideo" and "outside the output folder" in events.error["exception_message"]
    assert not [path for path in outputs.parent.rglob("*outside*")] and not list(outputs.rglob("*.mp4"))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png"])
def test_pictures_outside_the_input_folder_are_refused(server, name):
    Image.new("RGB", (64, 48)).save(server.base / "secret.png")
    prompt = with_defaults(graph(prompts="a kite"), server.get("/object_info"))
    prompt["picture"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    prompt["begin"] = {
        "class_type": "OpenSoraImageToVideo",
        "inputs": {
            **{"positive": ["text", 0], "negative": ["text", 1], "vae": ["vae", 0], "latent": ["latent", 0], "start_image": ["picture", 0]},
            **{"fit": "crop", "strength": 1.0},
        },
    }
    prompt["sampler"]["inputs"] |= {"positive": ["begin", 0], "negative": ["begin", 1], "latent": ["begin", 2]}
    with pytest.raises(HostError, match="picture|image"):
        server.post("/prompt", {"prompt": prompt})
