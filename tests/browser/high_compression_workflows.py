"""The workflows of the high-compression variant (Video DC-AE): graphs in API form, their notes, layout and files, for build_workflows.py."""

from dataclasses import replace

TEXT_NOTE = """## Text to video, high compression, 768px

128 frames of 1024 x 576 at 24 FPS with the high-compression variant of Open-Sora 2.0: its VAE, the Video DC-AE, makes one latent of 4 frames and 32 x 32 pixels, so \
a forward works on about a quarter of the tokens. Faster, and by its makers' own report clearly less good.

- Its clip comes from **Open-Sora Empty Latent (High Compression)**: lengths are multiples of 4 (8, 12, ... 128), sides multiples of 32.
- Model and VAE belong together: either with the other variant's is refused in a sentence.
- 50 steps take 80 forwards. No draft or latent of Open-Sora 2.0 fits this variant.
"""
IMAGE_NOTE = """## Image to video, high compression, 768px

The picture becomes the beginning of 128 frames of 1024 x 576: the first latent is the picture's, and the first four frames are made from it. 50 steps take 110 forwards.

- The variant was trained with text and with a first frame. A last frame runs too, but was not trained.
- `fit` says how a picture of another shape is made to fit: crop, pad or stretch.
- Lengths are multiples of 4 (8, 12, ... 128), sides multiples of 32.
"""
FILES_NOTE = """## Files this workflow reads

**models/diffusion_models**
- `Open_Sora_v2_Video_DC_AE.safetensors`, 23.8 GB, from the hub repository hpcai-tech/Open-Sora-v2-Video-DC-AE

**models/text_encoders** (the files Flux uses; if you have them, nothing to download)
- `t5xxl_fp16.safetensors`, 9.8 GB (an fp8 file of it works too)
- `clip_l.safetensors`, 246 MB

**models/vae**
- `F32T4C128_AE.safetensors`, 0.9 GB (1.8 GB in fp32), from the same repository

## Licences (read them yourself; this is not advice)
- **Open_Sora_v2_Video_DC_AE**: adapted from Open_Sora_v2, whose card says Apache-2.0. The project's finetuning guide starts from FLUX.1-dev, so it may be a \
derivative of it, whose own licence is non-commercial; ask counsel before commercial use.
- **F32T4C128_AE**: see the card of its repository. The HunyuanVideo VAE and its licence are not part of this workflow.
- **T5** Apache-2.0, **CLIP** MIT.
"""
HUB = "https://huggingface.co/hpcai-tech/Open-Sora-v2-Video-DC-AE/resolve/main"
DIT, VAE = "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"
FILES = {
    "1": [{"name": DIT, "url": f"{HUB}/{DIT}", "directory": "diffusion_models"}],
    "3": [{"name": VAE, "url": f"{HUB}/{VAE}", "directory": "vae"}],
}


def high_compression(graph: dict, name: str) -> dict:
    """The same graph with the variant's two files and its own empty clip, which is told the model: another one is then refused first."""
    graph["1"]["inputs"] = {"model_name": DIT}
    graph["3"]["inputs"] = {"vae_name": VAE}
    graph["5"] = {"class_type": "OpenSoraEmptyLatentHighCompression", "inputs": {"model": ["1", 0]}}
    graph["9"]["inputs"]["filename_prefix"] = f"video/{name}"
    return graph


def jobs(job, text_to_video, image_to_video, released) -> list[dict]:
    """Requests to the front-end. What is given: build_workflows'."""
    files = replace(released, note=FILES_NOTE, models=released.models | FILES)
    columns = [["about", "files"], ["1", "2", "3"], ["4", "5"], ["6"], ["7", "8", "9"]]
    graph = high_compression(text_to_video("768px"), "open-sora-high-compression")
    made = [job("open-sora-2-high-compression-text-to-video-768px", graph, TEXT_NOTE, columns, files)]
    columns = [["about", "files"], ["1", "2", "3", "10"], ["4", "5"], ["11", "6"], ["7", "8", "9"]]
    graph = high_compression(image_to_video("768px"), "open-sora-high-compression-i2v")
    return [*made, job("open-sora-2-high-compression-image-to-video-768px", graph, IMAGE_NOTE, columns, files)]
