"""Copies, checkpoints, exports and fresh starts of heads and losses keep all that they are."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize

from dino_models import K, crops, dino_loss, models
from gloo import run_on_ranks
from vmf_heads import HeadOutput, ProbabilityCentering, VMFPrototypeHead, prototype_cross_entropy
from vmf_heads.compat import dinov2, dinov3, ibot, lightly

SIZES = {"hidden_dim": 8, "bottleneck_dim": 4}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "VMFPrototypeHead": lambda: VMFPrototypeHead(6, 20, use_bn=True, **SIZES),
    "frozen norms, no MLP": lambda: VMFPrototypeHead(6, 20, norm_last_layer=True, nlayers=1, **SIZES),
    "dinov2": lambda: dinov2.DINOHead(6, 20, **SIZES),
    "dinov3": lambda: dinov3.DINOHead(6, 20, **SIZES),
    "ibot": lambda: ibot.iBOTHead(6, 20, patch_out_dim=9, norm="ln", **SIZES),
    "ibot, shared": lambda: ibot.iBOTHead(6, 20, shared_head=True, **SIZES),
    "lightly": lambda: lightly.DINOProjectionHead(6, 8, 4, 20, batch_norm=True),
}
IBOT = (K, 7, 2, 0, 0.04, 0.07, 0.04, 0.07, 3, 10)
LOSSES: dict[str, Callable[..., nn.Module]] = {
    "dino": dino_loss,
    "ibot": lambda **options: ibot.iBOTLoss(*IBOT, **options),
    "dinov2": lambda **options: dinov2.DINOLoss(K, **options),
    "lightly": lambda **options: lightly.DINOLoss(K, **options),
    "lightly, patches": lambda **options: lightly.IBOTPatchLoss(K, **options),
}
CENTERING = pytest.mark.parametrize("centering", ["probability", "logit"])


def by_every_module(module: nn.Module) -> None:
    """What training loops and FSDP do after `to_empty`."""
    for each in module.modules():
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()


@pytest.mark.parametrize("reset", [lambda head: head.reset_parameters(), by_every_module], ids=["head", "every module"])
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_head_of_the_meta_device_starts_like_any_other(make: Any, reset: Callable[[nn.Module], None]) -> None:
    """Every parameter and buffer has the spread and the bounds of the constructor's."""
    with torch.device("meta"):
        head = make()
    head.to_empty(device="cpu")
    for tensor in head.state_dict().values():
        tensor.fill_(77)  # as bad as memory can be
    reset(head)
    expected = make().state_dict()
    for name, tensor in head.state_dict().items():
        if expected[name].is_floating_point() and expected[name].std() > 0:
            assert tensor.abs().max() < 2.5 * expected[name].abs().max(), name
            assert 0.5 < tensor.std() / expected[name].std() < 2, name
        else:
            torch.testing.assert_close(tensor, expected[name], msg=name)
    assert [p.requires_grad for p in head.parameters()] == [p.requires_grad for p in make().parameters()]


@pytest.mark.parametrize("reset", [lambda loss: loss.reset_parameters(), by_every_module], ids=["loss", "every module"])
@CENTERING
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_the_meta_device_starts_like_any_other(
    make: Any, centering: str, reset: Callable[[nn.Module], None]
) -> None:
    with torch.device("meta"):
        loss = make(centering=centering)
    loss.to_empty(device="cpu")
    for tensor in loss.buffers():
        tensor.fill_(77)
    loss.centering._rows = 3
    reset(loss)
    torch.testing.assert_close(dict(loss.state_dict()), dict(make(centering=centering).state_dict()))
    assert loss.centering._rows == 0
    if isinstance(loss, lightly.DINOLoss):
        assert loss._temperature(None, 0) == pytest.approx(0.04)


