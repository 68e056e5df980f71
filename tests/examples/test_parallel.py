"""One process, two under DDP or FSDP2, with and without accumulation: the same losses, gradients and weights."""

import copy
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.recipe import Recipe, load_recipe
from data.images import load_images
from data.loading import load_steps, micro_batch_size
from gloo import run_on_ranks
from methods.registry import Method, build_method
from pretrain import train_step
from training.ema import local
from training.log import mean_statistics
from training.optimization import parameter_groups
from training.parallel import parallelize, unwrap
from training.schedules import Schedules
from training.state import restore_state, whole_state
from training.warm_start import fit_head
from vmf_heads.head import find_head
from vmf_heads.mixture import VMFMixture

TINY: dict[str, Any] = {
    "dataset": "digits",
    "batch_size": 8,
    "epochs": 3,
    "warmup_epochs": 0,
    "teacher_temp_warmup_epochs": 1,
    "freeze_last_layer_epochs": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_dim": 16,
    "bottleneck_dim": 8,
    "out_dim": 31,  # which two processes cannot halve
    "image_size": 16,
    "local_size": 8,
    "num_local_crops": 1,
    "clip_grad": 0.05,
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dino": ("photos_dino_vmf", {}),
    "dino, unfused": ("photos_dino_vmf", {"fused_loss": False, "clip_grad_over": "network"}),
    "dino, logit": ("photos_dino_vmf", {"centering": "logit"}),
    "ibot": ("photos_ibot_vmf", {"ibot.patch_out_dim": 31}),
    "msn": ("photos_msn_vmf", {}),
    "ibot, KoLeo": ("photos_ibot_vmf", {"ibot.patch_out_dim": 31, "prototype_koleo_weight": 0.1}),
    "dino, online EM": (
        "photos_dino_vmf",
        {"online_em": {"mlp": "keep", "rows_per_prototype": 4, "max_kappa": 200, "median_kappa": 10}},
    ),
}
DISTINCT = {"ibot, KoLeo": "fsdp2", "dino, online EM": "ddp"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"strategy": "fsdp2"},
    "ddp, prototypes": {"prototype_parallel": 2},
    "fsdp2, prototypes": {"strategy": "fsdp2", "prototype_parallel": 2},
}
CASES = [
    (name, strategy, accumulate)
    for name, strategy, accumulate in product([name for name in RECIPES if name not in DISTINCT], STRATEGIES, (1, 2))
    if (name, accumulate) != ("msn", 2)  # me-max is of a whole batch, by design
    and not ("prototypes" in strategy and name in ("msn", "dino, unfused"))  # they need all logits of a row
    and (strategy, accumulate) != ("ddp, prototypes", 2)  # which the other strategy tests
]
CASES += [(name, strategy, 2) for name, strategy in DISTINCT.items()]
SWITCHES = [("ddp", "fsdp2, prototypes"), ("fsdp2", "ddp, prototypes"), ("fsdp2, prototypes", "ddp")]
SWITCHES += [("ddp, prototypes", "fsdp2")]


def tiny_recipe(name: str, **more: Any) -> Recipe:
    file, variant = RECIPES[name]
    return load_recipe(file, TINY | variant | more)


class Training:
    """Three steps, one of each epoch, in float64; the prototypes are frozen in the first."""

    def __init__(self, recipe: Recipe, *, accumulate: int = 1, dtype: torch.dtype = torch.float64, **how: Any) -> None:
        torch.set_num_threads(1)
        self.recipe, self.accumulate, self.dtype = recipe, accumulate, dtype
        self.bfloat16 = how.get("bfloat16", False)
        self.images = load_images("digits", "train")
        self.schedules = Schedules.of(recipe, steps_per_epoch=1)
        self.method = build_method(recipe).to(dtype).train()
        if self.method.mixture is not None:
            self.method.mixture.start_(VMFMixture.from_head(self.method.student))
        parallelize(self.method, **how)
        self.method.attach()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.method.student))

    def run(self, epochs: Any = range(3)) -> dict[str, Any]:
        steps = [self.step(epoch) for epoch in epochs]
        return {"steps": steps, "gradients": gradients(self.method), **whole_state(self.method, self.optimizer)}

    def step(self, epoch: int) -> dict[str, float]:
        loaded = load_steps(
            self.images, self.recipe, epoch, 0, 1, Path("unused"), accumulate=self.accumulate, num_workers=0
        )
        batches = [{name: [self.cast(x) for x in xs] for name, xs in batch.items()} for batch in next(loaded)]
        now = self.schedules.at(epoch)
        found = train_step(self.method, self.optimizer, batches, epoch, now, self.recipe, self.bfloat16)
        statistics, _ = mean_statistics(found)
        means = ("loss", "target_entropy", "kl", "grad_norm", "center_entropy", "kappa_p50")
        return {name: statistics[name] for name in means if name in statistics}

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


