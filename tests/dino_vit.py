"""DINO's VisionTransformer from its definition: its weights as the code saves them, and its forward pass."""

import math

import torch
import torch.nn.functional as F


def dino_weights(depth=3, dim=16, patch=8, side=4, mlp=2, seed=0):
    """A state dict with the names and shapes of DINO's VisionTransformer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    weights = {"cls_token": draw(1, 1, dim), "pos_embed": draw(1, 1 + side**2, dim)}
    layers = {"patch_embed.proj": (dim, 3, patch, patch), "norm": (dim,)}
    for block in range(depth):
        shapes = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
        shapes |= {"mlp.fc1": (mlp * dim, dim), "mlp.fc2": (dim, mlp * dim)}
        layers |= {f"blocks.{block}.{name}": shape for name, shape in shapes.items()}
    for name, shape in layers.items():
        weights |= {f"{name}.weight": draw(*shape) + ("norm" in name), f"{name}.bias": draw(shape[0])}
    return weights


def dino_positions(positions, h, w):
    """DINO's interpolation of position embeddings (1, side * side, D) of patches: (1, D, h, w)."""
    side = math.isqrt(positions.shape[1])
    grid = positions.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if (h, w) == (side, side):
        return grid
    return F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")


def dino_tokens(weights, x, heads):
    """The forward pass of DINO's VisionTransformer, from its definition."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    dim = weights["pos_embed"].shape[2]

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (dim,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    patches = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8)
    grid = dino_positions(weights["pos_embed"][:, 1:], *patches.shape[2:])
    cls = (weights["cls_token"] + weights["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, (patches + grid).flatten(2).transpose(1, 2)], dim=1)
    for block in range(depth):
        qkv = linear(norm(x, f"blocks.{block}.norm1"), f"blocks.{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, heads, dim // heads)).permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(2, 3)) / math.sqrt(dim // heads)).softmax(3) @ v
        x = x + linear(attended.transpose(1, 2).flatten(2), f"blocks.{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{block}.norm2"), f"blocks.{block}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{block}.mlp.fc2")
    return norm(x, "norm")
