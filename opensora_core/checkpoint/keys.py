"""Which tensors the files have that other libraries build the modules for, or of which only a part is read."""

from ..shapes import Manifest


def flux_ae_manifest() -> Manifest:
    """Shape of every tensor of the Flux.1 picture autoencoder, which the hub repository also holds."""
    widths, weights = (128, 256, 512, 512), {}

    def conv(name, out, width, kernel=3):
        weights[name] = (out, width, kernel, kernel)

    def resnet(name, width, out):
        weights[f"{name}.norm1"], weights[f"{name}.norm2"] = (width,), (out,)
        conv(f"{name}.conv1", out, width)
        conv(f"{name}.conv2", out, out)
        if width != out:
            conv(f"{name}.nin_shortcut", out, width, 1)

    for side, (first, last, out) in {"encoder": (3, 512, 32), "decoder": (16, 128, 3)}.items():
        conv(f"{side}.conv_in", 128 if side == "encoder" else 512, first)
        for name in ("block_1", "block_2"):
            resnet(f"{side}.mid.{name}", 512, 512)
        weights[f"{side}.mid.attn_1.norm"] = (512,)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{name}", 512, 512, 1)
        weights[f"{side}.norm_out"] = (last,)
        conv(f"{side}.conv_out", out, last)
    for level, width in enumerate(widths):
        for block in range(2):
            resnet(f"encoder.down.{level}.block.{block}", widths[max(0, level - 1)] if block == 0 else width, width)
        for block in range(3):
            resnet(f"decoder.up.{level}.block.{block}", widths[min(3, level + 1)] if block == 0 else width, width)
        if level < 3:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    return {f"{name}.{kind}": shape if kind == "weight" else shape[:1] for name, shape in weights.items() for kind in ("weight", "bias")}
