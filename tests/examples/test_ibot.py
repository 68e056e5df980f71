"""The loss of iBOT and its centres against appendix A.5 written out in float64, position by position."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vmf_reference
from config.recipe import load_recipe
from methods.backbone import tokens
from methods.registry import Method, build_method

TINY = {"hidden_size": 16, "out_dim": 12, "num_hidden_layers": 1, "hidden_dim": 16, "bottleneck_dim": 8}
IMAGES, EPOCH, TAU = 3, 2, 0.1
CELLS = [("vmf", "probability"), ("none", "logit")]


def make_method(**overrides: Any) -> Method:
    """A method in float64 away from its start: prototypes of many norms, and centres."""
    generator = torch.Generator().manual_seed(0)
    method = build_method(load_recipe("photos_ibot_vmf", TINY | {"ibot.patch_out_dim": 12} | overrides)).double()
    for name, parameter in method.named_parameters():
        low, high = (0.4, 4) if name.endswith("weight_g") else (-0.3, 0.3)
        with torch.no_grad():
            parameter.uniform_(low, high, generator=generator)
    for center in method.loss.buffers():
        center.copy_(torch.rand(center.shape, generator=generator, dtype=torch.float64))
    method.attach()
    return method


@pytest.fixture
def batch() -> dict[str, list[Tensor]]:
    crops = [torch.randn(IMAGES, 3, size, size, dtype=torch.float64) for size in (32, 32, 16, 16)]
    masks = [torch.rand(IMAGES, 4, 4) < 0.4 for _ in range(2)]
    masks[0][1] = False  # nothing is masked in this view of this image
    return {"crops": crops, "masks": masks}


class Written:
    """One network's side of the equations: raw scores, norms, and what its probabilities are."""

    def __init__(self, network: Any, crops: list[Tensor], masks: list[Tensor] | None) -> None:
        head = network.head
        layers = head.last_layer, head.last_layer2
        prototypes = [layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) for layer in layers]
        self.norms = [w.norm(dim=1) for w in prototypes]
        self.scores: list[list[Tensor]] = [[], []]  # of [CLS] by crop (B, K); of patches by global crop (B, N, K2)
        for index, crop in enumerate(crops):
            mask = masks[index].flatten(1) if masks is not None and index < 2 else None
            y = head.mlp(tokens(network.backbone, crop, mask=mask))
            y = y / y.norm(dim=-1, keepdim=True)
            self.scores[0].append(y[:, 0] @ prototypes[0].T)
            if index < 2:
                self.scores[1].append(y[:, 1:] @ prototypes[1].T)


