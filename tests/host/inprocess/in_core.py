"""A guided run of the library over the same network, to hold the host's against."""

import torch


def run_in_core(pack, network, noise, sigmas, guidance, entries, condition=None, dtype=torch.float32):
    """Latents [B, C, T, H, W] in the transformer's scale.

    Args:
        noise: (shape, seed).
        entries: the positive and the negative CONDITIONING's first.
        condition: an ImageCondition. dtype: of the latents between steps.
    """
    run, schedule, solvers = (pack(f"opensora_core.sampling.{name}") for name in ("run", "schedule", "solvers"))
    text = run.TextCondition(*({"context": context, "y": values["pooled_output"]} for context, values in entries))
    shape, seed = noise
    way = schedule.Schedule(sigmas, sigmas[:-1])
    with torch.inference_mode():
        told = run.Conditions(text, condition)
        return run.sample(run.SamplingRecipe(), network, solvers.noise(shape, seed, dtype=dtype), way, guidance, told).float()
