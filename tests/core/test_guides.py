"""The command lines of the guides of Open-Sora 1, on small random models in the folders that the guides name: what they make, and what is refused."""

import json
import re

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from opensora_core import cli, open_vae
from opensora_core.checkpoint.load import load_transformer
from opensora_core.media.latent_file import read_latents
from opensora_core.media.video import media_size, read_clip, save_video
from tests.golden import open_sora_1_files as files

SIZE = ["--image-size", "40", "56", "--num-sampling-steps", "1", "--seed", "1"]
OF = {"1.0": 3, "1.1": 4, "1.2": 17, "1.3": 17}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models 1.1 to 1.3, two pictures, a clip and a file of prompts."""
    root, draw = tmp_path_factory.mktemp("guides"), numpy.random.default_rng(0)
    for version in ("1.1", "1.2", "1.3"):
        files.write(root / version, version)
    for name in "ab":
        Image.fromarray(draw.integers(0, 255, (40, 56, 3), dtype=numpy.uint8)).save(root / f"{name}.png")
    save_video([draw.integers(0, 255, (40, 56, 3), dtype=numpy.uint8) for _ in range(20)], root / "c.mp4", 24)
    (root / "prompts.txt").write_text(f'a cat{{"reference_path": "{root / "a.png"}", "mask_strategy": "0"}}\n\na dog\n', encoding="utf-8")
    return root


@pytest.fixture
def generate(place, tmp_path):
    """generate("1.2", "--prompt", ...) -> the exit code and the names of the videos in tmp_path."""

    def run(version, *line, command="generate", size=SIZE):
        line = [text.replace("$", f"{place}/") for text in line]
        frames = [] if "--num-frames" in line else ["--num-frames", str(OF[version])]
        out = ["--out", str(tmp_path)] if command == "generate" else []
        code = cli.main([command, "--model", str(place / version), *size, *frames, *line, *out])
        return code, sorted(path.name for path in tmp_path.glob("*.mp4"))

    return run


def frames_in(path):
    return len(read_clip(path, 1000, from_end=False))


@pytest.mark.parametrize(
    ("version", "line", "frames"),
    [
        ("1.2", ["--prompt", "a cat", "--flow", "5", "--aes", "6.5", "--camera-motion", "pan left", "--cfg-scale", "5"], 17),
        ("1.2", ["--prompt", "a cat", "--num-frames", "34", "--mask-strategy", "0;0,1,0,-1,1", "--reference-path", "$a.png;$b.png"], 34),
        ("1.3", ["--prompt", "a cat", "--mask-strategy", "0,0,0,0,5,0.4", "--reference-path", "$c.mp4"], 17),
        ("1.1", ["--prompt", 'a cat{"reference_path": "$a.png", "mask_strategy": "0"}'], 4),
        ("1.2", ["--prompt", "|0| a cat |2| a dog", "--num-frames", "34", "--loop", "3", "--condition-frame-length", "5"], 34 + 2 * 17),
        ("1.3", ["--prompt", "a cat", "--num-frames", "33", "--loop", "2"], 49),
        ("1.3", ["--prompt", "a cat", "--num-sample", "1", "--aes", "very good", "--flow", "fair"], 17),
        ("1.3", ["--prompt", "a cat", "--num-frames", "33", "--loop", "2", "--parity", "scripts"], 49),
        ("1.1", ["--prompt", "a cat", "--num-frames", "6", "--loop", "2", "--condition-frame-length", "4"], 6 + 2),
        ("1.2", ["--prompt", "a cat", "--num-frames", "2s"], 51),
    ],
)
def test_a_line_of_the_guides_makes_a_video(generate, tmp_path, version, line, frames):
    code, made = generate(version, *line, "--sample-name", "kite")
    assert (code, made) == (0, ["kite_0000.mp4"])
    assert frames_in(tmp_path / made[0]) == frames and media_size(tmp_path / made[0]) == (40, 56)


@pytest.mark.parametrize(
    ("cond_type", "listed", "ours"),
    [
        ("i2v_head", "$a.png", ["--ref", "$a.png"]),
        ("i2v_tail", "$b.png", ["--ref-end", "$b.png"]),
        ("i2v_loop", "$a.png;$b.png", ["--ref", "$a.png", "--ref-end", "$b.png"]),
    ],
)
def test_references_of_a_condition_type_are_listed_as_the_guides_of_1_3_do(generate, tmp_path, place, cond_type, listed, ours):
    settings = f'a cat{{"reference_path": "{listed}"}}'.replace("$", f"{place}/")
    how = ["--num-frames", "33", "--image-cfg-scale", "2.0", "--cfg-scale", "7.5", "--save-latents"]
    asked = {
        "guides": [
            "--cond-type",
            cond_type,
            "--prompt",
            settings,
            "--use-sdedit",
            "True",
            "--use-oscillation-guidance-for-image",
            "True",
            "--use-oscillation-guidance-for-text",
            "True",
        ],
        "plain": [*ours, "--prompt", "a cat", "--use-sdedit", "False"],
        "ours": [*ours, "--prompt", "a cat"],
        "free": ["--prompt", "a cat"],
    }
    latents = {}
    for name, line in asked.items():
        assert generate("1.3", *line, *how, "--sample-name", name)[0] == 0
        latents[name] = read_latents(tmp_path / f"{name}_0000.latent")
    assert torch.equal(latents["guides"], latents["ours"])
    assert not any(torch.equal(latents["guides"], latents[name]) for name in ("free", "plain"))


def test_scales_of_1_3_rest_at_other_steps_unless_asked_not_to(generate, tmp_path):
    latents = {}
    for name, more in {"usual": [], "said": ["True"], "steady": ["False"]}.items():
        line = ["--prompt", "a cat", "--num-frames", "17", "--num-sampling-steps", "12", "--save-latents", "--sample-name", name]
        assert generate("1.3", *line, *(["--use-oscillation-guidance-for-text", *more] if more else []))[0] == 0
        latents[name] = read_latents(tmp_path / f"{name}_0000.latent")
    assert torch.equal(latents["usual"], latents["said"]) and not torch.equal(latents["usual"], latents["steady"])


def test_given_frames_and_prompts_reach_the_video(generate, tmp_path, place):
    latents = []
    for more in ([], ["--mask-strategy", "0", "--reference-path", "$a.png"], ["--flow", "9"]):
        generate("1.2", "--prompt", "a cat", "--save-latents", "--sample-name", f"v{len(latents)}", *more)
        latents.append(read_latents(tmp_path / f"v{len(latents)}_0000.latent"))
    free, given, scored = latents
    assert not torch.allclose(free, scored) and not torch.allclose(free[:, :, 0], given[:, :, 0])


def test_a_file_of_prompts_makes_each_as_its_own_line_would(generate, tmp_path):
    code, made = generate("1.2", "--prompt-path", "$prompts.txt", "--sample-name", "of", "--num-samples", "2", "--save-latents")
    assert (code, made) == (0, [f"of_{number:04d}.mp4" for number in range(4)])
    generate("1.2", "--prompt", "a dog", "--save-latents", "--sample-name", "alone")
    alone, third = (read_latents(tmp_path / f"{name}.latent") for name in ("alone_0000", "of_0002"))
    assert torch.equal(alone, third)
    assert (tmp_path / "of_0002.txt").read_text(encoding="utf-8").startswith("a dog")


@pytest.mark.parametrize(
    ("version", "vae", "transformer"),
    [
        ("1.2", "--ckpt-path-vae3d", "--ckpt-path-dit"),
        ("1.1", "--ckpt-path-vae2d", "--ckpt-path"),
        ("1.3", "--ckpt-path-vae", "--ckpt-path-dit"),
    ],
)
def test_single_files_of_the_guides(place, tmp_path, version, vae, transformer):
    folder, (dit, codec) = place / version, files.REPOSITORIES[version]
    parts = [transformer, str(folder / dit), "--ckpt-path-t5", str(folder / "t5-v1_1-xxl"), vae, str(folder / codec)]
    line = ["--num-frames", str(OF[version]), "--prompt", "a cat", "--out", str(tmp_path / "v.mp4")]
    assert cli.main(["generate", *parts, *SIZE, *line]) == 0 and (tmp_path / "v.mp4").is_file()


def halves_line(place, tmp_path, *vae):
    parts = ["--ckpt-path-dit", str(place / "1.2" / "OpenSora-STDiT-v3"), "--ckpt-path-t5", str(place / "1.2" / "t5-v1_1-xxl")]
    asked = ["--num-frames", "17", "--prompt", "a cat", "--out", str(tmp_path / "v.mp4")]
    return ["generate", *parts, *vae, *SIZE, *asked, "--mask-strategy", "0,0,0,0,5", "--reference-path", str(place / "c.mp4")]


@pytest.mark.parametrize("naming", ["diffusers", "old", "published"])
def test_a_vae_in_two_files_is_the_one_in_one_file(place, tmp_path, naming):
    folder = files.write_halves(tmp_path / "halves", naming)
    clip = torch.rand(17, 40, 56, 3, generator=torch.Generator().manual_seed(1))
    whole, halves = open_vae(place / "1.2" / "OpenSora-VAE-v1.2"), open_vae(folder / "temporal.safetensors")
    latents = whole.encode(clip)
    assert torch.equal(latents, halves.encode(clip))
    for one, other in zip(whole.decode(latents), halves.decode(latents), strict=True):
        assert numpy.array_equal(one, other)


def test_guides_name_both_files(place, tmp_path, capsys):
    folder = files.write_halves(tmp_path / "halves")
    (folder / "sdxl-vae").rename(tmp_path / "elsewhere")
    named = ["--ckpt-path-vae3d", str(folder / "temporal.safetensors")]
    assert cli.main(halves_line(place, tmp_path, *named)) == 2
    assert "none lies beside it" in capsys.readouterr().err
    assert cli.main(halves_line(place, tmp_path, *named, "--ckpt-path-vae2d", str(place / "1.3" / "OpenSora-VAE-v1.3"))) == 2
    assert "model.safetensors is an Open-Sora 1.3 VAE of other sizes" in capsys.readouterr().err
    assert cli.main(halves_line(place, tmp_path, *named, "--ckpt-path-vae2d", str(tmp_path / "elsewhere"))) == 0


def test_a_folder_with_both_halves_is_the_model(place, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("OpenSora-STDiT-v3", "t5-v1_1-xxl"):
        (folder / name).symlink_to(place / "1.2" / name)
    halves = files.write_halves(tmp_path / "halves")
    (folder / "OpenSora-VAE-v1.2").mkdir()
    (halves / "temporal.safetensors").rename(folder / "OpenSora-VAE-v1.2" / "model.safetensors")
    pixart = folder / "pixart_sigma_sdxlvae_T5_diffusers"
    pixart.mkdir()
    (halves / "sdxl-vae").rename(pixart / "vae")
    (folder / "sd-vae-ft-ema").symlink_to(place / "1.1" / "sd-vae-ft-ema")
    line = ["--num-frames", "17", "--prompt", "a cat", *SIZE]
    for name, model in (("whole", place / "1.2"), ("halves", folder)):
        assert cli.main(["generate", "--model", str(model), *line, "--out", str(tmp_path / f"{name}.mp4")]) == 0
    one, other = (read_clip(tmp_path / f"{name}.mp4", 20, from_end=False) for name in ("whole", "halves"))
    assert numpy.array_equal(one, other)
    (folder / "sdxl-again").symlink_to(pixart / "vae")
    assert cli.main(["generate", "--model", str(folder), *line, "--out", str(tmp_path)]) == 2
    assert "2 picture VAEs lie beside it" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "size"), [(["--aspect-order", "hw"], (144, 256)), ([], (256, 144))])
def test_ratios_in_the_guides_order(generate, tmp_path, capsys, more, size):
    line = ["--resolution", "144p", "--aspect-ratio", "9:16", *more, "--num-frames", "1", "--prompt", "a cat", "--seed", "1"]
    generate("1.2", *line, "--num-sampling-steps", "1", size=[])
    assert Image.open(tmp_path / "video_0000.png").size == size[::-1]
    assert ("with --aspect-order hw it is 256x144" in capsys.readouterr().err) == (not more)


def test_a_benchmark_writes_its_report(generate, tmp_path):
    report, given = tmp_path / "report.json", ["--reference-path", "$a.png"]
    generate("1.2", "--benchmark-save-path", str(report), "--warmup-count", "0", "--eval-count", "2", *given, command="benchmark")
    made = json.loads(report.read_text(encoding="utf-8"))
    assert len(made["runs"]) == 2 and made["settings"]["references"] and not made["settings"]["image"]


@pytest.mark.parametrize(
    "more",
    [["--offload", "minimal", "--precision", "int8"], ["--dtype", "bf16", "--precision", "fp8_e4m3fn"], ["--precision", "nf4"]],
)
@pytest.mark.parametrize("version", ["1.1", "1.2", "1.3"])
def test_memory_is_saved_as_of_any_model(generate, version, more):
    pytest.importorskip("accelerate" if "bf16" in more else "bitsandbytes")
    assert generate(version, "--prompt", "a cat", *more) == (0, ["video_0000.mp4"])


@pytest.mark.parametrize(("precision", "bound"), [("fp8_e4m3fn", 0.03), ("int8", 0.01), ("nf4", 0.11)])
@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "1.3"])
def test_weights_of_fewer_bits_stand_for_the_files(tmp_path, version, precision, bound):
    if precision != "fp8_e4m3fn":
        pytest.importorskip("bitsandbytes")
    save_file(files.weights(version), tmp_path / "dit.safetensors")
    model = load_transformer(tmp_path / "dit.safetensors", torch.float32, precision=precision)
    plain = dict(load_transformer(tmp_path / "dit.safetensors", torch.float32).named_modules())
    held = {name: layer for name, layer in model.named_modules() if getattr(layer, "form", None) is not None}
    assert {name.rsplit(".", 2)[1] for name in held} >= {"attn", "cross_attn", "mlp"}
    for name, layer in held.items():
        shape = (layer.out_features, layer.in_features)
        values = layer.form.dequantise(layer.weight, layer.weight_scale, shape, torch.float32)
        error = (values - plain[name].weight).norm() / plain[name].weight.norm()
        assert 1e-4 < error < bound, name


BAD = [
    (["--mask-strategy", "0,q", "--reference-path", "$a.png"], "Use a whole number.*mask_strategy group '0,q': reference is 'q'"),
    (["--mask-strategy", "0,0,0,0,1,2", "--reference-path", "$a.png"], "Use 0 .kept. to 1.*edit is 2.0"),
    (["--mask-strategy", "0,1", "--reference-path", "$a.png"], "names reference 1; 1 are given"),
    (["--mask-strategy", "0", "--reference-path", "$z.png"], "--reference-path: '.*z.png' does not exist"),
    (["--mask-strategy", "0", "--reference-path", "$prompts.txt"], "Reference 0.*is not a picture"),
    (["--mask-strategy", "0"], "Give --reference-path too"),
    (["--parity", "scripts"], "--parity scripts goes with --loop N"),
    (["--loop", "0"], "Use at least 1.*--loop 0 makes nothing"),
    (["--loop", "2", "--condition-frame-length", "3"], "Use 5 or a multiple of it: --condition-frame-length 3"),
    (["--loop", "2", "--condition-frame-length", "0"], "Use 5 or a multiple of it: --condition-frame-length 0"),
    (["--condition-frame-length", "5"], "goes with --loop N"),
    (["--num-frames", "50"], "Use 34 or 51.*num_frames=50 is not a multiple of 17, nor 1"),
    (["--aes", "11"], "aesthetic score=11 is not a number from 0 to 10"),
    (
        ["--cond-type", "i2v_head", "--reference-path", "$a.png;$b.png"],
        "--cond-type i2v_head takes 1 reference, and --reference-path lists 2",
    ),
    (["--flow", "-1"], "motion_score=-1.0 is no score"),
    (["--prompt", 'a cat{"mask_strategy": 3}'], "Write it as text.*mask_strategy at the end of the prompt is 3"),
    (["--prompt", "a cat{bad"], "is not a JSON record"),
    (["--prompt", "|0| a |0| b", "--loop", "2"], r"\|0\| in the prompt is not a loop after"),
    (["--vae", "$1.3/OpenSora-VAE-v1.3"], "Open-Sora 1.3 VAE and OpenSora-STDiT-v3 works on the latents of the Open-Sora 1.2 VAE"),
    (["--dit", "$bad.pth"], "bad.pth cannot be read .* holds more than tensors"),
    (["--dit", "$1.2/OpenSora-VAE-v1.2"], "is the Open-Sora 1.2 VAE|belongs in the VAE slot"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_what_cannot_be_made_is_one_sentence_before_any_work(place, tmp_path, capsys, monkeypatch, line, words):
    class Code:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"x": Code()}, place / "bad.pth")
    monkeypatch.setattr("opensora_core.commands.jobs.Jobs.run", lambda *given: pytest.fail("it was begun"))
    folder, (dit, vae) = place / "1.2", files.REPOSITORIES["1.2"]
    parts = {
        "--dit": str(folder / dit),
        "--vae": str(folder / vae),
        "--t5": str(folder / "t5-v1_1-xxl"),
        "--prompt": "a cat",
        "--num-frames": "34",
    }
    given = [text.replace("$", f"{place}/") for text in line]
    parts |= dict(zip(given[::2], given[1::2], strict=True))
    assert cli.main(["generate", *SIZE, *(word for pair in parts.items() for word in pair), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "run" not in said.out and len(said.err.strip().splitlines()) == 1
    assert re.search(words, said.err), said.err


def test_flags_of_the_guides_that_mean_nothing_here_are_refused_with_what_does(generate, capsys):
    with pytest.raises(SystemExit):
        generate("1.2", "--prompt", "a cat", "--llm-refine", "True", "--flash-attn", "False")
    said = capsys.readouterr().err
    assert "--refine-prompt" in said and "--attention" in said and "--layernorm-kernel" not in said
