"""Numbers by a formula of integers, the same with every version of every library: small models and inputs need not be stored."""

import zlib

import torch


def numbers(shape, name):
    """fp32 of mean 0 and variance 1, uniform, from a name; each is a multiple of 2**-7 times the root of 3."""
    count = 1
    for side in shape:
        count *= side
    x = torch.arange(count, dtype=torch.int64) + zlib.crc32(name.encode())
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return ((x % 256 - 127.5) / 128 * 3**0.5).float().reshape(tuple(shape))


def value(name, shape):
    """A parameter: loud enough that a wrong layout shows."""
    u = numbers(shape, name)
    if len(shape) == 1:
        return 1 + 0.3 * u if name.endswith("weight") else 0.2 * u
    if "pos_embedding" in name:
        return 0.5 * u
    return u / u[0].numel() ** 0.5


def fill(model):
    """Give every parameter and stored buffer its value, by its key."""
    state = {name: value(name, tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.train(False).requires_grad_(False)


def sample(tensor, count=3000):
    """Values spread over a tensor, at most about `count`: what a golden keeps of it."""
    flat = tensor.detach().float().flatten()
    return flat[:: max(1, flat.numel() // count) | 1].clone()