def log_c(norms: Tensor, temperature: float, cell: tuple[str, str]) -> Tensor:
    return vmf_reference.with_gradient(norms, 8, temperature) if cell[0] == "vmf" else torch.zeros_like(norms)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("cell", "shared", "patch_out_dim"), [(*CELLS[:1], True, 12), (*CELLS[1:], True, 12), (*CELLS[:1], False, 10)]
)
def test_loss_and_centres_are_those_of_the_appendix(
    cell: tuple[str, str], shared: bool, patch_out_dim: int, fused: bool, batch: dict[str, list[Tensor]]
) -> None:
    switches = dict(zip(("normalization", "centering"), cell, strict=True))
    own = {"ibot.shared_head": shared, "ibot.patch_out_dim": patch_out_dim, "ibot.patch_teacher_temp": 0.05}
    own |= {"ibot.cls_weight": 0.7, "ibot.patch_weight": 1.5, "ibot.patch_center_momentum": 0.8}
    method = make_method(**switches, **own, fused_loss=fused)
    temperatures = [method.loss.teacher_temp_schedule[EPOCH], method.loss.teacher_temp2_schedule[EPOCH]]
    assert temperatures == pytest.approx([0.055, 0.045])
    crops, masks = batch["crops"], batch["masks"]
    student, teacher = Written(method.student, crops, masks), Written(method.teacher, crops[:2], None)
    names = ["log_center", "log_center2"] if cell[1] == "probability" else ["center", "center2"]
    before = [method.loss.state_dict()[name].flatten().clone() for name in names]

    log_p = [
        [(s / TAU + log_c(student.norms[i], TAU, cell)).log_softmax(-1) for s in student.scores[i]] for i in (0, 1)
    ]
    offsets = [b if cell[1] == "probability" else b / t for b, t in zip(before, temperatures, strict=True)]
    targets = [
        [(s / t + log_c(teacher.norms[i], t, cell) - offsets[i]).softmax(-1) for s in teacher.scores[i]]
        for i, t in enumerate(temperatures)
    ]
    cls = sum(-(targets[0][q] * log_p[0][v]).sum(-1).mean() for q in range(2) for v in range(4) if v != q) / 6
    patch = torch.zeros(())
    for view in range(2):
        for image in range(IMAGES):
            positions = masks[view][image].flatten().nonzero().flatten().tolist()
            for i in positions:  # the same position of the same view
                entropy = -(targets[1][view][image, i] * log_p[1][view][image, i]).sum()
                patch = patch + entropy / (len(positions) * IMAGES * 2)

    loss, statistics = method(batch, EPOCH)
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if fused else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(loss, 0.7 * cls + 1.5 * patch, **tolerance)
    torch.testing.assert_close(statistics["cls_loss"], 0.7 * cls.detach(), **tolerance)
    torch.testing.assert_close(statistics["patch_loss"], 1.5 * patch.detach(), **tolerance)
    entropies = torch.cat([-(t * t.log()).sum(-1) for t in targets[0]])
    torch.testing.assert_close(statistics["target_entropy"], entropies.mean(), **tolerance)
    torch.testing.assert_close(statistics["kl"], cls.detach() - entropies.mean(), **tolerance)
    assert statistics["masked"].item() == pytest.approx(torch.stack(masks).float().mean().item())

    found, wanted = (
        torch.autograd.grad(loss, list(method.student.parameters())),
        torch.autograd.grad(0.7 * cls + 1.5 * patch, list(method.student.parameters())),
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)

    for name, scores, t, momentum, center, norms in zip(
        names, teacher.scores, temperatures, (0.9, 0.8), before, teacher.norms, strict=True
    ):
        rows = torch.cat(scores).flatten(0, -2).detach()  # all tokens of the teacher, masked or not
        if cell[1] == "probability":
            after = vmf_reference.next_center(center, rows, t, momentum, log_c=log_c(norms, t, cell))
        else:
            after = momentum * center + (1 - momentum) * (rows + t * log_c(norms, t, cell)).mean(0)
        torch.testing.assert_close(method.loss.state_dict()[name].flatten(), after, rtol=1e-6, atol=1e-7)


def test_before_its_epoch_nothing_is_masked(batch: dict[str, list[Tensor]]) -> None:
    early, late = (make_method(**{"ibot.mask_start_epoch": epoch}) for epoch in (1, 0))
    unmasked = batch | {"masks": [torch.zeros_like(mask) for mask in batch["masks"]]}
    loss, statistics = early(batch, 0)
    assert loss.item() == late(unmasked, 0)[0].item()
    assert statistics["patch_loss"] == statistics["masked"] == 0
    assert early(batch, 1)[1]["patch_loss"] > 0


def test_a_shared_head_has_one_set_of_prototypes(batch: dict[str, list[Tensor]]) -> None:
    shared, apart = (make_method(**{"ibot.shared_head": shared}) for shared in (True, False))
    assert shared.student.head.last_layer is shared.student.head.last_layer2
    assert len(list(apart.student.parameters())) == len(list(shared.student.parameters())) + 2
    teacher = shared.teacher.head
    assert teacher.last_layer is teacher.last_layer2
    torch.testing.assert_close(
        shared.student.head.last_layer.weight_v.shape, apart.student.head.last_layer2.weight_v.shape
    )


def test_without_local_crops(batch: dict[str, list[Tensor]]) -> None:
    method = make_method(num_local_crops=0)
    loss, _ = method(batch | {"crops": batch["crops"][:2]}, 0)
    loss.backward()
    assert method.student.backbone.embeddings.mask_token.grad.abs().max() > 0
