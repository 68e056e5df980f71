"""Runs `train_ibot` of bytedance/ibot in its folder: train_ibot.py CHECKOUT OUTPUT SETTINGS."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, stand_ins
from upstream.recorder import Interrupted, Recorder

K, GLOBAL, LOCAL = 48, 2, 2


def reference(
    student: nn.Module, teacher: nn.Module, inputs: Any, epoch: int, centers: list[Tensor], of_normalizer: float | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss of one step and the two centres after it, from the equations."""
    (global_args, options), (local_args, _) = inputs
    crops, masks = [crop.double() for crop in global_args[0]], options["mask"]
    local_crops = [crop.double() for crop in local_args[0]]
    temperature, temperature2 = ((0.04, 0.04), (0.05, 0.07))[epoch]

    def features(model: nn.Module, crop: Tensor, **options: Tensor) -> Tensor:
        return nn.functional.normalize(model.head.mlp(model.backbone(crop, **options)), dim=-1)

    with torch.no_grad():
        of_teacher = [features(teacher, crop) for crop in crops]  # (B, 1 + N, p)
        layer, layer2 = teacher.head.last_layer, teacher.head.last_layer2
        every_cls = torch.cat([y[:, 0] for y in of_teacher])
        every_patch = torch.cat([y[:, 1:] for y in of_teacher])
        next_centers = [
            equations.next_center(every_cls, layer, temperature, centers[0]),
            equations.next_center(every_patch, layer2, temperature2, centers[1]),
        ]
    head = student.head
    of_student = [features(student, crop, mask=mask) for crop, mask in zip(crops, masks, strict=True)]
    student.backbone.masked_im_modeling = False
    of_student_cls = [y[:, 0] for y in of_student] + [features(student, crop)[:, 0] for crop in local_crops]
    targets = [
        equations.teacher(y[:, 0], layer, temperature, centers[0], of_normalizer=of_normalizer) for y in of_teacher
    ]
    cls = equations.pairs_of_views(targets, [equations.log_student(y, head.last_layer, 0.1) for y in of_student_cls])

    patch = torch.zeros((), dtype=torch.float64)
    for of_teacher_view, of_student_view, mask in zip(of_teacher, of_student, masks, strict=True):
        target = equations.teacher(
            of_teacher_view[:, 1:], layer2, temperature2, centers[1], of_normalizer=of_normalizer
        )
        log_p = equations.log_student(of_student_view[:, 1:], head.last_layer2, 0.1)
        for image in range(len(mask)):
            masked = mask[image].flatten().nonzero().flatten().tolist()
            for token in masked:
                entropy = -(target[image, token] * log_p[image, token]).sum()
                patch = patch + entropy / len(masked) / len(mask) / GLOBAL
    return cls + patch, next_centers


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    """Train; `settings` holds the command line, and what the recorder is to do."""
    stand_ins.install(crop_sizes=[32] * GLOBAL + [16] * LOCAL, images=8)
    sys.path.insert(0, checkout)
    import main_ibot
    import models
    import utils

    models.vit_micro = partial(models.VisionTransformer, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True)
    options = f"--out_dim {K} --patch_out_dim {K} --patch_size 8 --local_crops_number {LOCAL} --batch_size_per_gpu 4"
    options += " --epochs 2 --warmup_epochs 0 --warmup_teacher_temp_epochs 1 --teacher_temp 0.05 --drop_path 0"
    options += " --use_fp16 false --num_workers 0"
    args = main_ibot.get_args_parser().parse_args([*options.split(), *settings["options"]])
    args.arch, args.output_dir = "vit_micro", str(Path(output).parent)
    patch_prototypes = K if args.shared_head or args.shared_head_teacher else args.patch_out_dim
    centers = [torch.zeros(n, dtype=torch.float64) for n in (args.out_dim, patch_prototypes)]
    recorder = Recorder(main_ibot, utils, settings, reference, centers)
    predictions = recorder.result["predictions"] = []
    gather = utils.concat_all_gather

    def recording_gather(tensor: Tensor) -> Tensor:
        """The script gathers what `acc` compares: the teacher's classes, the student's, and then the labels."""
        predictions.append(gather(tensor))
        return predictions[-1]

    utils.concat_all_gather = recording_gather
    try:
        main_ibot.train_ibot(args)
    except Interrupted:
        print("stopped")
    recorder.result["reference_centers"] = recorder.centers
    torch.save(recorder.result, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