def gradients(method: Method) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in unwrap(method.student).named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if local(grad) is not grad else grad for name, grad in found.items()}


def message(function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return ""


def fitted_head() -> dict[str, Tensor]:
    method = build_method(tiny_recipe("dino")).train()
    fit_head(method, load_images("digits", "train"), Path("unused"), num_workers=0)
    return dict(find_head(method.teacher).state_dict())


def of_rank(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {
        "signals": [mean_statistics([{"loss": float(rank)}], signal=15 * rank)[1]],
        "uneven": message(micro_batch_size, tiny_recipe("dino", batch_size=6), 2),
        "three": message(parallelize, build_method(tiny_recipe("dino")), prototype_parallel=3),
        "logits": message(parallelize, build_method(tiny_recipe("dino, unfused")), prototype_parallel=2),
        "batch norm": message(parallelize, build_method(tiny_recipe("dino", use_bn_in_head=True))),
    }
    for name, strategy, accumulate in CASES:
        results[f"{name} {strategy} {accumulate}"] = Training(
            tiny_recipe(name), **STRATEGIES[strategy], accumulate=accumulate
        ).run()
    for before, after in SWITCHES:
        began = Training(tiny_recipe("dino"), **STRATEGIES[before])
        state = [began.run([0, 1])]
        dist.broadcast_object_list(state)
        left = copy.deepcopy(state[0])  # training goes on with the very tensors
        resumed = Training(tiny_recipe("dino"), **STRATEGIES[after])
        restore_state(resumed.method, resumed.optimizer, state[0])
        results[f"{before} to {after}"] = resumed.run([2])
        results[f"{before} left"] = left
    for strategy, how in STRATEGIES.items():
        half = Training(tiny_recipe("dino"), **how, dtype=torch.float32, bfloat16=True)
        results[f"bfloat16 {strategy}"] = half.run()["steps"]
    results["fitted head"] = fitted_head()
    both = Training(tiny_recipe("dino"), strategy="fsdp2", activation_checkpointing=True)
    results["fsdp2, activation checkpointing"] = both.run()
    return results


@pytest.fixture(autouse=True, scope="module")
def without_gpus() -> Iterator[None]:
    """Ranks that talk over gloo, in float64, also where there are GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(of_rank)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: Training(tiny_recipe(name)).run() for name in RECIPES}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, moments and centres in float64, after steps that divide by the size of small gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strategy", "accumulate"), CASES)
def test_two_processes_train_as_one(name: str, strategy: str, accumulate: int, ranks: Any, alone: Any) -> None:
    main, other = (result[f"{name} {strategy} {accumulate}"] for result in ranks)
    assert_equal(main, alone[name])
    assert other["steps"] == main["steps"]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), SWITCHES)
def test_a_strategy_continues_from_another(before: str, after: str, ranks: Any, alone: Any) -> None:
    main = ranks[0][f"{before} to {after}"]
    assert_equal(main | {"steps": alone["dino"]["steps"][:2] + main["steps"]}, alone["dino"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", sorted({before for before, _ in SWITCHES}))
def test_one_process_continues_from_two(strategy: str, ranks: Any, alone: Any) -> None:
    resumed = Training(tiny_recipe("dino"))
    restore_state(resumed.method, resumed.optimizer, ranks[0][f"{strategy} left"])
    found = resumed.run([2])
    assert_equal(found | {"steps": alone["dino"]["steps"][:2] + found["steps"]}, alone["dino"])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "ddp"])
def test_every_strategy_rounds_as_ddp_does_in_bfloat16(strategy: str, ranks: Any) -> None:
    first, *later = zip(ranks[0]["bfloat16 ddp"], ranks[0][f"bfloat16 {strategy}"], strict=True)
    torch.testing.assert_close(first[0], first[1], rtol=1e-5, atol=1e-6)
    for ddp, other in later:  # after updates from gradients that were summed in another order
        torch.testing.assert_close(ddp["loss"], other["loss"], rtol=5e-3, atol=0)


@pytest.mark.slow
def test_activation_checkpointing_under_fsdp2(ranks: Any, alone: Any) -> None:
    assert_equal(ranks[0]["fsdp2, activation checkpointing"], alone["dino"])


@pytest.mark.slow
def test_two_processes_fit_the_head_that_one_fits(ranks: Any) -> None:
    first, second = (result["fitted head"] for result in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, fitted_head(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_process_reaches_all(ranks: Any) -> None:
    assert [result["signals"] for result in ranks] == [[15], [15]]


@pytest.mark.slow
def test_what_several_processes_cannot_do_is_named(ranks: Any) -> None:
    for result in ranks:
        assert result["uneven"] == "`batch_size` (=6) must be a multiple of 4: 2 processes x `accumulate` (=2)"
        assert result["three"].startswith("`prototype_parallel` (=3) must divide the number of processes (=2)")
        assert result["logits"].startswith("`prototype_parallel` (=2) needs a loss without logits")
        assert result["batch norm"].startswith("`use_bn_in_head` (=True) must be False in 2 processes without GPUs")


@pytest.mark.parametrize("how", [{"accumulate": 2}, {"accumulate": 4, "activation_checkpointing": True}])
def test_one_process_in_smaller_parts(how: dict[str, Any], alone: Any) -> None:
    assert_equal(Training(tiny_recipe("dino"), **how).run(), alone["dino"])


def test_activation_checkpointing_computes_the_students_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tiny_recipe("dino", drop_path=0.5), activation_checkpointing=True)
    calls: list[str] = []
    for name in ("student", "teacher"):
        block = getattr(training.method, name).backbone.layers[1]
        block.layernorm_before.register_forward_hook(lambda *_, name=name: calls.append(name))
    training.step(0)
    assert calls.count("student") == 2 * 2  # two sizes of crops, twice
    assert calls.count("teacher") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_compiled_blocks_train_as_others() -> None:
    torch._dynamo.reset()
    recipe = tiny_recipe("dino", num_hidden_layers=1, num_local_crops=0)
    compiled = Training(recipe, compile_blocks=True)
    assert_equal(compiled.run([0]), Training(recipe).run([0]))
    for network in (compiled.method.student, compiled.method.teacher):
        assert all(block._compiled_call_impl for block in network.backbone.layers)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("dino, online EM", {"strategy": "fsdp2"}, r"`strategy` \(='fsdp2'\) must be 'ddp' with `online_em`"),
        ("dino, online EM", {"prototype_parallel": 2}, r"`prototype_parallel` \(=2\) must be 1 with `online_em`"),
        ("dino, online EM", {}, r"`online_em` needs more of the heads than logits: --set fused_loss=true"),
        ("ibot, KoLeo", {"strategy": "fsdp2"}, r"`prototype_koleo_weight` \(=0.1\) needs more of the heads than"),
    ],
)
def test_prototypes_that_are_kept_distinct_refuse_what_would_be_wrong(
    name: str, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parallelize(build_method(tiny_recipe(name, fused_loss=False)), **how)


def test_fsdp2_without_torchrun_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`strategy` \(='fsdp2'\) needs torchrun, for one process too"):
        parallelize(build_method(tiny_recipe("dino")), strategy="fsdp2")


def test_one_process_wraps_nothing() -> None:
    method = build_method(tiny_recipe("dino", use_bn_in_head=True))
    student = method.student
    parallelize(method)
    assert method.student is student
    assert any(type(module) is nn.BatchNorm1d for module in student.modules())
