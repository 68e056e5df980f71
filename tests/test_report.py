"""prototype_report: counts against a loop in float64, constructed voids and collapses, wrappers, shards, memory."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from devices import DEVICES
from gloo import run_on_ranks
from vmf_heads import VMFPrototypeHead, log_vmf_normalizer, prototype_report
from vmf_heads._duplicates import Duplicates, count_duplicates
from vmf_heads._memory import CHUNK_BYTES
from vmf_heads.compat.ibot import iBOTHead
from vmf_heads.report import KAPPA_QUANTILES, _quantiles

THRESHOLDS = (0.3, 0.5, 0.9, 0.99)


def by_loop(prototypes: Tensor, threshold: float) -> tuple[int, int]:
    """The definition in the docstring of `count_duplicates`, in float64."""
    directions = F.normalize(prototypes.double(), dim=1)
    cosine = directions @ directions.T
    remaining, sizes = list(range(len(prototypes))), []
    while remaining:
        first, *others = remaining
        left = [k for k in others if cosine[first, k] <= threshold]
        sizes.append(len(remaining) - len(left))
        remaining = left
    return len(sizes), max(sizes)


def clustered() -> Tensor:
    """550 prototypes in 4 dimensions: random ones, near copies, and a tight bundle, in any order and of any length."""
    random = torch.randn(300, 4)
    bundle = -torch.ones(200, 4) + 0.1 * torch.randn(200, 4)
    everything = torch.cat([random, random[:50] + 0.01 * torch.randn(50, 4), bundle])
    return everything[torch.randperm(550)] * torch.rand(550, 1).mul(5).exp()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 7, 64, None])
def test_duplicates_are_those_of_a_loop(rows: int | None, device: str) -> None:
    prototypes = clustered()
    want = [by_loop(prototypes, threshold) for threshold in THRESHOLDS]
    assert len({unique for unique, _ in want}) == 4
    assert want[2][1] > 100
    before = prototypes.to(device)
    given = before.clone()
    assert [tuple(found) for found in count_duplicates(given, THRESHOLDS, rows=rows)] == want
    assert torch.equal(given, before)


def test_a_chain_of_duplicates_depends_on_the_order_only() -> None:
    # 20 degrees between neighbours: cosine 0.940 to the next, 0.766 to the next but one, 0.5 to the third.
    angles = torch.arange(5) * math.pi / 9
    chain = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert count_duplicates(chain, [0.9, 0.7]) == [(3, 2), (2, 3)]
    assert count_duplicates(chain[[1, 0, 2, 3, 4]], [0.9]) == [(2, 3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_void_set(dtype: torch.dtype, device: str) -> None:
    """Ten rows around e_0, one at -e_0. One prototype takes the ten; of 21 opposite to the mean one takes a row."""
    features = torch.zeros(11, 8)
    features[:10, 0] = 0.8
    features[range(10), [1, 2, 3, 4, 5] * 2] = torch.tensor([0.6, -0.6]).repeat_interleave(5)
    features[10, 0] = -1
    features = features.to(device, dtype)
    void = torch.tensor([-3.0, *[0.0] * 7]).repeat(20, 1)
    chosen = torch.tensor([[-4.0, *[0.0] * 7]])
    aside = torch.eye(8)[[1, 2]] * 2 + torch.eye(8)[0]
    prototypes = torch.cat([aside, void, torch.eye(8)[:1] * 9, chosen]).to(device, dtype)
    report = prototype_report(prototypes, features, temperature=0.05, thresholds=(0.4, 0.9))
    assert (report.prototypes, report.dim, report.rows) == (24, 8, 11)
    assert report.unique == {0.4: 3, 0.9: 4}  # the main one has cosines of 1 / sqrt(5) = 0.447 to the first two
    assert report.largest_set == {0.4: 21, 0.9: 21}
    assert report.void == 20
    assert report.used == 2
    assert report.top_share == pytest.approx(10 / 11)
    assert report.mean_length == pytest.approx(7 / 11, abs=4e-3 if dtype == torch.bfloat16 else 1e-6)
    assert report.kappa["max"] == pytest.approx(180)
    assert report.kappa["p50"] == pytest.approx(60)
    assert report.verdict == (
        "83% of the prototypes point straight away from the data and no row chooses them: a void set. "
        "One prototype takes 91% of the rows."
    )
    assert "20 (83.3%)" in str(report)
    assert str(report).endswith(report.verdict)


def test_use_and_entropies_are_those_of_the_formula() -> None:
    """Eq. 7 in float64, from a head and from tensors, from features and from scores."""
    head = VMFPrototypeHead(6, 40, hidden_dim=8, bottleneck_dim=5)
    norms = torch.linspace(0.2, 6, 40)
    head.last_layer.weight_g.data = norms[:, None] * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    y = F.normalize(torch.randn(70, 5), dim=1)
    center, tau = torch.randn(40), 0.3
    log_c = log_vmf_normalizer(norms.double() / tau, 5)
    weight = head.last_layer.weight.detach()
    targets = torch.softmax(y.double() @ weight.double().T / tau + log_c - center, dim=1)
    counts = torch.bincount(targets.argmax(dim=1), minlength=40)
    wanted = {
        "rows": 70,
        "used": (counts > 0).sum(),
        "top_share": counts.max() / 70,
        "target_entropy": -(targets * targets.log()).sum() / 70,
        "marginal_entropy": -(targets.mean(dim=0) * targets.mean(dim=0).log()).sum(),
        "target_entropy_share": -(targets * targets.log()).sum() / 70 / math.log(40),
        "kappa_min": norms[0] / tau,
        "kappa_max": norms[-1] / tau,
    }
    reports = [
        prototype_report(head, y, temperature=tau, log_center=center),
        prototype_report(nn.Sequential(nn.Linear(3, 6), head), scores=y @ weight.T, temperature=tau, log_center=center),
        prototype_report(weight, y, temperature=tau, log_center=center, log_normalizer=log_c),
    ]
    for report in reports:
        got = report.as_dict()
        assert {name: got[name] for name in wanted} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, rel=1e-5
        )
    assert 3 < reports[0].used < 40
    assert "void" not in reports[1].as_dict()
    assert reports[1].void is None
    head.temperature = 0.07
    assert prototype_report(head).temperature == 0.07


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_quantiles_are_those_of_torch(total: int) -> None:
    values, shares = torch.randn(total), [0.0, 0.05, 0.5, 0.95, 1.0]
    torch.testing.assert_close(torch.tensor(_quantiles(values, shares)), values.quantile(torch.tensor(shares)))


def test_quantiles_of_more_prototypes_than_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.quantile takes 2^24 numbers, before torch 2.14. Counting duplicates among so many takes minutes."""
    monkeypatch.setattr("vmf_heads.report.count_duplicates", lambda weight, thresholds: [Duplicates(1, 1)])
    norms = torch.arange(2**24 + 1, dtype=torch.float32).flip(0)
    kappa = prototype_report(torch.stack([norms, torch.zeros_like(norms)], dim=1), temperature=1.0).kappa
    assert kappa == pytest.approx({name: share * 2**24 for name, share in KAPPA_QUANTILES.items()})


