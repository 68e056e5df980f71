"""compat.dino: attach, the guards against silent mistakes, and checkpoints of the loss."""

import copy
import pickle

import pytest
import torch
from torch import nn

import vmf_reference
from dino_models import BATCH, NCROPS, K, Model, P, crops, dino_loss, models
from vmf_heads import set_temperature
from vmf_heads.compat.dino import DINOHead, DINOLoss

WRAPPERS = {
    "bare": lambda model: model,
    "wrapped": nn.Sequential,  # as DistributedDataParallel does, one level down; DDP itself: test_compat_dino.py
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_attach_takes_over_the_heads_inside(wrap):
    student, teacher = models(temperature=0.7)
    wrapped = wrap(student), wrap(teacher)
    loss = dino_loss(student_temp=0.2)
    loss.attach(*wrapped)
    loss.attach(*wrapped)  # does nothing more
    assert student.head.temperature == 0.2
    x = crops()
    value = loss(wrapped[0](x), wrapped[1](x[: 2 * BATCH]), 0)
    assert value.isfinite()


def test_the_norms_are_those_of_the_teachers_head_at_the_call():
    """The loss keeps nothing from a forward: scores from anywhere have targets, with log C_p of the norms of now."""
    student, teacher = models()
    loss = dino_loss()
    loss.attach(student, teacher)
    scores, layer = torch.randn(2 * BATCH, K), teacher.head.last_layer
    for factor in (1, 2):
        layer.weight_g.data.mul_(factor)
        log_c = vmf_reference.log_normalizer(layer.norms.double() / 0.04, P)
        want = (scores.double() / 0.04 + log_c).softmax(dim=1)
        torch.testing.assert_close(loss.targets(scores, 0).double(), want, rtol=1e-4, atol=1e-6)


def test_targets_leave_the_centre_and_carry_no_gradient():
    student, teacher = models()
    loss = dino_loss()
    loss.attach(student, teacher)
    targets = loss.targets(teacher.requires_grad_()(crops()[: 2 * BATCH]), 0)
    assert not targets.requires_grad
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2 * BATCH))
    assert loss.centering.log_center.eq(0).all()


def test_the_last_warmup_epoch_has_the_final_temperature():
    """As in DINO, whose warm-up is a linspace that includes its end."""
    assert dino_loss().teacher_temp_schedule.tolist() == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert dino_loss(warmup_teacher_temp_epochs=0).teacher_temp_schedule.tolist() == [0.07] * 5


def two_headed() -> nn.Module:
    return nn.ModuleDict({"cls": models()[0].head, "patch": models()[0].head})


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (nn.Linear(2, 2), models()[1], r"`student` \(a Linear\) must contain exactly one prototype head.*none"),
        (models()[0], nn.Linear(2, 2), r"`teacher` \(a Linear\) must contain exactly one prototype head.*none"),
        (two_headed(), models()[1], r"`student` \(a ModuleDict\) must .* 2: pass `head=`, one of 'cls', 'patch'"),
        (models()[0], models(normalizer="none")[1], r"`normalizer` of the teacher's head \(='none'\) must be .*'vmf'"),
    ],
)
def test_attach_refuses(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        dino_loss().attach(student, teacher)


def test_attach_looks_in_the_outermost_submodule_of_that_name():
    """A backbone may have a `head` of its own, the classifier."""
    pair = models()
    for model in pair:
        model.backbone = nn.ModuleDict({"head": nn.Identity()})
    loss = dino_loss()
    loss.attach(*pair, head="head")
    assert loss.teacher.heads == (pair[0].head, pair[1].head)


def test_a_head_cannot_be_student_and_teacher():
    student, _ = models()
    with pytest.raises(ValueError, match="must have a head each: theirs is the same object"):
        dino_loss().attach(student, student)


def test_attach_fails_before_it_changes_anything():
    student, teacher = models()
    teacher.head.attach_output("features")
    with pytest.raises(RuntimeError, match="already serves a loss as 'features' and cannot serve another as 'scores'"):
        dino_loss().attach(student, teacher)
    assert not student.head.is_attached
    assert student.head.output == "logits"


def test_the_loss_keeps_its_temperature():
    student, teacher = models()
    loss = dino_loss()
    loss.attach(student, teacher)
    set_temperature(student, 0.04)
    x = crops()
    with pytest.raises(RuntimeError, match=r"`temperature` of the student's head \(=0.04\) must stay"):
        loss(student(x), teacher(x[: 2 * BATCH]), 0)


def test_a_compiled_head_copies_its_own_weights():
    student, _ = models()
    head = student.head
    head.compile(backend="eager")
    copied = copy.deepcopy(head)
    with torch.no_grad():
        copied.last_layer.weight_g.mul_(3)
    x = torch.randn(2, 16)
    torch.testing.assert_close(copied(x), copied.forward(x))
    assert not torch.equal(copied(x), head(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(head))(x), head(x))


def test_frozen_norms_of_the_student_warn():
    student, teacher = models(norm_last_layer=True)
    with pytest.warns(UserWarning, match=r"the student's prototype norms are frozen \(norm_last_layer=True\)"):
        dino_loss().attach(student, teacher)
    teacher_only = Model(DINOHead(16, K, norm_last_layer=True, hidden_dim=12, bottleneck_dim=8))
    dino_loss().attach(models()[0], teacher_only)  # as DINO builds every teacher: no warning
    dino_loss().attach(*models(normalizer="none", norm_last_layer=True))  # L2-normalised DINO: no warning


STUDENT, TEACHER = torch.zeros(NCROPS * BATCH, K), torch.zeros(2 * BATCH, K)
CROPS = r"must have `ncrops` \(=4\) rows per image and `teacher_output` \(of {} rows\) 2"


@pytest.mark.parametrize(
    ("student", "teacher", "epoch", "message"),
    [
        (STUDENT, torch.zeros(2 * BATCH, K + 1), 0, r"`teacher_output` \(of shape \(10, 25\)\) must be \(N, 24\)"),
        (STUDENT, TEACHER[1:], 0, r"`student_output` \(of 20 rows\) " + CROPS.format(9)),
        (STUDENT[1:], TEACHER, 0, r"`student_output` \(of 19 rows\) " + CROPS.format(10)),
        (STUDENT, TEACHER, 5, r"`epoch` \(=5\) must be in \[0, `nepochs` \(=5\)\)"),
        (STUDENT, TEACHER, -1, r"`epoch` \(=-1\) must be in \[0, `nepochs`"),
    ],
)
def test_bad_inputs_change_nothing(student, teacher, epoch, message):
    models_ = models()
    loss = dino_loss()
    loss.attach(*models_)
    models_[1](crops()[: 2 * BATCH])
    with pytest.raises(ValueError, match=message):
        loss(student, teacher, epoch)
    assert loss.centering.log_center.eq(0).all()


def test_the_loss_must_be_attached():
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        dino_loss()(STUDENT, TEACHER, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ncrops": 1}, r"`ncrops` \(=1\) must be an integer >= 2"),
        ({"out_dim": 0, "centering": "logit"}, r"`out_dim` \(=0\) must be an integer >= 1"),
        ({"student_temp": 0}, r"`student_temp` \(=0\) must be a finite number > 0"),
        ({"teacher_temp": -1}, r"`teacher_temp` \(=-1\) must be a finite number > 0"),
        ({"warmup_teacher_temp": 0}, r"`warmup_teacher_temp` \(=0\) must be a finite number > 0"),
        ({"warmup_teacher_temp_epochs": 6}, r"`warmup_teacher_temp_epochs` \(=6\) must be in \[0, `nepochs` \(=5\)\]"),
        ({"nepochs": 0}, r"`nepochs` \(=0\) must be an integer >= 1"),
        ({"centering": "sinkhorn"}, r"`centering` \(='sinkhorn'\) must be one of 'probability', 'logit'"),
        ({"center_momentum": 1.1}, r"`center_momentum` \(=1.1\) must be in \[0, 1\]"),
        ({"center_momentum": 1.1, "centering": "logit"}, r"`center_momentum` \(=1.1\) must be in \[0, 1\]"),
    ],
)
def test_constructor(options, message):
    arguments = {"out_dim": K, "ncrops": NCROPS, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07}
    with pytest.raises(ValueError, match=message):
        DINOLoss(**{**arguments, "warmup_teacher_temp_epochs": 3, "nepochs": 5, **options})


