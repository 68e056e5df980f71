"""The prototype head of DINO, with the normalising constants that make it a von Mises-Fisher mixture."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from ._checks import at_least, one_of, positive
from ._matmul import at_least_float32
from ._unattached import DEFAULT_TEMPERATURE, UnattachedTeacher
from .mlp import projection_mlp
from .prototypes import HeadOutput, PrototypeLayer, Prototypes, prototype_log_normalizer

__all__ = ["PrototypeHead", "VMFPrototypeHead", "find_head", "find_heads", "set_temperature"]

NORMALIZERS = ("vmf", "none")
OUTPUTS = ("logits", "scores", "features", "prototypes")


class PrototypeHead(nn.Module):
    """A head from its parts: an MLP, the projection of its output onto the unit sphere, and a layer of prototypes.

    `VMFPrototypeHead` makes the parts by DINO's signature; the heads in `compat` make those of their code base. The
    output is described there.

    Args:
        in_dim: dimension of the backbone's features.
        mlp: maps (..., in_dim) to (..., p).
        prototypes: a `Prototypes` or `LinearPrototypes` layer of the same p.
        temperature: tau that the loss will divide by.
        normalizer: "vmf" adds log C_p to the logits; "none" does not.
        output: "logits", "scores", "features" or "prototypes".
        float32_scores: keep the product with the prototypes in float32 under CUDA autocast.

    Raises:
        ValueError, TypeError: an argument is out of its range; each message names it and what is allowed.
    """

    MLP_NAME: ClassVar[str] = "mlp"  # of the submodule, and so of its parameters
    # Whether a teacher's logits serve a loss that is not attached: only where its log C_p cancels.
    SERVES_STOCK_LOSSES: ClassVar[bool] = False
    last_layer: PrototypeLayer

    def __init__(
        self,
        in_dim: int,
        mlp: nn.Module,
        prototypes: PrototypeLayer,
        *,
        temperature: float = DEFAULT_TEMPERATURE,
        normalizer: str = "vmf",
        output: str = "logits",
        float32_scores: bool = False,
    ) -> None:
        super().__init__()
        self.in_dim = at_least("in_dim", in_dim, 1)
        self.bottleneck_dim = prototypes.dim
        self.num_prototypes = prototypes.num_prototypes
        self.temperature = positive("temperature", temperature)
        self.normalizer = one_of("normalizer", normalizer, NORMALIZERS)
        self.output = one_of("output", output, OUTPUTS)
        self.float32_scores = float32_scores
        self._released_output: str | None = None  # what `release` restores while a loss is attached
        self._prototypes_stay = False
        self._unattached = UnattachedTeacher()
        self.add_module(self.MLP_NAME, mlp)
        self.last_layer = prototypes

    def forward(self, x: Tensor, temperature: float | None = None) -> Any:
        """What `output` says, of backbone features `x` (..., in_dim); `temperature` overrides the head's own."""
        return self.read(self.last_layer, self.features(x), temperature)

    def reset_parameters(self) -> None:
        """Initialise all layers as their constructors do: after `to_empty` of a head that was built on the meta device.

        Loops that call `reset_parameters` of every module find the same in the layers themselves.
        """
        for layer in self.modules():
            if layer is not self and callable(reset := getattr(layer, "reset_parameters", None)):
                reset()

    def features(self, x: Tensor) -> Tensor:
        """The unit features y (..., p), in float32 or more, of backbone features `x` (..., in_dim)."""
        if x.shape[-1:] != (self.in_dim,):
            raise ValueError(f"`x` (of shape {tuple(x.shape)}) must end in `in_dim` (={self.in_dim})")
        mlp = self.get_submodule(self.MLP_NAME)
        y = mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.dim() > 2 else mlp(x)
        # float32: in half precision the squares under- or overflow, which is where DINO's NaNs were traced to.
        return F.normalize(at_least_float32(y), dim=-1)

    def read(
        self, prototypes: PrototypeLayer, features: Tensor, temperature: float | None = None
    ) -> Tensor | HeadOutput:
        """What `output` says, of unit features (..., p) and these prototypes."""
        if self.output == "features":
            return features
        if self.output == "prototypes":
            y, directions, scales = prototypes.with_features(features)
            # Copies: under FSDP the parameters' storage is freed after this forward, unless `attach` saw to it.
            directions = _Itself.apply(directions) if self._prototypes_stay else directions.clone()
            return HeadOutput(y, directions, None if scales is None else scales.clone())
        scores = prototypes(features, exact=self.float32_scores)
        if self.output == "scores" or self.normalizer == "none":
            return scores
        norms = prototypes.gathered_norms() if prototypes.cut_over_ranks else prototypes.norms
        if temperature is None:
            if not (self.is_attached or self.SERVES_STOCK_LOSSES or torch.compiler.is_compiling()):
                self._unattached.notice(self.training, scores, self.temperature, lambda: norms)
            temperature = self.temperature
        tau = positive("temperature", temperature)
        return scores + tau * self.log_normalizer(tau, norms)

    def log_normalizer(self, temperature: float, norms: Tensor | None = None) -> Tensor:
        """log C_p(||w_k|| / temperature) - log C_p(1 / temperature) (K,), zeros for normalizer="none".

        `norms` (K,) replaces the norms of `last_layer`. Outside of a forward pass `last_layer.gathered_norms()`, which
        are whole under FSDP2, too.
        """
        if norms is None:
            norms = self.last_layer.gathered_norms() if self.last_layer.cut_over_ranks else self.last_layer.norms
        if self.normalizer == "none":
            return torch.zeros_like(norms)
        return prototype_log_normalizer(norms, self.bottleneck_dim, temperature)

    @property
    def is_attached(self) -> bool:
        """Whether a loss has set `output`; a copy (deepcopy, pickle) is not attached."""
        return self._released_output is not None

    def attach_output(self, output: str, *, prototypes_stay: bool = False) -> None:
        """Make the head return `output` for a loss that needs it; called by the `attach` of the losses in `compat`.

        `prototypes_stay` says that no wrapper frees them between the head's forward and its backward.
        Raises RuntimeError if the head already serves a loss that needs another output.
        """
        one_of("output", output, OUTPUTS)
        if self._released_output is None:
            self._released_output = self.output
        elif self.output != output:
            raise RuntimeError(
                f"this head already serves a loss as {self.output!r} and cannot serve another as {output!r}; "
                "give each loss its own head, or call `head.release()` when the first loss is no longer used"
            )
        self.output, self._prototypes_stay = output, prototypes_stay

    def release(self) -> None:
        """Undo `attach_output`: the head returns again what its constructor's `output` says."""
        if self._released_output is not None:
            self.output, self._released_output = self._released_output, None
            self._prototypes_stay = False

    def extra_repr(self) -> str:
        """What print(module) shows."""
        attached = " (attached)" if self.is_attached else ""
        return f"normalizer={self.normalizer!r}, temperature={self.temperature}, output={self.output!r}{attached}"

    def __getstate__(self) -> dict[str, Any]:
        # super(): leaves out what `module.compile()` made, which from a copy would go on calling the original.
        state: dict[str, Any] = super().__getstate__()
        output = self._released_output or self.output
        return state | {"output": output, "_released_output": None, "_prototypes_stay": False}


