"""log_vmf_normalizer and vmf_mean_resultant: dtypes, shapes, devices and errors. Accuracy and transforms: own files."""

from functools import cache

import pytest
import torch
from torch import Tensor

import vmf_reference
from devices import DEVICES
from vmf_heads import _compiled, _lowering, log_vmf_normalizer, vmf_mean_resultant
from vmf_heads._expansion import horner

FUNCTIONS = [log_vmf_normalizer, vmf_mean_resultant]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture
def fresh_kernels(monkeypatch):
    """No kernel and no warning of an earlier test; those of this one are forgotten with it."""
    monkeypatch.setattr(_compiled, "_warned", False)
    monkeypatch.setattr(_compiled, "_kernel", cache(_compiled._kernel.__wrapped__))


@pytest.mark.parametrize("p", [2, 3, 64, 256])
def test_equals_the_formula_of_the_docstring(p):
    kappa = torch.tensor([3.0, 10.0, 25.0, 100.0, 600.0], dtype=torch.float64)
    want = vmf_reference.log_normalizer(kappa, p)
    torch.testing.assert_close(log_vmf_normalizer(kappa, p), want, rtol=1e-12, atol=1e-10)
    at_zero = log_vmf_normalizer(torch.zeros((), dtype=torch.float64), p)
    torch.testing.assert_close(log_vmf_normalizer(kappa, p, relative=True), want - at_zero, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_is_computed_in_float32_and_rounded_once(function, dtype, compiled, device):
    kappa = torch.tensor([0.0, 0.5, 10.0, 100.0, 700.0], dtype=dtype, device=device)
    wide = kappa if dtype == torch.float64 else kappa.float()
    got = function(kappa, 256, compiled=compiled)
    assert got.dtype == dtype
    torch.testing.assert_close(got, function(wide, 256, compiled=compiled).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_stays_float32_under_autocast(function, device):
    kappa = torch.tensor([10.0, 10.5, 11.0], dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = function(kappa, 256)
        single = function(kappa.float(), 256)
    assert got.dtype == single.dtype == torch.float32
    torch.testing.assert_close(got, function(kappa.float(), 256), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_shape_and_layout(function, compiled, device):
    base = torch.linspace(0, 90, 60, device=device).reshape(3, 4, 5)
    layouts = {
        "0-dim": base[2, 3, 4],
        "empty": base[:, :0],
        "one": base[:1, 0, 0],
        "transposed": base.transpose(0, 2),
        "strided": base[:, ::2, 1::2],
        "expanded": base[:, :1, :1].expand(3, 7, 2),
        "parameter": torch.nn.Parameter(base),
    }
    for name, kappa in layouts.items():
        got = function(kappa, 64, compiled=compiled)
        assert got.shape == kappa.shape, name
        one_by_one = [function(value, 64, compiled=False) for value in kappa.detach().flatten()]
        want = torch.stack(one_by_one).reshape(kappa.shape) if one_by_one else torch.empty_like(kappa)
        # log C_64 falls from 40 through 0: there a rounding of its terms is no small part of it.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("compiled", [None, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_meta_tensors_have_shape_and_dtype(function, compiled):
    kappa = torch.empty(3, 2, device="meta", dtype=torch.float16)
    got = function(kappa, 256, compiled=compiled)
    assert (got.device.type, got.shape, got.dtype) == ("meta", (3, 2), torch.float16)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("kappa", "p", "error", "message"),
    [
        (torch.ones(2, dtype=torch.int64), 256, TypeError, r"`kappa` \(of torch.int64\) must be a tensor of float16"),
        (torch.ones(2, dtype=torch.complex64), 256, TypeError, r"`kappa` \(of torch.complex64\)"),
        (1.0, 256, TypeError, r"`kappa` \(of float\) must be a tensor of float16"),
        (torch.ones(2), 1, ValueError, r"`p` \(=1\) must be an integer >= 2"),
        (torch.ones(2), -3, ValueError, r"`p` \(=-3\) must be an integer >= 2"),
        (torch.ones(2), 256.0, TypeError, r"`p` \(=256.0\) must be an integer >= 2"),
        (torch.ones(2), "256", TypeError, r"`p` \(='256'\) must be an integer >= 2"),
    ],
)
def test_bad_arguments(function, kappa, p, error, message):
    with pytest.raises(error, match=message):
        function(kappa, p)


def broken_compile(*args, **kwargs):
    raise FileNotFoundError("no C++ compiler here")


@pytest.fixture
def where_compiling_fails(fresh_kernels, monkeypatch):
    """A machine whose tensors are on a GPU, to compiled=None, but where no kernel can be built."""
    monkeypatch.setattr(_compiled.torch, "compile", broken_compile)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)


@pytest.mark.usefixtures("where_compiling_fails")
def test_falls_back_to_plain_operations_with_one_warning():
    kappa = torch.linspace(0, 50, 7, requires_grad=True)
    with pytest.warns(RuntimeWarning, match=r"torch.compile failed \(FileNotFoundError: no C\+\+ compiler") as record:
        value = log_vmf_normalizer(kappa, 256)
    assert len(record) == 1
    (gradient,) = torch.autograd.grad(value.sum(), kappa)  # a second warning would be an error here
    resultant = vmf_mean_resultant(kappa, 256)
    torch.testing.assert_close(value, log_vmf_normalizer(kappa, 256, compiled=False), rtol=0, atol=0)
    torch.testing.assert_close(-gradient, resultant, rtol=0, atol=0)


@pytest.mark.usefixtures("where_compiling_fails")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_true_raises_instead(function):
    with pytest.raises(RuntimeError, match=r"`compiled` \(=True\) needs torch.compile to work on this machine"):
        function(torch.ones(3), 256, compiled=True)
    assert function(torch.ones(3), 256, compiled=False).isfinite().all()


@pytest.fixture
def compiled_graphs(fresh_kernels, monkeypatch):
    """The graphs torch.compile was asked to make; they run as they are, which saves the time of a C++ compiler."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(_compiled.torch, "compile", lambda f, **options: compile_(f, **options, backend=backend))
    return graphs


@pytest.mark.parametrize("device", DEVICES)
def test_one_kernel_serves_every_shape_and_stride(compiled_graphs, device):
    for shape in [(2,), (3,), (17,), (4, 5), (2, 3, 4), (65,)]:
        kappa: Tensor = torch.rand(shape, device=device)
        log_vmf_normalizer(kappa, 256, compiled=True)
        log_vmf_normalizer(kappa.t() if kappa.dim() == 2 else kappa[::2], 256, compiled=True)
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_torch_compile_traces_one_operation_in_any_dimension(function, device, compiled_graphs):
    """The time that it takes grows with their number, and the expansion has hundreds in two dimensions."""
    kappa = torch.linspace(0, 50, 7, dtype=torch.float64, device=device)
    for p in (2, 17, 256):
        function(kappa, p, compiled=True)
    called = [str(node.target) for graph in compiled_graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called == ["vmf_heads.expansion"] * 3


def test_without_a_place_in_inductor_the_operations_are_traced(compiled_graphs, monkeypatch):
    monkeypatch.setattr(_lowering, "_register", lambda: None)
    kappa = torch.linspace(0, 50, 7)
    got = log_vmf_normalizer(kappa, 256, compiled=True)
    torch.testing.assert_close(got, log_vmf_normalizer(kappa, 256), rtol=0, atol=0)
    assert len(compiled_graphs[0].graph.nodes) > 20


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_thirty_dimensions_in_one_process(compiled_graphs, device):
    """One kernel each: torch.compile itself stops after 8 values of an argument and goes on uncompiled."""
    kappa = torch.linspace(0, 50, 7, device=device)
    for p in [*range(256, 286), *range(256, 286)]:
        got = log_vmf_normalizer(kappa, p, relative=True, compiled=True)
        torch.testing.assert_close(got, log_vmf_normalizer(kappa, p, relative=True, compiled=False))
    assert len(compiled_graphs) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_horner(dtype):
    x = torch.tensor([0.0, 1.0, -2.0], dtype=dtype)
    got = horner((1.0, -3.0, 0.5), x)
    assert got.dtype == dtype
    assert got.tolist() == [1.0, -1.5, 9.0]