PROTOTYPES = torch.eye(20)
SAME = "The targets hardly differ between rows: collapsed, or at the start of training."
SAME_FEATURES = "The features are nearly the same in all rows: collapsed."
TAKES_ALL = "One prototype takes 100% of the rows."


@pytest.mark.parametrize(
    ("features", "options", "verdict"),
    [
        (PROTOTYPES, {}, "No sign of collapse."),
        (None, {}, "No large set of duplicates."),
        (PROTOTYPES[:1], {}, "No sign of collapse."),  # one row says nothing
        (PROTOTYPES, {"temperature": 50.0}, SAME),
        (PROTOTYPES, {"log_center": 99 * (1 - PROTOTYPES[3])}, f"{TAKES_ALL} {SAME}"),  # forbids all but one
        (
            PROTOTYPES[:1].repeat(9, 1),
            {},
            f"The features are nearly the same in all rows: collapsed. {TAKES_ALL} {SAME}",
        ),
    ],
    ids=["healthy", "no data", "one row", "uniform targets", "one prototype", "same features"],
)
def test_verdicts(features: Tensor | None, options: dict, verdict: str) -> None:
    assert prototype_report(PROTOTYPES, features, **options).verdict == verdict


def test_duplicates_alone_cannot_tell_a_void() -> None:
    twice = torch.cat([PROTOTYPES, PROTOTYPES[:1].repeat(5, 1)])
    verdict = "24% of the prototypes are duplicates of one another"
    unknown = prototype_report(twice)
    assert unknown.verdict == f"{verdict}; features would tell whether they point away from the data."
    known = prototype_report(twice, PROTOTYPES)
    assert known.verdict == f"{verdict}."
    assert known.void == 0


