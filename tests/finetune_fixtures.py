"""A tiny random vision transformer and a few photographs, for the tests of fine-tuning."""

import dataclasses

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel, ViTMSNConfig, ViTMSNModel

from data.images import load_images
from evaluators.features.encoder import as_encoder

TINY = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_encoder(kind=ViTModel, device="cpu"):
    config = {ViTModel: ViTConfig, ViTMSNModel: ViTMSNConfig, Dinov2Model: Dinov2Config}[kind]
    options = {} if kind is ViTMSNModel else {"initializer_range": 0.15}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(**TINY, intermediate_size=64, **options))
    return as_encoder(model.to(device), "tiny")


def photos(split, count=None):
    images = load_images("photos", split)
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    return dataclasses.replace(images, labels=images.labels[rows], items=[images.items[row] for row in rows])
