"""Every way of differentiating and compiling: float32 results against exact ones, on inputs that require grad.

That a transform runs says nothing: a wrong derivative runs too, and is zero or has lost its digits near kappa = 0.
"""

from functools import cache

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from devices import DEVICES
from vmf_heads import log_vmf_normalizer, vmf_mean_resultant

KAPPA = [1e-6, 0.02, 0.5, 3.0, 10.0, 40.0, 300.0, 2000.0]
TOLERANCE = {"rtol": 4 * torch.finfo(torch.float32).eps, "atol": 0.0}


@cache
def exact(p: int) -> tuple[Tensor, Tensor]:
    """A and A' at KAPPA, rounded from 60 digits."""
    resultant, slope = [], []
    with mpmath.workdps(60):
        for kappa in torch.tensor(KAPPA).tolist():
            order, x = mpmath.mpf(p) / 2, mpmath.mpf(kappa)
            a = mpmath.besseli(order, x) / mpmath.besseli(order - 1, x)
            resultant.append(float(a))
            slope.append(float(1 - a * a - (p - 1) * a / x))
    return torch.tensor(resultant), torch.tensor(slope)


def concentrations(device: str) -> Tensor:
    return torch.tensor(KAPPA, device=device, requires_grad=True)


def total(f):
    return lambda k: f(k).sum()


def dual(f, k):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(k, torch.ones_like(k)))).tangent


FIRST = {
    "backward": lambda f, k: torch.autograd.grad(f(k).sum(), k)[0],
    "dual numbers": dual,
    "vmap(grad)": lambda f, k: vmap(grad(f))(k),
    "grad of a sum": lambda f, k: grad(total(f))(k),
    "jacfwd": lambda f, k: jacfwd(f)(k).diagonal(),
    "jacrev": lambda f, k: jacrev(f)(k).diagonal(),
    "jvp": lambda f, k: jvp(f, (k,), (torch.ones_like(k),))[1],
}
SECOND = {
    "double backward": lambda f, k: torch.autograd.grad(
        torch.autograd.grad(f(k).sum(), k, create_graph=True)[0].sum(), k
    )[0],
    "dual numbers over backward": lambda f, k: dual(
        lambda x: torch.autograd.grad(f(x).sum(), x, create_graph=True)[0], k
    ),
    "vmap(grad(grad))": lambda f, k: vmap(grad(grad(f)))(k),
    "hessian": lambda f, k: hessian(total(f))(k).diagonal(),
    "jacfwd(jacfwd)": lambda f, k: jacfwd(jacfwd(total(f)))(k).diagonal(),
    "jacrev(jacrev)": lambda f, k: jacrev(jacrev(total(f)))(k).diagonal(),
    "jacfwd of grad": lambda f, k: jacfwd(grad(total(f)))(k).diagonal(),
}
# p = 6 has the branch of the second derivative for large kappa.
# One dimension with compiled kernels is enough: what differs between dimensions is in test_normalizer_accuracy.py.
eager_and_compiled = pytest.mark.parametrize(("p", "compiled"), [(6, False), (256, False), (256, True)])
on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
@eager_and_compiled
@pytest.mark.parametrize("transform", FIRST)
def test_first_derivatives(transform, p, compiled, device):
    resultant, slope = exact(p)
    k = concentrations(device)
    of_value = FIRST[transform](lambda x: log_vmf_normalizer(x, p, compiled=compiled), k)
    of_resultant = FIRST[transform](lambda x: vmf_mean_resultant(x, p, compiled=compiled), k)
    torch.testing.assert_close(-of_value.cpu(), resultant, **TOLERANCE)
    torch.testing.assert_close(of_resultant.cpu(), slope, **TOLERANCE)


@on_devices
@eager_and_compiled
@pytest.mark.parametrize("transform", SECOND)
def test_second_derivatives(transform, p, compiled, device):
    got = SECOND[transform](lambda x: log_vmf_normalizer(x, p, compiled=compiled), concentrations(device))
    torch.testing.assert_close(-got.cpu(), exact(p)[1], **TOLERANCE)


