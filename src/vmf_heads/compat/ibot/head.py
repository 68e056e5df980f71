"""The head of iBOT: one MLP, two sets of prototypes, of which the second may be the first."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..._checks import at_least, one_of
from ...head import PrototypeHead
from ...mlp import projection_mlp
from ...prototypes import Prototypes

NORMS = {"bn": nn.BatchNorm1d, "syncbn": nn.SyncBatchNorm, "ln": nn.LayerNorm}
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class iBOTHead(PrototypeHead):
    """iBOT's projection head for [CLS] and patch tokens with log C_p(kappa) in both logits (appendix A.5).

    The first token of a sequence meets the prototypes of `last_layer`, all others those of `last_layer2`; each logit
    is that of `VMFPrototypeHead`. Where every prototype has norm 1 this is iBOT's own head exactly. Parameter names and
    their order are iBOT's.

    Args:
        in_dim: dimension of the backbone's features.
        out_dim: number of prototypes K of the [CLS] token.
        patch_out_dim: number of prototypes K2 of the patch tokens; ignored with `shared_head`.
        norm: None, "bn", "syncbn" or "ln" after the hidden layers of the MLP; as in iBOT one module serves all of them.
        act: "gelu" or "relu".
        last_norm: must be None. A normalisation of the logits would undo what log C_p means.
        nlayers: number of linear layers in the MLP.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension p of the sphere's space, >= 2. iBOT's 0 (no bottleneck) is refused: without it there
            is no sphere.
        norm_last_layer: freeze the norms of both sets of prototypes at 1. iBOT's default is True; here it is False.
        shared_head: `last_layer2` *is* `last_layer`. (iBOT shares the teacher's by default, not the student's.)
        options: temperature, normalizer, output and float32_scores of `VMFPrototypeHead`, for both sets of prototypes.

    Shape: (B, in_dim) -> (B, K); (B, 1 + N, in_dim) -> ((B, K), (B, N, K2)).

    Raises:
        ValueError, TypeError: an argument is out of its range; each message names it and what is allowed.

    Reference: Govindarajan et al., ICLR 2023, appendix A.5; Zhou et al., ICLR 2022.

    >>> import torch
    >>> from vmf_heads.compat.ibot import iBOTHead
    >>> head = iBOTHead(16, 32, patch_out_dim=24, hidden_dim=16, bottleneck_dim=8)
    >>> cls, patches = head(torch.randn(5, 1 + 9, 16))
    >>> cls.shape, patches.shape
    (torch.Size([5, 32]), torch.Size([5, 9, 24]))
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        patch_out_dim: int = 8192,
        norm: str | None = None,
        act: str = "gelu",
        last_norm: str | None = None,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        norm_last_layer: bool = False,
        shared_head: bool = False,
        **options: Any,
    ) -> None:
        if last_norm is not None:
            raise ValueError(
                f"`last_norm` (={last_norm!r}) must be None: logits that are normalised over the batch are no longer "
                "those of a von Mises-Fisher mixture"
            )
        if norm is not None:
            one_of("norm", norm, NORMS)
        one_of("act", act, ACTIVATIONS)
        at_least("out_dim", out_dim, 1)
        # As in iBOT one module serves after every hidden layer.
        shared_norm = None if norm is None else NORMS[norm](hidden_dim)
        shared_act = ACTIVATIONS[act]()
        mlp = projection_mlp(
            in_dim,
            hidden_dim,
            bottleneck_dim,
            nlayers,
            norm=None if shared_norm is None else lambda: shared_norm,
            act=lambda: shared_act,
        )
        prototypes = Prototypes(bottleneck_dim, out_dim, freeze_norms=norm_last_layer)
        super().__init__(in_dim, mlp, prototypes, **options)
        if shared_head:
            self.last_layer2 = prototypes
        else:
            of_patches = at_least("patch_out_dim", patch_out_dim, 1)
            self.last_layer2 = Prototypes(bottleneck_dim, of_patches, freeze_norms=norm_last_layer)
        self.num_patch_prototypes = self.last_layer2.num_prototypes

    def forward(self, x: Tensor, temperature: float | None = None) -> Any:
        """Logits of [CLS] features (B, in_dim), or the pair of [CLS] and patch logits of sequences (B, 1 + N, in_dim).

        With another `output` than "logits" each is what `VMFPrototypeHead` returns for it.
        """
        if x.dim() == 2:
            return super().forward(x, temperature)
        if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != self.in_dim:
            raise ValueError(f"`x` (of shape {tuple(x.shape)}) must be (B, D) or (B, 1 + N, D) with D={self.in_dim}")
        features = self.features(x)
        return (
            self.read(self.last_layer, features[:, 0], temperature),
            self.read(self.last_layer2, features[:, 1:], temperature),
        )