@pytest.mark.parametrize(("centering", "name"), [("probability", "log_center"), ("logit", "center")])
def test_state_dict_holds_the_centre_only(centering, name):
    student, teacher = models()
    loss, resumed = dino_loss(centering=centering), dino_loss(centering=centering)
    loss.attach(student, teacher)
    x = crops()
    loss(student(x), teacher(x[: 2 * BATCH]), 0)
    assert set(loss.state_dict()) == {name}
    assert loss.state_dict()[name].shape == ((1, K) if name == "center" else (K,))
    resumed.load_state_dict(loss.state_dict(), strict=True)
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)
    outer, outer_resumed = (nn.ModuleDict({"loss": each}) for each in (loss, dino_loss(centering=centering)))
    assert set(outer.state_dict()) == {f"loss.{name}"}
    outer_resumed.load_state_dict(outer.state_dict(), strict=True)
    torch.testing.assert_close(outer_resumed.state_dict(), outer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_dinos_own_centre_serves_at_every_temperature_until_the_first_update(fused):
    """A checkpoint of the original loss, with every prototype's norm 1: the targets are DINO's, and to ask for them
    changes nothing. The update converts the centre at the teacher's temperature of that moment, and warns."""
    center = torch.randn(1, K) / 10
    student, teacher = models(norms=False)
    loss = dino_loss()
    loss.load_state_dict({"center": center}, strict=True)
    assert set(loss.state_dict()) == {"log_center", "logit_center"}
    resumed = dino_loss(fused=fused)
    resumed.load_state_dict(loss.state_dict(), strict=True)
    x = crops()
    scores = teacher(x[: 2 * BATCH])
    scores = scores - 0.1 * teacher.head.log_normalizer(0.1)  # not attached yet, it returns logits
    resumed.attach(student, teacher)
    output = teacher(x[: 2 * BATCH])
    for epoch, temperature in [(1, 0.055), (0, 0.04)]:
        torch.testing.assert_close(resumed.targets(output, epoch), ((scores - center) / temperature).softmax(dim=1))
    torch.testing.assert_close(resumed.state_dict(), loss.state_dict(), rtol=0, atol=0)
    with pytest.warns(
        UserWarning, match=r"a DINO logit `center` was loaded .* divided by the teacher temperature 0.055"
    ):
        resumed(student(x), output, 1)
    mean = (scores / 0.055).softmax(dim=1).mean(dim=0).log()
    want = 0.9 * center[0] / 0.055 + 0.1 * mean
    torch.testing.assert_close(resumed.state_dict(), {"log_center": want})


def test_a_vmf_centre_does_not_load_into_logit_centring():
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"center".*Unexpected key.*"log_center"'):
        dino_loss(centering="logit").load_state_dict({"log_center": torch.zeros(K)})