class _Itself(Function):
    """The tensor, in the same memory, as a result of its own, so that hooks that a wrapper sets on it do not stay on a
    parameter. A view would do, but in-place operations on a view drop such hooks, of which FSDP2 warns."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class VMFPrototypeHead(PrototypeHead):
    """DINO's projection head whose logits carry log C_p(kappa) of each prototype: the student's side of Eq. 6.

    Equals, with y = normalize(mlp(x)), w the weight-normalised prototypes and tau the temperature::

        logits = y @ w.T + tau * (log C_p(||w_k|| / tau) - log C_p(1 / tau))

    on DINO's own scale, so that the division by tau in every DINO loss yields <w, y>/tau + log C_p(kappa) up to a
    constant that no softmax sees. Where ||w_k|| = 1 for all k this is DINO's own head exactly. The constructor, the
    parameter names and their order are DINO's, so checkpoints, optimiser groups and EMA loops keep working.

    Args:
        in_dim: dimension of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: batch normalisation after the hidden layers of the MLP.
        norm_last_layer: freeze the prototype norms at 1 (L2-normalised prototypes). DINO's default is True; here it is
            False, because with frozen norms every kappa is 1/tau and the vMF normalisation changes nothing.
        nlayers: number of linear layers in the MLP.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2.
        mlp_bias: whether the linear layers of the MLP have biases.
        temperature: tau that the loss will divide by (0.1 for DINO's student). A plain float, not in the state dict.
        normalizer: "vmf" adds log C_p; "none" is plain DINO.
        output: "logits" as above (..., K); "scores" the raw <w, y> (..., K), for losses that own the temperature;
            "features" the unit vectors y (..., p); "prototypes" a `HeadOutput`.
        float32_scores: keep the product with the prototypes in float32 under CUDA autocast, which by default rounds its
            operands to the autocast dtype (an error that grows with ||w|| / tau). The result is float32 either way.

    Shape: input (..., in_dim), output as above, in float32 (float64 for a float64 head).

    Raises:
        ValueError, TypeError: an argument is out of its range; each message names it and what is allowed.

    Reference: Govindarajan et al., ICLR 2023, Eq. 6 and section 3.3.

    >>> import torch
    >>> from vmf_heads import VMFPrototypeHead
    >>> head = VMFPrototypeHead(384, 1000, hidden_dim=64)
    >>> head(torch.randn(8, 384)).shape
    torch.Size([8, 1000])
    """

    mlp: nn.Module
    last_layer: Prototypes

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        use_bn: bool = False,
        norm_last_layer: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        *,
        mlp_bias: bool = True,
        temperature: float = DEFAULT_TEMPERATURE,
        normalizer: str = "vmf",
        output: str = "logits",
        float32_scores: bool = False,
    ) -> None:
        at_least("out_dim", out_dim, 1)
        mlp = projection_mlp(
            in_dim,
            hidden_dim,
            bottleneck_dim,
            nlayers,
            norm=(lambda: nn.BatchNorm1d(hidden_dim)) if use_bn else None,
            hidden_bias=mlp_bias,
            out_bias=mlp_bias,
        )
        super().__init__(
            in_dim,
            mlp,
            Prototypes(bottleneck_dim, out_dim, freeze_norms=norm_last_layer),
            temperature=temperature,
            normalizer=normalizer,
            output=output,
            float32_scores=float32_scores,
        )


def find_heads(module: nn.Module) -> dict[str, PrototypeHead]:
    """All prototype heads inside `module`, by the path of each, through DDP, FSDP and compile wrappers.

    >>> from torch import nn
    >>> from vmf_heads.head import VMFPrototypeHead, find_heads
    >>> model = nn.Sequential(nn.Linear(8, 8), VMFPrototypeHead(8, 32, hidden_dim=8, bottleneck_dim=4))
    >>> list(find_heads(model))
    ['1']
    """
    return {path: m for path, m in module.named_modules() if isinstance(m, PrototypeHead)}


def find_head(module: nn.Module, name: str = "module") -> PrototypeHead:
    """The one prototype head inside `module`, through DDP, FSDP and compile wrappers; errors call the module `name`.

    Raises ValueError if there is none or more than one.
    """
    heads = find_heads(module)
    if len(heads) != 1:
        found = "none" if not heads else f"{len(heads)}: {', '.join(repr(path) for path in heads)}"
        raise ValueError(
            f"`{name}` (a {type(module).__name__}) must contain exactly one prototype head; it contains {found}"
        )
    return next(iter(heads.values()))


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Set the temperature of every prototype head inside `module`, through DDP, FSDP and compile wrappers.

    (Setting the attribute on a DDP wrapper sets it on the wrapper, and the head keeps its own.)

    Args:
        module: a model that contains at least one head.
        temperature: tau > 0.

    Raises:
        ValueError: `temperature` is not > 0, or `module` holds no head.

    >>> from torch import nn
    >>> from vmf_heads import VMFPrototypeHead, set_temperature
    >>> model = nn.Sequential(nn.Linear(8, 8), VMFPrototypeHead(8, 32, hidden_dim=8, bottleneck_dim=4))
    >>> set_temperature(model, 0.04)
    >>> model[1].temperature
    0.04
    """
    positive("temperature", temperature)
    heads = find_heads(module)
    if not heads:
        raise ValueError(f"`module` (a {type(module).__name__}) must contain at least one prototype head")
    for head in heads.values():
        head.temperature = temperature
