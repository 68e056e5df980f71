"""Runs `train_esvit` of microsoft/esvit in its folder: train_esvit.py CHECKOUT OUTPUT SETTINGS.

Next to those of the recorder, the setting "dense" asks for region matching, "mixup" for mixtures of images,
and "swap_heads" makes the mistake of attaching each term of the loss to the head of the other.
"""

import json
import sys
from functools import partialmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from upstream import equations, stand_ins
from upstream.missing import install
from upstream.recorder import Interrupted, Recorder

K, NCROPS, BATCH = 48, 4, 4


class Mixup:
    """In place of timm's in batch mode: image i with image B - 1 - i; remembers what it was given."""

    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def __init__(self, **options: Any) -> None: ...

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = 0.5 + 0.1 * (len(self.seen) % NCROPS)
        one_hot = torch.eye(len(labels))
        targets = share * one_hot + (1 - share) * one_hot.flip(0)
        self.seen.append((images, targets))
        return share * images + (1 - share) * images.flip(0), targets


class Reference:
    """The loss of one step and the centres after it, from the equations."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        inputs: Any,
        epoch: int,
        centers: list[Tensor],
        of_normalizer: float | None,
    ) -> tuple[Tensor, list[Tensor]]:
        crops, temperature = [crop.double() for crop in inputs[0][0][0]], (0.04, 0.07)[epoch]
        mixtures = [targets.double() for _, targets in Mixup.seen[-NCROPS:]]
        seen = [images.double() for images, _ in Mixup.seen[-NCROPS:]][:2] or crops[:2]
        tokens = [model_tokens(student, crop) for crop in crops]
        with torch.no_grad():
            of_teacher = [model_tokens(teacher, crop) for crop in seen]

        def targets(head: nn.Module, features: list[Tensor], center: Tensor) -> tuple[list[Tensor], Tensor]:
            unit = [F.normalize(head.mlp(y), dim=-1).detach() for y in features]
            layer = head.last_layer
            p = [equations.teacher(y, layer, temperature, center, of_normalizer=of_normalizer) for y in unit]
            return p, equations.next_center(torch.stack(unit), layer, temperature, center)

        def log_p(head: nn.Module, features: Tensor) -> Tensor:
            return equations.log_student(F.normalize(head.mlp(features), dim=-1), head.last_layer, 0.1)

        of_views, center = targets(teacher.head, [x[:, 0] for x in of_teacher], centers[0])
        log_views = [log_p(student.head, x[:, 0]) for x in tokens]
        if mixtures:
            terms = [
                -(mixtures[v] * (of_views[u] @ log_views[v].T)).sum(dim=1).mean()
                for u in range(2)
                for v in range(NCROPS)
                if u != v
            ]
            return torch.stack(terms).mean(), [center]
        views = equations.pairs_of_views(of_views, log_views)
        if not self.settings.get("dense"):
            return views, [center]
        of_regions, center_grid = targets(teacher.head_dense, [x[:, 1:] for x in of_teacher], centers[1])
        log_regions = [log_p(student.head_dense, x[:, 1:]) for x in tokens]
        terms = []
        for u in range(2):
            for v in range(NCROPS):
                if u != v:
                    ours, theirs = (F.normalize(x[:, 1:], dim=2) for x in (tokens[v], of_teacher[u]))
                    nearest = (ours @ theirs.mT).argmax(dim=2)
                    matched = torch.stack([p[n] for p, n in zip(of_regions[u], nearest, strict=True)])
                    terms.append(-(matched * log_regions[v]).sum(dim=2).mean())
        return (views + torch.stack(terms).mean()) / 2, [center, center_grid]


def model_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """[CLS] and patch tokens (B, 1 + N, D)."""
    return model.forward_feature_maps(images)


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    """Train; `settings` holds the command line, and what the recorder is to do."""
    stand_ins.install(crop_sizes=[32, 32, 16, 16], images=2 * BATCH)
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]  # too small a stand-in for all that EsViT imports of it
    install("timm", "einops", "yacs", "torch._six")
    sys.path.insert(0, checkout)
    import main_esvit
    import utils
    from models import vision_transformer

    from vmf_heads.compat import esvit

    def small(patch_size: int, use_dense_prediction: bool, **options: Any) -> nn.Module:
        return vision_transformer.VisionTransformer(
            img_size=[32],
            patch_size=patch_size,
            embed_dim=32,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            qkv_bias=True,
            use_dense_prediction=use_dense_prediction,
        )

    if settings.get("swap_heads"):
        attach = esvit.DDINOLoss.attach
        esvit.DDINOLoss.attach = partialmethod(attach, head="head_dense", head_dense="head")
    vision_transformer.vit_micro = small
    main_esvit.Mixup = Mixup
    main_esvit.build_dataloader = data_loader
    utils.clip_gradients = lambda model, clip: None  # main_esvit.py calls it with a name that is not defined
    options = f"--out_dim {K} --local_crops_number {NCROPS - 2} --batch_size_per_gpu {BATCH} --epochs 2 --patch_size 8"
    options += " --warmup_teacher_temp_epochs 1 --teacher_temp 0.07 --use_fp16 false --clip_grad 0 --warmup_epochs 0"
    options += f" --use_dense_prediction {settings.get('dense', False)} --use_mixup {settings.get('mixup', False)}"
    args = main_esvit.get_args_parser().parse_args([*options.split(), *settings["options"]])
    args.arch, args.output_dir = "vit_micro", str(Path(output).parent)
    zeros = torch.zeros(K, dtype=torch.float64)
    recorder = Recorder(main_esvit, utils, settings, Reference(settings), [zeros] * (2 if settings.get("dense") else 1))
    cancel = utils.cancel_gradients_last_layer

    def record_and_cancel(epoch: int, model: nn.Module, frozen: int) -> None:
        utils.clip_gradients(model, 0)
        cancel(epoch, model, frozen)

    utils.cancel_gradients_last_layer = record_and_cancel
    try:
        main_esvit.train_esvit(args)
    except Interrupted:
        print("stopped")
    recorder.result["reference_centers"] = recorder.centers
    torch.save(recorder.result, output)


def data_loader(args: Any) -> Any:
    from torchvision import datasets

    data = datasets.ImageFolder("")
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=1, rank=0, shuffle=False)
    return torch.utils.data.DataLoader(data, BATCH, sampler=sampler)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
