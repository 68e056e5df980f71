"""The network that is fine-tuned: its head, stochastic depth, and which layer learns at which rate."""

import pytest
import torch
from transformers import Dinov2Model, ViTModel, ViTMSNModel

from evaluators.finetune.classifier import Classifier, layer_decay_groups
from finetune_fixtures import tiny_encoder


def classifier_of(encoder, **options):
    torch.manual_seed(0)
    return Classifier(encoder, 3, **{"drop_path": 0.0, **options})


@pytest.mark.parametrize("kind", [ViTModel, ViTMSNModel, Dinov2Model])
def test_layer_decay_by_hand(kind):
    classifier = classifier_of(tiny_encoder(kind))
    groups = layer_decay_groups(classifier, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    found = {
        names[id(parameter)].removeprefix("model."): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    blocks = "encoder.layer" if kind is Dinov2Model else "layers"
    norm1 = "norm1" if kind is Dinov2Model else "layernorm_before"
    expected = {
        **{"embeddings.cls_token": (0.125, 0), "embeddings.position_embeddings": (0.125, 0)},
        "embeddings.patch_embeddings.projection.weight": (0.125, 0.05),
        "embeddings.patch_embeddings.projection.bias": (0.125, 0),
        f"{blocks}.0.mlp.fc1.weight": (0.25, 0.05),
        f"{blocks}.0.{norm1}.weight": (0.25, 0),
        f"{blocks}.1.mlp.fc2.weight": (0.5, 0.05),
        f"{blocks}.1.mlp.fc2.bias": (0.5, 0),
        **{"layernorm.weight": (1, 0), "head.weight": (1, 0.05), "head.bias": (1, 0)},
    }
    assert {name: found[name] for name in expected} == expected
    assert sum(len(group["params"]) for group in groups) == len(found)
    left_out = {name for name, parameter in classifier.named_parameters() if not parameter.requires_grad}
    assert {name.removeprefix("model.") for name in names.values()} - set(found) == {
        name.removeprefix("model.") for name in left_out
    }
    assert all("pooler" in name or "mask_token" in name for name in left_out)  # what gets no gradient


@pytest.mark.parametrize("mean_patch", [False, True])
def test_logits_are_linear_in_the_encoders_tokens(mean_patch):
    encoder = tiny_encoder()
    classifier = classifier_of(encoder, mean_patch=mean_patch).eval()
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        tokens = encoder.patches(images).mean(dim=(1, 2)) if mean_patch else encoder.cls(images)
        assert torch.allclose(classifier(images), classifier.head(tokens), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert classifier.head.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier_of(encoder, head_scale=0.001).head.weight.std().item() == pytest.approx(2e-5, rel=0.2)


def test_drop_path_acts_in_training_alone():
    classifier = classifier_of(tiny_encoder(), drop_path=0.9)
    images = torch.randn(8, 3, 16, 16)
    first, second = (classifier.eval()(images) for _ in range(2))
    assert torch.equal(first, second)
    first, second = (classifier.train()(images) for _ in range(2))
    assert not torch.allclose(first, second)
    assert torch.equal(classifier_of(tiny_encoder()).train()(images), classifier_of(tiny_encoder()).eval()(images))
