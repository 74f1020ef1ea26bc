"""Which tensors the files have that other libraries build the modules for, or of which only a part is read."""

from ..shapes import Manifest


def t5_manifest(
    width: int = 4096, mlp: int = 10240, inner: int = 4096, layers: int = 24, heads: int = 64, vocabulary: int = 32128
) -> Manifest:
    """Shape of every tensor of a T5 v1.1 encoder in transformers' names; the defaults are XXL."""
    manifest: Manifest = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for index in range(layers):
        attention, feed = (f"encoder.block.{index}.layer.{part}." for part in (0, 1))
        for name in "qkv":
            manifest[f"{attention}SelfAttention.{name}.weight"] = (inner, width)
        manifest[f"{attention}SelfAttention.o.weight"] = (width, inner)
        manifest[f"{attention}layer_norm.weight"] = manifest[f"{feed}layer_norm.weight"] = (width,)
        manifest[f"{feed}DenseReluDense.wi_0.weight"] = manifest[f"{feed}DenseReluDense.wi_1.weight"] = (mlp, width)
        manifest[f"{feed}DenseReluDense.wo.weight"] = (width, mlp)
    manifest["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
    return manifest


def clip_text_manifest(width: int = 768, layers: int = 12, mlp: int = 3072, vocabulary: int = 49408, positions: int = 77) -> Manifest:
    """Shape of every tensor of a CLIP text encoder in transformers' names; the defaults are CLIP-L."""
    manifest: Manifest = {
        "text_model.embeddings.token_embedding.weight": (vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (positions, width),
    }
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (mlp, width), "mlp.fc2": (width, mlp)}
    norms = [f"text_model.encoder.layers.{index}.layer_norm{part}" for index in range(layers) for part in (1, 2)]
    for index in range(layers):
        for name, shape in linears.items():
            manifest[f"text_model.encoder.layers.{index}.{name}.weight"] = shape
            manifest[f"text_model.encoder.layers.{index}.{name}.bias"] = shape[:1]
    for name in (*norms, "text_model.final_layer_norm"):
        manifest[f"{name}.weight"] = manifest[f"{name}.bias"] = (width,)
    return manifest


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
