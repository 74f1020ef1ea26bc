"""Small random files of every model that the templates name, in a host's folders, and what makes a template small enough for a processor."""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from demo import run, tiny_flux
from tests.golden import cogvideox_files, open_sora_1_files

HERE = Path(__file__).resolve().parent
MODEL_FOLDERS = {
    "Open_Sora_v2.safetensors": "diffusion_models",
    "hunyuan_vae.safetensors": "vae",
    "t5xxl.safetensors": "text_encoders",
    "clip_l.safetensors": "text_encoders",
}
# Of the high-compression variant: recorded small weights, and where they stand for the released files.
HIGH_COMPRESSION = {
    "dc_ae_transformer_weights.safetensors": "diffusion_models/Open_Sora_v2_Video_DC_AE.safetensors",
    "dc_ae_weights.safetensors": "vae/F32T4C128_AE.safetensors",
}
OPEN_SORA_1 = (
    ("1.2", "STDiT-v3", "shapes"), ("1.2", "VAE-v1.2", "vae_shapes"), ("1.3", "STDiT-v4", "shapes"), ("1.3", "STDiT-v4-i2v", "shapes"),
    ("1.3", "VAE-v1.3", "vae_shapes"),
)  # fmt: skip
COGVIDEOX = {  # as templates name them
    "2b": "diffusion_pytorch_model.safetensors",
    "1.5_5b": "CogVideoX_1_5_5b_T2V_bf16.safetensors",
    "1.5_5b_i2v": "CogVideoX_1_5_5b_I2V_bf16.safetensors",
}

# By a template's number: of the others, 5 frames of 96x64 in 2 steps. Each model's T5 is one of its width.
_FRAMES = {"08": 9, "09": 37, "14": 8, "15": 8, "27": 17, "28": 34, "29": 17, "30": 33, "31": 34, "32": 34, "40": 9, "41": 17, "42": 17}
_T5 = {**dict.fromkeys(("27", "28", "29", "30", "31", "32"), "t5_1"), **dict.fromkeys(("40", "41", "42"), "t5_cogvideox")}
_SIDES = {"t5_1": (56, 40), "t5_cogvideox": (80, 48)}


def lay_out(base: Path, tiny_checkpoint: Path, folder: Path) -> None:
    """Write all of them. base: the host's; tiny_checkpoint: demo.tiny's; folder: an empty one."""
    models = base / "models"
    for name, place in MODEL_FOLDERS.items():
        shutil.copy(tiny_checkpoint / name, models / place / name)
    for name, place in HIGH_COMPRESSION.items():
        shutil.copy(HERE / name, models / place)
    for version, name, part in OPEN_SORA_1:
        place = models / ("vae" if part == "vae_shapes" else "diffusion_models") / f"OpenSora-{name}.safetensors"
        save_file(open_sora_1_files.weights(version, part), place)
    save_file(open_sora_1_files.t5_weights(), models / "text_encoders" / "t5_1.safetensors")
    for name, file in COGVIDEOX.items():
        save_file(cogvideox_files.network(name).state_dict(), models / "diffusion_models" / file)
    save_file(cogvideox_files.vae().state_dict(), models / "vae" / "cogvideox_vae_bf16.safetensors")
    save_file(cogvideox_files.t5(), models / "text_encoders" / "t5_cogvideox.safetensors")
    for schnell in (True, False):
        for path in tiny_flux.write(folder, schnell=schnell):
            shutil.copy(path, models / ("vae" if path.stem == "ae" else "diffusion_models"))
    run.first_frame(base / "input" / "example.png")


def smaller(number: str) -> dict:
    """Widgets of a template, by its number, with which it runs on the files above in a moment."""
    t5 = _T5.get(number, "t5xxl")
    width, height = _SIDES.get(t5, (96, 64))
    frames = _FRAMES.get(number, 5)
    size = {"t5_name": f"{t5}.safetensors", "resolution": "custom", "size": "custom", "width": width, "height": height}
    return {**size, "num_frames": frames, "length": str(frames), "steps": 2, "step": 1, "image_steps": 2, "image_resolution": "256px"}
