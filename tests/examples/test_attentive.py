"""The attentive probe against loops in float64, and what is chosen on which images."""

import functools
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from evaluators.linear.attentive import AttentiveOptions, attentive
from evaluators.linear.attentive_probe import AttentiveProbe, AttentiveProbes, train_attentive_probes
from evaluators.linear.sgd_probe import Schedule, predict, stored_epochs
from evaluators.protocol import Evaluation, Features, NotApplicable

DIM, TOKENS, CLASSES = 6, 4, 3


def tokens_of(seed, count=40):
    """One token in four, marked in its first feature, shows the class; the others are noise as large."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    x = rng.normal(size=(count, TOKENS, DIM))
    place = rng.integers(TOKENS, size=count)
    x[:, :, 0] = 0
    x[np.arange(count), place, 0] = 3
    x[np.arange(count), place, 1 + labels] = 2
    return Features(x.reshape(count, -1).astype(np.float32), labels.astype(np.int64), ["a", "b", "c"])


SPLITS = {"train": tokens_of(0, 120), "val": tokens_of(1), "test": tokens_of(2, 50)}


def evaluation(split="test", read=None, **encoder):
    def features(which, kind="cls"):
        assert kind == "patches"
        if read is not None:
            read.append(which)
        return SPLITS[which]

    encoder = SimpleNamespace(**{"dim": DIM, "has_patches": True, **encoder})
    return Evaluation(encoder, features, split, None, None, Path())


def by_loops(probe, x):
    """The logits of one image's tokens (N, D)."""
    state = {name: value.detach().double().numpy() for name, value in probe.state_dict().items()}
    weight, bias = state["key_and_value.weight"], state["key_and_value.bias"]
    keys, values = ([weight[part] @ token + bias[part] for token in x] for part in (slice(DIM), slice(DIM, 2 * DIM)))
    width, gathered = DIM // probe.heads, []
    for head in range(probe.heads):
        own = slice(head * width, (head + 1) * width)
        scores = [state["query"][own] @ key[own] / math.sqrt(width) for key in keys]
        shares = np.exp(scores) / np.sum(np.exp(scores))
        gathered += list(sum(share * value[own] for share, value in zip(shares, values, strict=True)))
    return state["classifier.weight"] @ gathered + state["classifier.bias"]


@pytest.mark.parametrize("heads", [1, 3])
def test_a_probe_is_that_of_loops(heads):
    probe = AttentiveProbe(DIM, CLASSES, heads)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter += torch.randn(parameter.shape)
    x = torch.randn(5, TOKENS, DIM)
    expected = [by_loops(probe, image) for image in x.double().numpy()]
    np.testing.assert_allclose(probe(x).detach(), expected, atol=1e-5)


def by_hand(probe, lr, decay, schedule):
    """AdamW written out in float64, with autograd for the gradients of a probe that the test above has checked."""
    train, state, step = SPLITS["train"], {}, 0
    probe = probe.double()
    total = schedule.epochs * math.ceil(120 / schedule.batch_size)
    for epoch in range(schedule.epochs):
        order = np.random.default_rng([schedule.seed, epoch]).permutation(120)
        for first in range(0, 120, schedule.batch_size):
            rows = order[first : first + schedule.batch_size]
            logits = probe(torch.from_numpy(train.x[rows]).double().reshape(len(rows), TOKENS, DIM))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(train.labels[rows]))
            names, values = zip(*probe.named_parameters(), strict=True)
            warm = total // 10
            rate = (
                (step + 1) / (warm + 1)
                if step < warm
                else 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (total - warm))
            )
            rate *= lr * schedule.batch_size / 256
            step += 1
            for name, value, gradient in zip(names, values, torch.autograd.grad(loss, values), strict=True):
                first_moment, second_moment = state.get(name, (0, 0))
                first_moment = 0.9 * first_moment + 0.1 * gradient
                second_moment = 0.95 * second_moment + 0.05 * gradient**2
                state[name] = first_moment, second_moment
                change = first_moment / (1 - 0.9**step) / ((second_moment / (1 - 0.95**step)).sqrt() + 1e-8)
                with torch.no_grad():
                    value -= rate * (change + (0 if name.endswith("bias") else decay) * value)
    return probe