def test_wrappers_and_autocast_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 6), VMFPrototypeHead(6, 40, hidden_dim=8, bottleneck_dim=5))
    features = F.normalize(torch.randn(30, 5), dim=1)
    want = prototype_report(model, features, temperature=0.05, thresholds=THRESHOLDS)
    with torch.autocast("cpu", torch.bfloat16):
        assert prototype_report(torch.compile(model), features, temperature=0.05, thresholds=THRESHOLDS) == want
    model[1].attach_output("features")  # a fused loss holds the head
    assert prototype_report(model, features, temperature=0.05, thresholds=THRESHOLDS) == want


def sharded(rank: int) -> list[dict[str, float]]:
    torch.manual_seed(1)
    features = F.normalize(torch.randn(30, 5), dim=1)
    head = VMFPrototypeHead(6, 41, hidden_dim=8, bottleneck_dim=5)
    alone, ddp = prototype_report(head, features), prototype_report(DistributedDataParallel(head), features)
    fsdp = prototype_report(fully_shard(head, mesh=init_device_mesh("cpu", (2,))), features)
    return [alone.as_dict(), ddp.as_dict(), fsdp.as_dict()]


def test_ddp_and_fsdp2_report_the_whole_head() -> None:
    for alone, *wrapped in run_on_ranks(sharded):
        assert wrapped == [alone, alone]
        assert alone["prototypes"] == 41


class LargestResult(TorchDispatchMode):
    """Records the most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


def test_no_tensor_has_k_times_k_or_n_times_k_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    total, rows = 500, 700
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 8 * total)
    prototypes, features = torch.randn(total, 6), F.normalize(torch.randn(rows, 6), dim=1)
    whole = LargestResult()
    with whole:
        prototype_report(prototypes, features)
    assert 4 * total < whole.elements <= max(8 * total, rows * 6)


W = torch.ones(4, 3)
TWO_HEADS = nn.ModuleList([iBOTHead(4, 8, hidden_dim=4, bottleneck_dim=3) for _ in "ab"])


@pytest.mark.parametrize(
    ("prototypes", "options", "message"),
    [
        (W[0], {}, r"`prototypes` \(of shape \(3,\)\) must have shape \(rows >= 1, p >= 2\)"),
        (W[:, :1], {}, r"`prototypes` \(of shape \(4, 1\)\) must have shape"),
        (W * math.nan, {}, "`prototypes` must be finite, but some are inf or NaN"),
        (W, {"features": W.T}, r"`features` \(of shape \(3, 4\)\) must have shape \(rows >= 1, 3\)"),
        (W, {"features": W * math.nan}, "`features` or `scores` must be finite, but some are inf or NaN"),
        (W, {"features": W}, r"`features` \(of shape \(4, 3\)\) must hold unit vectors, .* lengths from 1.73 to 1.73"),
        (W, {"features": W[:0]}, r"`features` \(of shape \(0, 3\)\) must have shape \(rows >= 1, 3\)"),
        (W, {"scores": W}, r"`scores` \(of shape \(4, 3\)\) must have shape \(rows >= 1, 4\)"),
        (W, {"features": W, "scores": W.T}, "`features` and `scores` must not both be given"),
        (W, {"temperature": 0.0}, r"`temperature` \(=0.0\) must be a finite number > 0"),
        (W, {"log_center": W.T[:1]}, r"`log_center` \(of shape \(1, 4\)\) must have shape \(4,\)"),
        (W, {"thresholds": (0.9, 1.0)}, r"`thresholds` \(=0.9, 1.0\) must lie between -1 and 1"),
        (W, {"thresholds": ()}, r"`thresholds` \(=\) must lie between -1 and 1"),
        (W, {"void_threshold": -1}, r"`void_threshold` \(=-1\) must lie between -1 and 1"),
        (nn.Linear(3, 4), {}, r"`prototypes` \(a Linear\) must contain exactly one prototype head; it contains none"),
        (
            TWO_HEADS,
            {},
            r"`prototypes` \(a ModuleList\) must contain exactly one prototype head; it contains 2: '0', '1'",
        ),
    ],
)
def test_errors(prototypes: Tensor | nn.Module, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prototype_report(prototypes, **options)