class Trainer(nn.Module):
    """A model that holds a loss, as training frameworks do."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.loss = loss


@CENTERING
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_distributed_checkpoints_of_a_model_with_a_loss(make: Any, centering: str) -> None:
    saved, loaded = (Trainer(make(centering=centering)) for _ in range(2))
    for buffer in saved.loss.buffers():
        buffer.normal_()
    state = get_model_state_dict(saved)
    assert set(state) == set(saved.state_dict())
    set_model_state_dict(loaded, dict(state))
    torch.testing.assert_close(dict(loaded.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)


def test_a_pending_dino_centre_is_checkpointed_too() -> None:
    saved, loaded = Trainer(dino_loss()), Trainer(dino_loss())
    saved.loss.load_state_dict({"center": torch.randn(1, K)})
    assert saved.loss.logit_center is not None
    set_model_state_dict(loaded, get_model_state_dict(saved))
    torch.testing.assert_close(loaded.loss.logit_center, saved.loss.logit_center, rtol=0, atol=0)


def from_rank_0(rank: int) -> dict[str, Any]:
    """A loss whose centres only rank 0 has read, and an FSDP2 head of the meta device that is initialised in place."""
    torch.manual_seed(rank)
    trainer = Trainer(ibot.iBOTLoss(*IBOT))
    state = dict(trainer.state_dict()) if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    message = ""
    try:
        set_model_state_dict(trainer, state, options=options)
    except RuntimeError as error:
        message = str(error)
    with torch.device("meta"):
        head = VMFPrototypeHead(6, 21, **SIZES)
    fully_shard(head, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    head.to_empty(device="cpu")
    head.reset_parameters()
    weights = {name: p.full_tensor().detach() for name, p in head.named_parameters()}
    return {"message": message, "weights": weights}


def test_two_ranks() -> None:
    """torch broadcasts a state by the names of buffers, which the state of a loss does not have: it says so."""
    first, second = run_on_ranks(from_rank_0)
    assert first["message"] == ""
    assert 'Missing key(s) in state_dict: "loss.log_center", "loss.log_center2"' in second["message"]
    weights = second["weights"]
    assert weights["last_layer.weight_g"].eq(1).all()
    assert weights["mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.3)
    assert weights["last_layer.weight_v"].abs().max() <= 0.5  # 1 / sqrt(p)
    assert weights["last_layer.weight_v"].std() > 0.2


@CENTERING
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_copy_of_a_loss_shares_its_process_group(make: Any, centering: str) -> None:
    group = dist.ProcessGroup(dist.HashStore(), 0, 1)
    loss = make(centering=centering, process_group=group)
    for buffer in loss.buffers():
        buffer.normal_()
    copied = copy.deepcopy(loss)
    assert copied.centering.process_group is group
    torch.testing.assert_close(dict(copied.state_dict()), dict(loss.state_dict()), rtol=0, atol=0)
    for buffer in copied.buffers():
        buffer.zero_()
    assert all(buffer.abs().sum() > 0 for buffer in loss.buffers())
    both = copy.deepcopy([loss, loss.centering])  # what is one object stays one
    assert both[0].centering is both[1]


def output(rows: int = 5) -> HeadOutput:
    return HeadOutput(normalize(torch.randn(rows, 4), dim=1), torch.randn(9, 4), torch.rand(9))


def written_and_read(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_an_exported_head_that_returns_a_head_output_is_saved_and_loaded() -> None:
    head, x = VMFPrototypeHead(6, 20, output="prototypes", **SIZES), torch.randn(3, 6)
    got = written_and_read(torch.export.export(head, (x,)))(x)
    assert type(got) is HeadOutput
    torch.testing.assert_close(got, head(x))


class Loss(nn.Module):
    """In chunks of so many rows, or at once."""

    def __init__(self, rows: int | None) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"student_temperature": 0.1, "teacher_temperature": 0.05}
        self.options["batch_chunk_size"] = rows

    def forward(self, student: HeadOutput, teacher: HeadOutput) -> Tensor:
        return prototype_cross_entropy(student, teacher, **self.options)[0]


@pytest.mark.xfail(
    torch.__version__.startswith("2.8."), reason="torch 2.8 writes no infinite numbers", raises=ValueError
)
@pytest.mark.parametrize("rows", [None, 2])
def test_an_exported_function_of_head_outputs_is_saved_and_loaded(
    rows: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    loss = Loss(rows)
    program = torch.export.export(loss, (output(), output()))
    assert "torch.ops.vmf_heads" not in program.graph_module.print_readable(print_output=False)
    loaded = written_and_read(program)
    assert "weights_only" not in capfd.readouterr().err  # its example inputs are read without executing anything
    arguments = output(), output()
    torch.testing.assert_close(loaded(*arguments), loss(*arguments))


def test_a_head_output_is_loaded_with_weights_only() -> None:
    file = io.BytesIO()
    saved = output()._replace(scales=None)
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is HeadOutput
    torch.testing.assert_close(loaded[:2], saved[:2], rtol=0, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_inference_mode_before_training(fused: bool) -> None:
    """A loss that was evaluated under inference mode trains on as if it had been under no_grad."""
    losses = []
    for context in (torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        (student, teacher), loss = models(), dino_loss(fused=fused)
        loss.attach(student, teacher)
        for step in range(3):
            x = crops()
            if step == 2:
                loss.load_state_dict(loss.state_dict())
            with context() if step < 2 else torch.enable_grad():
                value = loss(student(x), teacher(x[:10]), 0, commit=step != 1)  # the last adds to what that one left
        value.backward()
        losses.append((value.detach(), loss.log_center, student.head.last_layer.weight_g.grad))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_a_centre_of_inference_mode() -> None:
    centering = ProbabilityCentering(3, center_on="scores")
    with torch.inference_mode():
        centering.accumulate_(torch.eye(3), 0.1)
        targets = centering(torch.eye(3))
    centering.commit_()
    assert targets.is_inference()
    assert not centering.log_center.is_inference()
    assert centering.log_center[0] == pytest.approx(-0.1 * 1.0986, rel=1e-3)
