"""The prototype head of DINO, with the normalising constants that make it a von Mises-Fisher mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import at_least, one_of, positive
from ._matmul import at_least_float32
from ._prototypes import Prototypes, prototype_log_normalizer, weight_norm

__all__ = ["HeadOutput", "VMFPrototypeHead", "set_temperature"]

NORMALIZERS = ("vmf", "none")
OUTPUTS = ("logits", "scores", "features", "prototypes")


class HeadOutput(NamedTuple):
    """What a head with output="prototypes" returns: all that `prototype_cross_entropy` needs, out of one forward.

    Because the prototypes leave the model through its forward, their gradients are right under
    DistributedDataParallel(find_unused_parameters=True) and FSDP2, too, which do not see a read from outside. They
    leave it as directions and scales, w_k = scale_k v_k / ||v_k||, so that w itself need never be made.
    """

    features: Tensor  # y (..., p), unit vectors
    directions: Tensor  # v (K, p), of any length
    scales: Tensor  # (K,), of either sign

    @property
    def prototypes(self) -> Tensor:
        """w (K, p), made anew at every access."""
        return weight_norm(self.directions, self.scales)

    @property
    def norms(self) -> Tensor:
        """||w_k|| (K,)."""
        return self.scales.abs()


class VMFPrototypeHead(nn.Module):
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
        output: "logits" as above (..., K); "scores" the raw <w, y> (..., K), for losses that own the temperature, with
            the norms in `last_prototype_norms`; "features" the unit vectors y (..., p); "prototypes" a `HeadOutput`.
        logits_dtype: torch.float32 keeps the product with the prototypes exact under CUDA autocast, which by default
            rounds its operands to the autocast dtype (an error that grows with ||w|| / tau). The result is
            float32 either way.

    Shape: input (..., in_dim), output as above, in float32 (float64 for a float64 head).

    Raises:
        ValueError, TypeError: an argument is out of its range; each message names it and what is allowed.

    Source: Govindarajan et al., ICLR 2023, Eq. 6 and section 3.3.

    >>> import torch
    >>> from vmf_heads import VMFPrototypeHead
    >>> head = VMFPrototypeHead(384, 1000, hidden_dim=64)
    >>> head(torch.randn(8, 384)).shape
    torch.Size([8, 1000])
    """

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
        temperature: float = 0.1,
        normalizer: str = "vmf",
        output: str = "logits",
        logits_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        at_least("in_dim", in_dim, 1)
        at_least("out_dim", out_dim, 1)
        at_least("nlayers", nlayers, 1)
        at_least("hidden_dim", hidden_dim, 1)
        at_least("bottleneck_dim", bottleneck_dim, 2)
        if logits_dtype not in (None, torch.float32):
            raise ValueError(f"`logits_dtype` (={logits_dtype}) must be None or torch.float32")
        self.in_dim = in_dim
        self.bottleneck_dim = bottleneck_dim
        self.num_prototypes = out_dim
        self.temperature = positive("temperature", temperature)
        self.normalizer = one_of("normalizer", normalizer, NORMALIZERS)
        self.output = one_of("output", output, OUTPUTS)
        self.logits_dtype = logits_dtype
        self.last_prototype_norms: Tensor | None = None
        self._attached_output: str | None = None

        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, nlayers, use_bn, mlp_bias)
        self.mlp.apply(_init_linear)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        if norm_last_layer:
            self.last_layer.weight_g.requires_grad = False

    def forward(self, x: Tensor, temperature: float | None = None) -> Tensor | HeadOutput:
        """What `output` says, of backbone features `x` (..., in_dim); `temperature` overrides the head's own."""
        if x.shape[-1:] != (self.in_dim,):
            raise ValueError(f"`x` (of shape {tuple(x.shape)}) must end in `in_dim` (={self.in_dim})")
        result = self._of_features(self.last_layer, self._features(x), temperature)
        if (self._attached_output or self.output) == "scores":
            # A copy: under FSDP the parameter's storage is freed after this forward.
            self.last_prototype_norms = self.last_layer.norms.detach().clone()
        return result

    def _of_features(self, layer: Prototypes, features: Tensor, temperature: float | None) -> Tensor | HeadOutput:
        """What `output` says, of unit features (..., p) and the prototypes of `layer`."""
        output = self._attached_output or self.output
        if output == "features":
            return features
        if output == "prototypes":
            # Copies: under FSDP the parameters' storage is freed after this forward.
            return HeadOutput(features, layer.weight_v.clone(), layer.scales.clone())
        scores = layer(features, exact=self.logits_dtype is not None)
        if output == "scores" or self.normalizer == "none":
            return scores
        tau = self.temperature if temperature is None else positive("temperature", temperature)
        return scores + tau * self.log_normalizer(tau, layer.norms)

    def log_normalizer(self, temperature: float, norms: Tensor | None = None) -> Tensor:
        """log C_p(||w_k|| / temperature) - log C_p(1 / temperature) (K,), zeros for normalizer="none".

        `norms` (K,), ||w_k|| as a forward saw them, replaces the parameters', which FSDP shards outside of it.
        """
        norms = self.last_layer.norms if norms is None else norms
        if self.normalizer == "none":
            return torch.zeros_like(norms)
        return prototype_log_normalizer(norms, self.bottleneck_dim, temperature)

    def attach_output(self, output: str) -> None:
        """Make the head return `output` for a loss that needs it; called by the `attach` of the losses in `compat`.

        A copy (deepcopy, pickle) is not attached. Raises RuntimeError if another loss needs another output.
        """
        one_of("output", output, OUTPUTS)
        if self._attached_output not in (None, output):
            raise RuntimeError(
                f"this head already serves a loss as {self._attached_output!r} and cannot serve another as {output!r}; "
                "give each loss its own head, or call `head.release()` when the first loss is no longer used"
            )
        self._attached_output = output

    def release(self) -> None:
        """Undo `attach_output`: the head returns what its constructor's `output` says."""
        self._attached_output = None
        self.last_prototype_norms = None

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"normalizer={self.normalizer!r}, temperature={self.temperature}"

    def __getstate__(self) -> dict[str, Any]:
        # super(): leaves out what `module.compile()` made, which from a copy would go on calling the original.
        return super().__getstate__() | {"_attached_output": None, "last_prototype_norms": None}

    def _features(self, x: Tensor) -> Tensor:
        y = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1]) if x.dim() > 2 else self.mlp(x)
        # float32: in half precision the squares under- or overflow, which is where DINO's NaNs were traced to.
        return F.normalize(at_least_float32(y), dim=-1)


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Set the temperature of every `VMFPrototypeHead` inside `module`, through DDP and compile wrappers.

    (Setting the attribute on a DDP wrapper sets it on the wrapper, and the head keeps its own.)

    Raises ValueError if `temperature` is not > 0 or `module` holds no head.

    >>> from vmf_heads import VMFPrototypeHead, set_temperature
    >>> model = nn.Sequential(nn.Linear(8, 8), VMFPrototypeHead(8, 32, hidden_dim=8, bottleneck_dim=4))
    >>> set_temperature(model, 0.04)
    >>> model[1].temperature
    0.04
    """
    positive("temperature", temperature)
    heads = [m for m in module.modules() if isinstance(m, VMFPrototypeHead)]
    if not heads:
        raise ValueError(f"`module` (a {type(module).__name__}) must contain at least one VMFPrototypeHead")
    for head in heads:
        head.temperature = temperature


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, nlayers: int, use_bn: bool, bias: bool) -> nn.Module:
    if nlayers == 1:
        return nn.Linear(in_dim, out_dim, bias=bias)
    layers: list[nn.Module] = []
    for width in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width, hidden_dim, bias=bias))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    layers.append(nn.Linear(hidden_dim, out_dim, bias=bias))
    return nn.Sequential(*layers)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
