"""`TeacherTargets`: Eq. 7 and 9 in float64, centres of every original, and what it notices about a wrong use."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import vmf_reference
from dino_models import BATCH, K, P, models
from gloo import run_on_ranks
from vmf_heads import HeadOutput, TeacherTargets, VMFPrototypeHead
from vmf_heads._first_outputs import CALLS, FirstOutputs

X = torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(0))
DIFFERENT = "did not come from the teacher's head that this loss is attached to"


def attached(pair: tuple[nn.Module, nn.Module], **options) -> TeacherTargets:
    side = TeacherTargets(K, **options)
    side.attach(*pair)
    return side


def log_c(norms: Tensor, temperature: float) -> Tensor:
    return vmf_reference.log_normalizer(norms.double() / temperature, P)


@pytest.mark.parametrize("start", ["zeros", "first_batch"])
@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_targets_and_centre_are_those_of_the_equations(centering, start):
    student, teacher = models()
    side = attached((student, teacher), centering=centering, center_start=start, center_momentum=0.8)
    norms, center = teacher.head.last_layer.norms, torch.zeros(K, dtype=torch.float64)
    for call, temperature in enumerate((0.04, 0.07, 0.05)):
        scores = teacher(torch.randn(BATCH, 10))
        offset = center if centering == "probability" else center / temperature
        want = vmf_reference.teacher(scores.double(), norms.double(), P, temperature, offset)
        torch.testing.assert_close(side.targets(scores, temperature).double(), want, rtol=1e-4, atol=1e-7)
        side.update_(scores, temperature)
        momentum = 0.0 if call == 0 and start == "first_batch" else 0.8
        if centering == "probability":
            inside = log_c(norms, temperature)
            center = vmf_reference.next_center(center, scores.double(), temperature, momentum, log_c=inside)
            got = side.state_dict()["log_center"]
        else:
            bias = temperature * (log_c(norms, temperature) - log_c(torch.ones(K), temperature))
            center = momentum * center + (1 - momentum) * (scores.double() + bias).mean(dim=0)
            got = side.state_dict()["center"][0]
        torch.testing.assert_close(got.double(), center, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("centering", ["probability", "logit"])
def test_fused_is_the_loss_without_its_logits(centering):
    """The pairs are any: here the student's row i learns from the teacher's rows i and i + 1, with weights."""
    rows = torch.stack([torch.arange(BATCH), torch.arange(BATCH).roll(-1)], dim=1)
    weights = torch.rand(BATCH, 2, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        student, teacher = (model.double() for model in models())
        side, x = attached((student, teacher), fused=fused, centering=centering).double(), X.double()
        for _ in range(2):  # the second time with a centre
            if fused:
                loss = side.cross_entropy(student(x), teacher(x), 0.04, teacher_rows=rows, weights=weights)
            else:
                scores = teacher(x)
                log_p = (student(x) / side.student_temp).log_softmax(dim=1)
                terms = -(side.targets(scores, 0.04)[rows] * log_p[:, None]).sum(dim=2)
                loss = (terms * weights).sum()
                side.accumulate_(scores, 0.04)
            side.commit_()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters()), *side.state_dict().values()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("centering", ["probability", "logit"])
@pytest.mark.parametrize("shape", [(1, K), (1, 1, K), (K,)], ids=["DINO", "lightly", "flat"])
def test_the_centre_of_an_original_loads_inside_a_loss_of_ones_own(shape, centering):
    """The targets are then the original's, if the norms are 1."""
    student, teacher = models(norms=False)
    loss = nn.ModuleDict({"cls": attached((student, teacher), centering=centering)})
    center = torch.randn(shape) / 10
    loss.load_state_dict({"cls.center": center}, strict=True)
    scores = teacher(X)
    want = ((scores - center.flatten()) / 0.05).softmax(dim=1)
    torch.testing.assert_close(loss["cls"].targets(scores, 0.05), want)
    again = nn.ModuleDict({"cls": TeacherTargets(K, centering=centering)})
    again.load_state_dict(loss.state_dict(), strict=True)
    torch.testing.assert_close(again.state_dict(), loss.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("key", ["center", "dino_loss.center", "center_grid"])
def test_a_centre_that_strict_false_drops_is_noticed(key):
    loss = nn.ModuleDict({"cls": TeacherTargets(K)})
    state = {key: torch.zeros(1, K)}
    with pytest.warns(UserWarning, match=rf"no centre called cls.log_center or cls.center, .* '{key}'"):
        loss.load_state_dict(state, strict=False)
    loss.load_state_dict({"backbone.weight": torch.zeros(2)}, strict=False)  # has no centre to drop: no warning
    loss.load_state_dict({**state, "cls.center": torch.zeros(1, K)}, strict=False)  # there is one: no warning


class TwoHeads(nn.Module):
    """As of EsViT: both heads run, on different features."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.head_dense = (VMFPrototypeHead(10, K, hidden_dim=12, bottleneck_dim=P) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head_dense(x.flip(0))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached_to", ["head", "head_dense"])
def test_the_output_of_another_head_raises(attached_to, fused):
    student, teacher = TwoHeads(), TwoHeads().requires_grad_(False)
    side = TeacherTargets(K, fused=fused)
    side.attach(student, teacher, head=attached_to)
    if fused:  # both heads return features
        (student.head_dense if attached_to == "head" else student.head).output = "features"
        (teacher.head_dense if attached_to == "head" else teacher.head).output = "features"
    of_student, of_teacher = student(X)[0], teacher(X)[0]

    def use() -> None:
        if fused:
            side.cross_entropy(of_student, of_teacher, 0.04)
        else:
            side.targets(of_teacher, 0.04)

    if attached_to == "head":
        use()
    else:
        with pytest.raises(RuntimeError, match=DIFFERENT):
            use()


def test_rows_may_be_stacked_selected_and_rounded_on_their_way():
    student, teacher = models()
    side = attached((student, teacher))
    rows = torch.stack([teacher(X), teacher(X + 1)])[:, [3, 1]].bfloat16()
    side.targets(rows[:0], 0.04)  # of no rows nothing is known yet
    side.targets(rows, 0.04)
    assert not teacher.head._forward_hooks
    side.targets(torch.randn(2, K), 0.04)  # compared once only


def test_more_calls_than_are_remembered_are_not_compared():
    student, teacher = models()
    side = attached((student, teacher))
    for _ in range(CALLS + 1):
        teacher(X)
    assert not teacher.head._forward_hooks
    side.targets(torch.randn(2, K), 0.04)


def test_compiled_heads_and_losses_are_not_compared():
    student, teacher = models()
    side = attached((student, teacher))
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    side.targets(compiled(X), 0.04)
    torch.testing.assert_close(compiled(X), teacher(X))
    side = attached((student, teacher))
    targets = torch.compile(side.targets, backend="eager")
    torch.testing.assert_close(targets(torch.ones(2, K), 0.04).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_teacher_instead_of_the_teacher_warns(copy_of):
    """Its norms are those of the copying; and the copy of an attached head is attached to nothing."""
    student, teacher = models()
    side = attached((student, teacher))
    copied = copy_of(teacher)
    assert not any(isinstance(hook, FirstOutputs) for hook in copied.head._forward_hooks.values())
    with pytest.warns(UserWarning, match="this head looks like a teacher's"):
        logits = copied(X)
    with pytest.warns(UserWarning, match="the teacher's head did not run between `attach` and the first call"):
        side.targets(logits, 0.04)
    side.targets(logits, 0.04)  # once


@pytest.mark.parametrize("student_ran", [False, True], ids=["before the student runs", "after both ran"])
def test_student_and_teacher_in_the_wrong_order(student_ran):
    """Where the teacher's parameters require no gradients `attach` sees it, otherwise the first call."""
    student, teacher = models()
    with pytest.raises(ValueError, match=r"must be in this order: `attach\(student, teacher\)`"):
        TeacherTargets(K).attach(teacher, student)
    side = attached((teacher.requires_grad_(True), student))
    with torch.no_grad():
        scores = teacher(X)
    if student_ran:
        student(X)
    with pytest.raises(RuntimeError, match=r"`attach\(student, teacher\)` with the student first"):
        side.targets(scores, 0.04)


def test_norms_frozen_after_attach_warn_once():
    student, teacher = models()
    side = attached((student, teacher))
    student.head.last_layer.requires_grad_(False)  # the whole last layer, as in the first epoch of DINO: no warning
    side.targets(teacher(X), 0.04)
    student.head.last_layer.weight_v.requires_grad_(True)
    with pytest.warns(UserWarning, match="prototype norms are frozen after `attach`"):
        side.targets(teacher(X), 0.04)
    side.targets(teacher(X), 0.04)


def test_errors_name_the_heads_there_are():
    pair = TwoHeads(), TwoHeads()
    with pytest.raises(ValueError, match=r"`student` .* contains 2: pass `head=`, one of 'head', 'head_dense'"):
        TeacherTargets(K).attach(*pair)
    with pytest.raises(ValueError, match=r"`head` \(='heads'\) must .* of `student` .*, one of 'head', 'head_dense'"):
        TeacherTargets(K).attach(*pair, head="heads")
    with pytest.raises(ValueError, match=r"`head` \(='head'\) .*\(a Linear\), and there is no prototype head in it"):
        TeacherTargets(K).attach(nn.Linear(2, 2), nn.Linear(2, 2), head="head")
    with pytest.raises(RuntimeError, match=r"call `attach\(student, teacher\)` once before the loss"):
        TeacherTargets(K).targets(torch.zeros(2, K), 0.04)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_prototypes": 0}, r"`num_prototypes` \(=0\) must be an integer >= 1"),
        ({"student_temp": 0}, r"`student_temp` \(=0\) must be a finite number > 0"),
        ({"center_start": "ones"}, r"`center_start` \(='ones'\) must be one of 'zeros', 'first_batch'"),
        ({"center_momentum": 2}, r"`center_momentum` \(=2\) must be in \[0, 1\]"),
    ],
)
def test_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherTargets(**{"num_prototypes": K} | options)


def shard_after_attach(rank: int) -> str:
    """The error of a fused loss that was attached before fully_shard, and that after it there is none."""
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    student, teacher = models()
    side = attached((student, teacher), fused=True)
    for model in (student, teacher):
        fully_shard(model)
    message = ""
    try:
        side.cross_entropy(student(X), teacher(X), 0.04)
    except RuntimeError as error:
        message = str(error)
    for model in (student, teacher):
        model.head.release()
    side.attach(student, teacher)
    output = student(X)
    assert isinstance(output, HeadOutput)
    assert side.cross_entropy(output, teacher(X), 0.04).isfinite()
    return message


def test_fully_shard_after_attach_raises():
    (message,) = run_on_ranks(shard_after_attach, 1)
    assert "call `attach(student, teacher)` after fully_shard" in message