@on_devices
@pytest.mark.parametrize("compiled", [False, True])
def test_vmap_over_rows(compiled, device):
    k = concentrations(device).detach().expand(3, -1)
    got = vmap(lambda row: vmf_mean_resultant(row, 256, compiled=compiled))(k)
    torch.testing.assert_close(got.cpu(), exact(256)[0].expand(3, -1), **TOLERANCE)


def traced(f):
    """What can go wrong does so while tracing; test_normalizer_accuracy.py has code generated, too, which is slow."""
    torch.compiler.reset()  # its limit of recompilations is per line of source
    return torch.compile(f, fullgraph=True, backend="aot_eager")


# jacfwd(jacfwd) is absent: inside torch.compile PyTorch 2.13 fails on it for as little as y * 2.
COMPILED = {
    name: (transform, order)
    for order, table in enumerate((FIRST, SECOND))
    for name, transform in table.items()
    if name in ("vmap(grad)", "jacfwd", "jvp", "vmap(grad(grad))", "hessian", "jacrev(jacrev)")
}


@on_devices
@pytest.mark.parametrize("compiled", [None, True])
@pytest.mark.parametrize("transform", COMPILED)
def test_transforms_inside_a_compiled_region(transform, compiled, device):
    function, order = COMPILED[transform]
    region = traced(lambda k: function(lambda x: log_vmf_normalizer(x, 256, compiled=compiled), k))
    torch.testing.assert_close(-region(concentrations(device)).cpu(), exact(256)[order], **TOLERANCE)


@on_devices
@pytest.mark.parametrize("p", [6, 256])
def test_backward_through_a_compiled_region(p, device):
    @traced
    def both(k: Tensor) -> tuple[Tensor, Tensor]:
        return log_vmf_normalizer(k, p, relative=True), vmf_mean_resultant(k, p)

    k = concentrations(device)
    value, resultant = both(k)
    (first,) = torch.autograd.grad(value.sum(), k, retain_graph=True)
    (slope,) = torch.autograd.grad(resultant.sum(), k, retain_graph=True)
    torch.testing.assert_close(resultant.cpu(), exact(p)[0], **TOLERANCE)
    torch.testing.assert_close(-first.cpu(), exact(p)[0], **TOLERANCE)
    torch.testing.assert_close(slope.cpu(), exact(p)[1], **TOLERANCE)


def test_double_backward_from_outside_a_compiled_region_is_refused_by_torch():
    """A loud error, not a wrong number; its wording depends on whether buffers were donated."""
    region = traced(lambda k: log_vmf_normalizer(k, 256))
    k = concentrations("cpu")
    value = region(k).sum()
    with pytest.raises(RuntimeError, match=r"create_graph=False|does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(value, k, create_graph=True)[0].sum(), k)


@on_devices
def test_no_recompilation_per_batch_size(device):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    region = torch.compile(lambda k: log_vmf_normalizer(k, 256), fullgraph=True, backend=backend)
    for rows in (5, 7, 9, 33, 1000):
        region(torch.rand(rows, device=device))
    assert len(graphs) == 2  # the first size, then any size


class BothFunctions(nn.Module):
    def forward(self, k: Tensor) -> tuple[Tensor, Tensor]:
        return log_vmf_normalizer(k, 256), vmf_mean_resultant(k, 256)


@on_devices
def test_export_with_a_dynamic_shape(device):
    shapes = {"k": {0: torch.export.Dim("n")}}
    program = torch.export.export(BothFunctions(), (torch.rand(3, device=device),), dynamic_shapes=shapes)
    k = concentrations(device)
    value, resultant = program.module()(k)
    (first,) = torch.autograd.grad(value.sum(), k)
    (slope,) = torch.autograd.grad(resultant.sum(), k)
    torch.testing.assert_close(value, log_vmf_normalizer(k, 256))
    torch.testing.assert_close(-first.cpu(), exact(256)[0], **TOLERANCE)
    torch.testing.assert_close(slope.cpu(), exact(256)[1], **TOLERANCE)
