"""The vision transformers that DINO, iBOT, MSN, DINOv2 and DINOv3 have published, with the shapes of all weights."""

from dataclasses import dataclass, field
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """One size of one code base, and how that code builds it: `factory(**options)` in `module`."""

    code: str
    module: str
    factory: str
    dim: int
    depth: int
    heads: int
    patch: int
    options: dict[str, Any] = field(default_factory=dict)
    hidden: int = 4  # of the MLP, in widths
    gated: bool = False
    registers: int = 0
    qkv_bias: bool = True
    local_norm: bool = False

    @property
    def name(self) -> str:
        return "-".join([self.code, self.factory, *map(str, self.options.values())])

    def shapes(self) -> Shapes:
        """What a published file holds."""
        shapes: Shapes = {"cls_token": (1, 1, self.dim)}
        layers: dict[str, tuple[int, ...]] = {
            "patch_embed.proj": (self.dim, 3, self.patch, self.patch),
            "norm": (self.dim,),
        }
        for block in range(self.depth):
            layers |= {f"blocks.{block}.{name}": shape for name, shape in self._layers_of_a_block().items()}
        if self.code in ("dino", "ibot", "msn", "dinov2"):
            side = (518 if self.code == "dinov2" else 224) // self.patch
            shapes["pos_embed"] = (1, 1 + side**2, self.dim)
        if self.code in ("dinov2", "dinov3"):
            shapes["mask_token"] = (1, self.dim)
            shapes |= {f"blocks.{b}.ls{number}.gamma": (self.dim,) for b in range(self.depth) for number in (1, 2)}
        if self.code == "dinov3":
            shapes["rope_embed.periods"] = (self.dim // self.heads // 4,)
            layers |= {"local_cls_norm": (self.dim,)} if self.local_norm else {}
            if self.qkv_bias:
                shapes |= {f"blocks.{block}.attn.qkv.bias_mask": (3 * self.dim,) for block in range(self.depth)}
        if self.registers:
            shapes[{"dinov2": "register_tokens", "dinov3": "storage_tokens"}[self.code]] = (1, self.registers, self.dim)
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        if not self.qkv_bias:
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith("qkv.bias")}
        return shapes

    def _layers_of_a_block(self) -> dict[str, tuple[int, ...]]:
        dim, hidden = self.dim, self.hidden * self.dim
        layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "norm2": (dim,)}
        if not self.gated:
            return layers | {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        hidden = hidden * 2 // 3  # so that three matrices have as many numbers as two
        if self.code == "dinov2":
            return layers | {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        return layers | {"mlp.w1": (hidden, dim), "mlp.w2": (hidden, dim), "mlp.w3": (dim, hidden)}


S, B, L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
V2, V3 = ("dinov2", "dinov2.hub.backbones"), ("dinov3", "dinov3.hub.backbones")
PUBLISHED = (
    *(
        Published("dino", "vision_transformer", factory, *size, patch, {"patch_size": patch})
        for factory, size in (("vit_small", S), ("vit_base", B))
        for patch in (16, 8)
    ),
    *(
        Published("ibot", "models.vision_transformer", factory, *size, 16, {"patch_size": 16})
        for factory, size in (("vit_small", S), ("vit_base", B), ("vit_large", L))
    ),
    *(
        Published("msn", "src.deit", factory, *size, patch)
        for factory, size, patch in (
            ("deit_small", S, 16),
            ("deit_base", B, 16),
            ("deit_base_p8", B, 8),  # in its code, not among its files
            ("deit_base_p4", B, 4),
            ("deit_large", L, 16),
            ("deit_large_p7", L, 7),
        )
    ),
    *(
        Published(*V2, f"dinov2_{name}14{suffix}", *size, 14, registers=registers, gated=name == "vitg")
        for name, size in (("vits", S), ("vitb", B), ("vitl", L), ("vitg", (1536, 40, 24)))
        for suffix, registers in (("", 0), ("_reg", 4))
    ),
    Published(*V3, "dinov3_vits16", *S, 16, registers=4),
    Published(*V3, "dinov3_vits16plus", *S, 16, registers=4, gated=True, hidden=6),
    Published(*V3, "dinov3_vitb16", *B, 16, registers=4),
    Published(*V3, "dinov3_vitl16", *L, 16, registers=4),
    Published(*V3, "dinov3_vitl16", *L, 16, {"weights": "SAT493M"}, registers=4, local_norm=True),
    Published(*V3, "dinov3_vitl16plus", *L, 16, registers=4, gated=True, hidden=6),
    Published(*V3, "dinov3_vith16plus", 1280, 32, 20, 16, registers=4, gated=True, hidden=6),
    Published(
        *V3, "dinov3_vit7b16", 4096, 40, 32, 16, registers=4, gated=True, hidden=3, qkv_bias=False, local_norm=True
    ),
)
