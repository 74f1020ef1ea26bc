"""Retrain the small model from nothing: VAE, clips, transformer with its text encoders, decoder, export.

    python -m training --out DIRECTORY [--folder training/runs/small --device cuda]

Stops and goes on at any point; a stage that is finished is not done again. How good it is: python -m opensora_core evaluate --model DIRECTORY
"""

import argparse

import torch

from . import data, decoder, export, samples, transformer, vae


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="folder of the finished files, laid out as the hub repository")
    parser.add_argument("--folder", default="training/runs/small", help="of the training states (default training/runs/small)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="more than one only pays on cores that nothing else uses")
    parser.add_argument("--transformer-steps", type=int, help="in place of the recipe's, to train it longer")
    args = parser.parse_args(arguments)
    common = ["--folder", args.folder, "--device", args.device, "--threads", str(args.threads)]
    for stage in (vae, data, transformer, samples, decoder):
        longer = ["--steps", str(args.transformer_steps)] if stage is transformer and args.transformer_steps else []
        stage.main([*common, *longer])
    export.main([args.out, "--folder", args.folder])


if __name__ == "__main__":
    main()
