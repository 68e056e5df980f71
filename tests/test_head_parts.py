"""PrototypeHead from parts of one's own; how heads are found inside a model and under its wrappers."""

import pytest
import torch
from torch import nn

import vmf_reference
from cross_entropy_problems import weight_normed
from vmf_heads import HeadOutput, VMFPrototypeHead, prototype_cross_entropy, set_temperature
from vmf_heads.compat.ibot import iBOTHead
from vmf_heads.cross_entropy import prototype_cross_entropy_reference
from vmf_heads.head import PrototypeHead, find_head, find_heads
from vmf_heads.mlp import projection_mlp
from vmf_heads.prototypes import LinearPrototypes, Prototypes

K, P = 20, 8
LAYERS = pytest.mark.parametrize("layer", [Prototypes, LinearPrototypes])


def head_of(layer: type[Prototypes | LinearPrototypes], **options: object) -> PrototypeHead:
    """16 -> 20 prototypes of uneven norms, behind an MLP that no codebase has."""
    prototypes = layer(P, K)
    with torch.no_grad():
        for parameter in prototypes.parameters():
            parameter.mul_(torch.linspace(0.5, 4, K)[:, None])
    return PrototypeHead(16, nn.Sequential(nn.Linear(16, P), nn.Tanh()), prototypes, **options)


def small_head(**options: object) -> VMFPrototypeHead:
    return VMFPrototypeHead(16, K, hidden_dim=12, bottleneck_dim=P, **options)


@LAYERS
def test_equation_6_from_parts(layer):
    head = head_of(layer, temperature=0.07).double()
    x = torch.randn(5, 16).double()
    y = nn.functional.normalize(head.mlp(x), dim=1)
    w = head.last_layer.weight.detach()
    want = vmf_reference.log_student((y @ w.T).detach(), w.norm(dim=1), P, 0.07)
    torch.testing.assert_close((head(x) / 0.07).log_softmax(dim=1).detach(), want)
    assert (head.in_dim, head.bottleneck_dim, head.num_prototypes) == (16, P, K)


def test_the_head_of_dino_is_made_of_parts():
    torch.manual_seed(4)
    whole = small_head()
    torch.manual_seed(4)
    parts = PrototypeHead(16, projection_mlp(16, 12, P), Prototypes(P, K))
    assert list(parts.state_dict()) == list(whole.state_dict())
    torch.testing.assert_close(dict(parts.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    x = torch.randn(3, 16)
    torch.testing.assert_close(parts(x), whole(x), rtol=0, atol=0)


def test_a_subclass_names_its_mlp():
    class Renamed(PrototypeHead):
        MLP_NAME = "layers"

    head = Renamed(16, nn.Linear(16, P), Prototypes(P, K))
    assert [name for name, _ in head.named_parameters()] == [
        "layers.weight",
        "layers.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    ]
    assert head(torch.randn(2, 3, 16)).shape == (2, 3, K)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"`temperature` \(=0\) must be a finite number > 0"),
        ({"normalizer": "l2"}, r"`normalizer` \(='l2'\) must be one of 'vmf', 'none'"),
        ({"output": "probs"}, r"`output` \(='probs'\) must be one of"),
    ],
)
def test_parts_are_checked_like_the_whole(options, message):
    with pytest.raises(ValueError, match=message):
        head_of(Prototypes, **options)


@pytest.mark.parametrize("normalizer", ["vmf", "none"])
@LAYERS
def test_the_fused_loss_of_a_head_is_the_loss_of_its_logits(layer, normalizer):
    """Value and the gradient of every parameter, from what the head returns with output="prototypes"."""
    student = head_of(layer, normalizer=normalizer, temperature=0.1).double()
    teacher = head_of(layer, normalizer=normalizer).double()
    x = torch.randn(6, 16).double()
    with torch.no_grad():
        teacher_logits = teacher(x, temperature=0.04)
    targets = (teacher_logits / 0.04).softmax(dim=1)
    want = -(targets * (student(x) / 0.1).log_softmax(dim=1)).sum()

    student.output = teacher.output = "prototypes"
    pair = student(x), teacher(x)
    options = {"student_temperature": 0.1, "teacher_temperature": 0.04, "normalizer": normalizer}
    got = prototype_cross_entropy(*pair, **options)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(prototype_cross_entropy_reference(*pair, **options)[0], want)
    parameters = list(student.parameters())
    torch.testing.assert_close(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters))


@LAYERS
def test_the_output_is_a_copy_of_the_prototypes(layer):
    """FSDP frees the memory of the parameters after the forward; a loss still needs them then."""
    head = head_of(layer, output="prototypes")
    output = head(torch.randn(2, 16))
    assert isinstance(output, HeadOutput)
    before = output.prototypes.detach().clone()
    with torch.no_grad():
        for parameter in head.last_layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(output.prototypes.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(weight_normed(output).norms, output.norms)


class Wrapper(nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


WRAPS = pytest.mark.parametrize("wrap", [Wrapper, lambda m: torch.compile(m, backend="eager"), nn.Sequential])


@WRAPS
def test_set_temperature_reaches_the_head_inside(wrap):
    head = small_head()
    x = torch.randn(3, 16)
    want = head(x, temperature=0.04)
    wrapped = wrap(head)
    wrapped(x)
    set_temperature(wrapped, 0.04)
    torch.testing.assert_close(wrapped(x), want)


@WRAPS
def test_a_head_is_found_under_wrappers(wrap):
    head = small_head()
    assert find_head(wrap(head)) is head
    (path,) = find_heads(wrap(head))
    assert wrap(head).get_submodule(path) is head


def test_all_heads_are_found_by_their_paths():
    model = nn.ModuleDict({"backbone": nn.Linear(3, 16), "dino": small_head(), "ibot": Wrapper(iBOTHead(16, K))})
    assert find_heads(model) == {"dino": model["dino"], "ibot.module": model["ibot"].module}
    assert find_heads(model["dino"]) == {"": model["dino"]}
    assert find_heads(model["backbone"]) == {}
    set_temperature(model, 0.03)
    assert [head.temperature for head in find_heads(model).values()] == [0.03, 0.03]


def test_a_head_with_two_names_is_one_head():
    head = small_head()
    assert list(find_heads(nn.ModuleList([head, head]))) == ["0"]


def test_exactly_one_head_is_wanted():
    two = nn.ModuleDict({"dino": small_head(), "ibot": small_head()})
    with pytest.raises(ValueError, match=r"`teacher` \(a ModuleDict\) must .* contains 2: 'dino', 'ibot'$"):
        find_head(two, "teacher")
    with pytest.raises(ValueError, match=r"`module` \(a Linear\) must contain exactly one .* it contains none$"):
        find_head(nn.Linear(3, 3))
