"""compat.ibot: the head's variants, attach, the guards against silent mistakes, checkpoints."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

from dino_models import models as dino_models
from ibot_models import BATCH, HEADS, K2, K, Model, P, ibot_loss, models, views
from ibot_original import OriginaliBOTHead
from vmf_heads.compat.ibot import iBOTHead, iBOTLoss

COPIES = pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
UNATTACHED = pytest.mark.filterwarnings(
    "ignore:this head looks like a teacher"
)  # so it is, and no loss is attached to it
SMALL = {"patch_out_dim": K2, "hidden_dim": 12, "bottleneck_dim": P}


def step(loss, student, teacher, batch, epoch: int = 0):
    tokens, local_tokens, masks = batch
    return loss(student(tokens), teacher(tokens), student(local_tokens)[0], masks, epoch)["loss"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("nlayers", [1, 3])
def test_state_dict_is_that_of_ibots_head(nlayers, shared):
    """Names, order and shapes; the same state gives the same logits."""
    head = iBOTHead(16, K, shared_head=shared, nlayers=nlayers, norm_last_layer=True, **SMALL)
    original = OriginaliBOTHead(16, K, K2, shared_head=shared, nlayers=nlayers, hidden_dim=12, bottleneck_dim=P)
    assert [n for n, _ in head.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert [p.requires_grad for p in head.parameters()] == [p.requires_grad for p in original.parameters()]
    head.load_state_dict(original.state_dict(), strict=True)
    assert list(head.state_dict()) == list(original.state_dict())
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(head(x), original(x))
    torch.testing.assert_close(head(x[:, 0]), original(x)[0])


@pytest.mark.parametrize(("norm", "kind"), [("bn", nn.BatchNorm1d), ("syncbn", nn.SyncBatchNorm), ("ln", nn.LayerNorm)])
def test_norm_and_activation(norm, kind):
    """One normalisation serves every hidden layer, as in iBOT, over all tokens of all images."""
    head = iBOTHead(16, K, norm=norm, act="relu", **SMALL)
    kinds = [nn.Linear, kind, nn.ReLU, nn.Linear, kind, nn.ReLU, nn.Linear]
    assert len(head.mlp) == len(kinds)
    assert all(map(isinstance, head.mlp, kinds))
    assert head.mlp[1] is head.mlp[4]
    if norm == "syncbn":  # runs on GPUs only
        return
    x = torch.randn(3, 5, 16)
    cls, patches = head(x)
    flat = head.train()(x.flatten(0, 1))  # the [CLS] prototypes for all tokens
    torch.testing.assert_close(cls, flat.view(3, 5, K)[:, 0])
    assert patches.shape == (3, 4, K2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"last_norm": "bn"}, r"`last_norm` \(='bn'\) must be None"),
        ({"norm": "csyncbn"}, r"`norm` \(='csyncbn'\) must be one of 'bn', 'syncbn', 'ln'"),
        ({"act": "elu"}, r"`act` \(='elu'\) must be one of 'gelu', 'relu'"),
        ({"bottleneck_dim": 0}, r"`bottleneck_dim` \(=0\) must be an integer >= 2"),
        ({"patch_out_dim": 0}, r"`patch_out_dim` \(=0\) must be an integer >= 1"),
    ],
)
def test_constructor_of_the_head(options, message):
    with pytest.raises(ValueError, match=message):
        iBOTHead(16, K, **{**SMALL, **options})


@pytest.mark.parametrize("shape", [(16,), (2, 3, 15), (2, 0, 16), (2, 2, 2, 16)])
def test_input_of_the_head(shape):
    with pytest.raises(ValueError, match=r"`x` \(of shape .*\) must "):
        iBOTHead(16, K, **SMALL)(torch.zeros(shape))


def test_outputs():
    head = iBOTHead(16, K, **SMALL)
    x = torch.randn(3, 5, 16)
    for output in ("features", "prototypes", "scores"):
        head.output = output
        cls, patches = head(x)
        if output == "prototypes":
            torch.testing.assert_close(patches.features @ patches.prototypes.T, scores_of(head, x)[1])
        elif output == "features":
            torch.testing.assert_close(torch.cat([cls[:, None], patches], dim=1).norm(dim=-1), torch.ones(3, 5))


def scores_of(head, x):
    other = copy.deepcopy(head)
    other.output = "scores"
    return other(x)


@UNATTACHED
@COPIES
def test_copies_of_heads_keep_what_is_shared(copy_of):
    student, teacher = models()
    ibot_loss().attach(student, teacher)
    teacher(views()[0])
    head = copy_of(teacher.head)
    assert head.last_layer2 is head.last_layer
    assert head.last_layer is not teacher.head.last_layer
    assert not head.is_attached
    x = torch.randn(3, 4, 16)
    teacher.head.release()
    torch.testing.assert_close(head(x), teacher.head(x), rtol=0, atol=0)


@COPIES
def test_copies_of_losses_have_the_centres_and_are_not_attached(copy_of):
    student, teacher = models()
    loss = ibot_loss()
    loss.attach(student, teacher)
    batch = views()
    step(loss, student, teacher, batch)
    other = copy_of(loss)
    torch.testing.assert_close(other.state_dict(), loss.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        step(other, student, teacher, batch)
    assert not any(isinstance(m, iBOTHead) for m in loss.modules())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (nn.Linear(2, 2), models()[1], r"`student` \(a Linear\) must contain exactly one prototype head.*none"),
        (dino_models()[0], models()[1], r"`student` .* must have prototypes called 'last_layer2'"),
        (models()[0], models(normalizer="none")[1], r"`normalizer` of the teacher's head \(='none'\) must be .*'vmf'"),
        (models("none shared")[0], models()[1], r"`last_layer2.num_prototypes` of the student's head \(=20\).*24"),
    ],
)
def test_attach_refuses(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        ibot_loss().attach(student, teacher)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: torch.compile(model, backend="eager", fullgraph=True)])
def test_attach_finds_the_heads_inside(wrap):
    student, teacher = models()
    loss = ibot_loss(center_momentum=1, center_momentum2=1)
    loss.attach(student, teacher)
    batch = views()
    want = step(loss, student, teacher, batch)
    loss.attach(wrap(student), wrap(teacher))  # the same heads: does nothing more
    torch.testing.assert_close(step(loss, wrap(student), wrap(teacher), batch), want)


def test_a_head_cannot_be_student_and_teacher():
    student, _ = models()
    with pytest.raises(ValueError, match="must have a head each: theirs is the same object"):
        ibot_loss().attach(student, student)


@pytest.mark.parametrize("fused", [False, True])
def test_losses_that_share_a_head_must_agree(fused):
    student, teacher = models()
    ibot_loss(fused=fused).attach(student, teacher)
    with pytest.raises(RuntimeError, match=r"`student_temp` \(=0.2\) must be 0.1, which another loss"):
        ibot_loss(fused=fused, student_temp=0.2).attach(student, teacher)
    with pytest.raises(RuntimeError, match=r"already serves a loss as '(logits|features)' and cannot serve another"):
        ibot_loss(fused=not fused).attach(student, teacher)


def test_frozen_norms_of_the_student_warn():
    with pytest.warns(UserWarning, match=r"the student's prototype norms are frozen \(norm_last_layer=True\)"):
        ibot_loss().attach(*models(norm_last_layer=True))
    teacher = Model(iBOTHead(16, K, shared_head=True, norm_last_layer=True, hidden_dim=12, bottleneck_dim=P))
    ibot_loss().attach(models()[0], teacher)  # as iBOT builds every teacher: no warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_cls": lambda x: x[1:]}, r"`teacher_output\[0\]` \(of shape \(9, 24\)\) must be .*`ngcrops` \(=2\)"),
        (
            {"student_cls": lambda x: x[1:]},
            r"`student_output\[0\]` and `student_local_cls` \(together of shape \(19, 24\)",
        ),
        ({"student_patch": lambda x: x[..., 1:]}, r"`student_output\[1\]` \(of shape \(10, 6, 23\)\) must be \(10, N"),
        ({"teacher_patch": lambda x: x[1:]}, r"`teacher_output\[1\]` \(of shape \(9, 6, 24\)\) must be \(10, N"),
        ({"masks": lambda x: x[:1]}, r"`student_mask` \(of shapes \[\(5, 2, 3\)\]\) must hold a mask .* H \* W=6"),
        ({"masks": lambda x: x[::-1]}, r"`student_mask` \(of shapes \[\(5, 1, 2\), .* H \* W=6"),
        ({"epoch": lambda x: 3}, r"`epoch` \(=3\) must be in \[0, `nepochs` \(=3\)\)"),
    ],
)
def test_bad_inputs_change_nothing(change, message):
    student, teacher = models()
    loss = ibot_loss()
    loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    names = ("student_cls", "student_patch", "teacher_cls", "teacher_patch", "masks", "epoch")
    values = dict(zip(names, (*student(tokens), *teacher(tokens), masks, 0), strict=True))
    for name, function in change.items():
        values[name] = function(values[name])
    student_output, teacher_output = ((values[f"{who}_cls"], values[f"{who}_patch"]) for who in ("student", "teacher"))
    with pytest.raises(ValueError, match=message):
        loss(student_output, teacher_output, student(local_tokens)[0], values["masks"], values["epoch"])
    assert not loss.centering.log_center.any()
    assert not loss.centering2.log_center.any()


@UNATTACHED
def test_the_order_of_calls_is_checked():
    student, teacher = models()
    loss = ibot_loss()
    tokens = views()[0]
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        loss.targets(teacher(tokens), 0)
    loss.attach(student, teacher)
    output = teacher(tokens)
    student.head.temperature = 0.3
    with pytest.raises(RuntimeError, match=r"`temperature` of the student's head \(=0.3\) must stay"):
        loss.targets(output, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngcrops": 1}, r"`ngcrops` \+ `nlcrops` \(=1\) must be >= 2"),
        ({"teacher_temp2": 0}, r"`teacher_temp2` \(=0\) must be a finite number > 0"),
        ({"warmup_teacher_temp2": -1}, r"`warmup_teacher_temp2` \(=-1\) must be a finite number > 0"),
        ({"center_momentum2": 2}, r"`center_momentum2` \(=2\) must be in \[0, 1\]"),
        ({"mim_start_epoch": 3}, r"`warmup_teacher_temp_epochs` \(=1\) must be in \[0, .*`mim_start_epoch` \(=3\)\]"),
        ({"patch_out_dim": 0}, r"`patch_out_dim` \(=0\) must be an integer >= 1"),
        ({"centering": "sinkhorn"}, r"`centering` \(='sinkhorn'\) must be one of 'probability', 'logit'"),
    ],
)
def test_constructor_of_the_loss(options, message):
    arguments = {"out_dim": K, "patch_out_dim": K, "ngcrops": 2, "nlcrops": 0, "warmup_teacher_temp": 0.04}
    arguments |= {"teacher_temp": 0.05, "warmup_teacher_temp2": 0.04, "teacher_temp2": 0.07}
    with pytest.raises(ValueError, match=message):
        iBOTLoss(**{**arguments, "warmup_teacher_temp_epochs": 1, "nepochs": 3, **options})


@pytest.mark.parametrize(
    ("centering", "shapes"),
    [("probability", {"log_center": (K,), "log_center2": (K,)}), ("logit", {"center": (1, K), "center2": (1, 1, K)})],
)
def test_state_dict_holds_the_centres_only(centering, shapes):
    student, teacher = models()
    loss, resumed = ibot_loss(centering=centering), ibot_loss(centering=centering)
    loss.attach(student, teacher)
    step(loss, student, teacher, views())
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == shapes
    resumed.load_state_dict(loss.state_dict(), strict=True)
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_ibots_own_centres_are_converted_each_at_its_temperature():
    """A checkpoint of the original loss, with every prototype's norm 1: the targets are iBOT's."""
    centers = {"center": torch.randn(1, K) / 10, "center2": torch.randn(1, 1, K) / 10}
    student, teacher = models(norms=False)
    loss = ibot_loss()
    loss.load_state_dict(centers, strict=True)
    loss.attach(student, teacher)
    cls, patch = teacher(views()[0])
    targets = loss.targets((cls, patch), epoch=2)
    want = ((cls - centers["center"]) / 0.05).softmax(dim=-1), ((patch - centers["center2"]) / 0.07).softmax(dim=-1)
    torch.testing.assert_close(targets, want)
    with pytest.warns(UserWarning, match="divided by the teacher temperature") as warned:
        loss.update_center(cls, patch, epoch=2)
    assert [re.search(r"temperature (\S+);", str(w.message))[1] for w in warned] == ["0.05", "0.07"]
    assert set(loss.state_dict()) == {"log_center", "log_center2"}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_one_centre_update_from_accumulated_micro_batches(centering, fused):
    student, teacher = models()
    whole, parts = (ibot_loss(centering=centering, fused=fused) for _ in range(2))
    for loss in (whole, parts):
        loss.attach(student, teacher)
    tokens, local_tokens, masks = views()
    step(whole, student, teacher, (tokens, local_tokens, masks))
    before = {name: value.clone() for name, value in parts.state_dict().items()}
    for images, commit in ((slice(0, 2), False), (slice(2, 5), True)):
        torch.testing.assert_close(dict(parts.state_dict()), before, rtol=0, atol=0)
        part, local = (x.unflatten(0, (2, BATCH))[:, images].flatten(0, 1) for x in (tokens, local_tokens))
        arguments = (student(part), teacher(part), student(local)[0], [mask[images] for mask in masks], 0)
        parts(*arguments, commit=commit)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_autocast_keeps_logits_and_losses_in_float32(heads):
    student, teacher = models(heads)
    loss = ibot_loss(heads, center_momentum=1, center_momentum2=1)
    loss.attach(student, teacher)
    batch = views()
    exact = step(loss, student, teacher, batch).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert student(batch[0])[1].dtype is torch.float32
        value = step(loss, student, teacher, batch)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.detach(), exact, rtol=0.1, atol=0)
