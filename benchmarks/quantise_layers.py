"""Which layers of the transformer may be quantised: the error of the model's output when each group of them is.

    python -m benchmarks.quantise_layers [--hidden 768 --depth 3 --depth-single 6] [--out FILE]

Three models: the small one of demo/tiny.py, a wider one of Gaussian weights, and the wider one with one weight in a thousand ten times
as large, as trained weights have them. For every group and format: the relative RMS error of the predicted velocity, mean over
three timesteps, with the group's weights quantised and everything else in fp32; and with the inputs of those layers rounded too, as
ComfyUI's fast kernels round them (fp8: to float8 without a scale; int8: every token to 8 bits under its own scale).

The decision: a group is kept as it is stored if quantising it saves less than a hundredth of the released file, or raises the
error of quantising attention and MLP by more than a tenth. Random weights are not trained ones: the figures compare groups, they do not
promise a video's quality.
"""

import argparse
import math
import sys
from dataclasses import replace

import torch

from demo import tiny
from opensora_core.checkpoint.quantised import FP8_MAX, NF4, Float8, Int8, Int8Matmul, QuantisedOperations
from opensora_core.families import table
from opensora_core.family import QUANTISED_GROUPS
from opensora_core.networks.mmdit.config import OPEN_SORA_2, TransformerConfig
from opensora_core.networks.mmdit.layout import GROUPS, module_name
from opensora_core.networks.mmdit.model import MMDiT

from . import record

TIMESTEPS = (0.95, 0.6, 0.2)
BLOCKS = ("attention", "mlp")
SMALLEST_SAVING = 0.01  # of the released file
LARGEST_INCREASE = 0.1  # of the error of quantising attention and MLP


class Float8Inputs(Float8):
    """fp8 weights, and inputs rounded to fp8 under a scale of one, as ComfyUI's fp8 units get them."""

    def linear(self, x, layer):
        rounded = x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)
        return super().linear(rounded, layer)


FORMS = {"fp8_e4m3fn": Float8, "int8": Int8, "nf4": NF4, "fp8_e4m3fn, inputs too": Float8Inputs, "int8, inputs too": Int8Matmul}


def random_weights(config: TransformerConfig, tails: bool) -> dict[str, torch.Tensor]:
    """Weights that keep variance, gains near one; with tails, one in a thousand ten times as large."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, shape in table.manifest(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[key] = 1 + 0.05 * noise if key.endswith(".scale") else 0.02 * noise
            continue
        if tails:
            noise[torch.rand(shape, generator=generator) < 1e-3] *= 10
        weights[key] = noise / math.sqrt(shape[1])
    return weights


def build(config: TransformerConfig, weights: dict[str, torch.Tensor]) -> MMDiT:
    model = MMDiT(config, QuantisedOperations, device="meta")
    model.load_state_dict({module_name(key): tensor.float() for key, tensor in weights.items()}, assign=True)
    return model.requires_grad_(False).train(False)


def predictions(model: MMDiT) -> list[torch.Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(1)
    x = torch.randn(1, config.in_channels, 3, 8, 12, generator=generator)
    cond = torch.randn(1, config.in_channels + 1, 3, 8, 12, generator=generator)
    context = torch.randn(1, 32, config.context_in_dim, generator=generator)
    y = torch.randn(1, config.vec_in_dim, generator=generator)
    with torch.inference_mode():
        return [model(x, torch.tensor([t]), context, y, cond) for t in TIMESTEPS]


def output_error(model: MMDiT, expected: list[torch.Tensor], layers: list[str], form) -> float:
    """Mean relative RMS error with some layers quantised; the model is as it was afterwards."""
    modules = [model.get_submodule(layer) for layer in layers]
    originals = [module.weight for module in modules]
    for module in modules:
        module.hold(form, *form.quantise(module.weight))
    found = predictions(model)
    for module, weight in zip(modules, originals, strict=True):
        module.form, module.weight = None, weight
        del module.weight_scale, module.adapters
    return sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)) / len(found)


def measure(title: str, config: TransformerConfig, weights: dict[str, torch.Tensor]) -> dict:
    model = build(config, weights)
    manifest, expected = table.manifest(config), predictions(model)
    sets = {**{group: (group,) for group in GROUPS}, "attention + mlp": BLOCKS, "all": tuple(GROUPS)}
    errors: dict[str, dict[str, float]] = {}
    for name, groups in sets.items():
        layers = table.DEFAULT.layers_to_quantise(manifest, groups)
        errors[name] = {form_name: round(output_error(model, expected, layers, form()), 6) for form_name, form in FORMS.items()}
        sys.stdout.write(f"{title:12} {name:16} " + "  ".join(f"{form} {error:.3%}" for form, error in errors[name].items()) + "\n")
        sys.stdout.flush()
    return errors


def savings() -> dict[str, float]:
    """Share of the released file's bytes that an 8-bit form of each group saves."""
    manifest = table.manifest(OPEN_SORA_2)
    total = sum(math.prod(shape) for shape in manifest.values())
    return {
        group: sum(math.prod(manifest[f"{x}.weight"]) for x in table.DEFAULT.layers_to_quantise(manifest, (group,))) / 2 / total
        for group in GROUPS
    }


def decide(models: dict[str, dict], saved: dict[str, float]) -> dict[str, dict]:
    """Why each group is quantised or kept: its largest increase of the error over the models, for fp8 and int8 with inputs too."""
    verdicts = {}
    for group in GROUPS:
        increases = []
        for errors in models.values():
            for form in ("fp8_e4m3fn, inputs too", "int8, inputs too"):
                blocks = errors["attention + mlp"][form]
                increases.append(math.hypot(blocks, errors[group][form]) / blocks - 1)
        is_block, increase = group in BLOCKS, max(increases)
        chosen = is_block or (saved[group] >= SMALLEST_SAVING and increase <= LARGEST_INCREASE)
        verdicts[group] = {
            "quantised": chosen,
            "file_saved": round(saved[group], 4),
            "error_increase": None if is_block else round(increase, 4),
        }
    return verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 768), ("depth", 3), ("depth-single", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out")
    args = parser.parse_args()
    wide = replace(OPEN_SORA_2, hidden_size=args.hidden, num_heads=args.hidden // 128, mlp_hidden_size=4 * args.hidden, context_in_dim=512)
    wide = replace(wide, depth=args.depth, depth_single_blocks=args.depth_single)
    models = {
        "small": measure("small", tiny.TRANSFORMER, tiny.transformer_weights(torch.Generator().manual_seed(0))),
        "wide": measure("wide", wide, random_weights(wide, tails=False)),
        "wide, tails": measure("wide, tails", wide, random_weights(wide, tails=True)),
    }
    saved = savings()
    verdicts = decide(models, saved)
    for group, verdict in verdicts.items():
        sys.stdout.write(f"{group:12} {verdict}\n")
    default = tuple(group for group in GROUPS if verdicts[group]["quantised"])
    sys.stdout.write(f"default set: {', '.join(QUANTISED_GROUPS)}; this measurement: {', '.join(default)}\n")
    written = record.write("quantise_layers", {"wide": wide.__dict__, "errors": models, "groups": verdicts}, args.out)
    sys.stdout.write(f"{written}\n")


if __name__ == "__main__":
    main()