def test_every_probe_is_trained_as_if_alone():
    schedule, decays = Schedule((1e-3, 0.1), 3, 50, seed=4), (0.0, 0.5)
    epochs = stored_epochs({"patches": SPLITS["train"]}, np.arange(120), schedule)
    found = train_attentive_probes(epochs, 3, DIM, CLASSES, 2, schedule, decays)
    torch.manual_seed(4)
    start = AttentiveProbes(DIM, CLASSES, 2, 4)
    for trained, probe, (lr, decay) in zip(
        found.probes, start.probes, itertools.product(schedule.lrs, decays), strict=True
    ):
        for name, value in by_hand(probe, lr, decay, schedule).named_parameters():
            np.testing.assert_allclose(dict(trained.named_parameters())[name].detach().cpu(), value.detach(), atol=2e-4)


def test_the_settings_are_chosen_on_val_and_the_test_split_is_read_once():
    read = []
    options = AttentiveOptions(lrs=(1e-4, 0.1), weight_decays=(0.0, 0.5), epochs=8, batch_size=30, attention_heads=1)
    (metric,) = attentive(evaluation(read=read), options)
    assert read == ["val", "train", "test"]
    schedule = Schedule(options.lrs, 8, 30)
    epochs = stored_epochs({"patches": SPLITS["train"]}, np.arange(120), schedule)
    probes = train_attentive_probes(epochs, 4, DIM, CLASSES, 1, schedule, options.weight_decays)
    accuracy = (predict(probes, SPLITS["val"].x) == SPLITS["val"].labels).mean(axis=1)
    settings = list(itertools.product(options.lrs, options.weight_decays))
    best = int(accuracy.argmax())
    assert accuracy.max() > accuracy.min()
    assert (metric.options["lr"], metric.options["weight_decay"]) == settings[best]
    assert list(metric.options["val_top1_by_lr_and_weight_decay"].values()) == accuracy.tolist()
    assert np.array_equal(metric.predictions, predict(probes, SPLITS["test"].x)[best])
    assert metric.value == np.mean(metric.predictions == SPLITS["test"].labels)
    assert metric.options["n"] == 50


def test_a_query_finds_the_token_that_a_mean_drowns():
    (metric,) = attentive(evaluation(), AttentiveOptions(lrs=(0.1,), weight_decays=(0.0,), epochs=30, batch_size=60))
    train, test = (SPLITS[split].x.reshape(-1, TOKENS, DIM).mean(axis=1) for split in ("train", "test"))
    of_means = LogisticRegression().fit(train, SPLITS["train"].labels).score(test, SPLITS["test"].labels)
    assert metric.value > 0.9 > of_means + 0.1


def test_there_is_a_head_for_every_64_features():
    for dim, heads in {DIM: 1, 64: 1, 128: 2, 100: 1}.items():
        wide = Features(np.zeros((8, 2 * dim), np.float32), np.arange(8) % 2, ["a", "b"])
        encoder = SimpleNamespace(dim=dim, has_patches=True)
        found = Evaluation(encoder, functools.partial(lambda features, *_: features, wide), "val", None, None, Path())
        (metric,) = attentive(found, AttentiveOptions(lrs=(0.1,), weight_decays=(0.0,), epochs=1))
        assert metric.options["heads"] == heads


@pytest.mark.parametrize("encoder", [None, SimpleNamespace(dim=8, has_patches=False)])
def test_without_patch_tokens_there_is_nothing_to_attend_to(encoder):
    with pytest.raises(NotApplicable, match="attends to patch tokens, which this checkpoint does not give"):
        next(attentive(Evaluation(encoder, None, "val", None, None, Path())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"`epochs` \(=0\) must be at least 1"),
        ({"attention_heads": 0}, r"`attention_heads` \(=0\) must be at least 1"),
        ({"lrs": (0.1, 0.0)}, r"`lrs` \(=\(0.1, 0.0\)\) must be positive"),
        ({"weight_decays": (-0.1,)}, r"`weight_decays` \(=\(-0.1,\)\) must be at least one number, none negative"),
        ({"attention_heads": 4}, r"`attention_heads` \(=4\) must divide 6, the width of the features"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        next(attentive(evaluation(), AttentiveOptions(**options)))
