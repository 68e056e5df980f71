"""Runs `train_dino` of facebookresearch/dino in its folder: train_dino.py CHECKOUT OUTPUT SETTINGS."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, stand_ins
from upstream.recorder import Interrupted, Recorder

K, NCROPS = 48, 4


def reference(
    student: nn.Module, teacher: nn.Module, inputs: Any, epoch: int, centers: list[Tensor], of_normalizer: float | None
) -> tuple[Tensor, list[Tensor]]:
    """The loss of one step and the centre after it, from the equations."""
    crops = [crop.double() for crop in inputs[0][0][0]]
    temperature = (0.04, 0.07)[epoch]

    def features(model: nn.Module, crop: Tensor) -> Tensor:
        return nn.functional.normalize(model.head.mlp(model.backbone(crop)), dim=1)

    with torch.no_grad():
        of_teacher = [features(teacher, crop) for crop in crops[:2]]
        layer = teacher.head.last_layer
        targets = [
            equations.teacher(y, layer, temperature, centers[0], of_normalizer=of_normalizer) for y in of_teacher
        ]
        center = equations.next_center(torch.cat(of_teacher), layer, temperature, centers[0])
    log_p = [equations.log_student(features(student, crop), student.head.last_layer, 0.1) for crop in crops]
    return equations.pairs_of_views(targets, log_p), [center]


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    """Train; `settings` holds the command line, and what the recorder is to do."""
    stand_ins.install(crop_sizes=[32, 32, 16, 16], images=8)
    sys.path.insert(0, checkout)
    import main_dino
    import utils
    import vision_transformer

    vision_transformer.vit_micro = partial(
        vision_transformer.VisionTransformer, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True
    )
    options = f"--out_dim {K} --local_crops_number {NCROPS - 2} --batch_size_per_gpu 4 --epochs 2 --warmup_epochs 0"
    options += " --warmup_teacher_temp_epochs 1 --teacher_temp 0.07 --drop_path_rate 0 --use_fp16 false --num_workers 0"
    args = main_dino.get_args_parser().parse_args([*options.split(), *settings["options"]])
    args.arch, args.output_dir = "vit_micro", str(Path(output).parent)
    recorder = Recorder(main_dino, utils, settings, reference, [torch.zeros(K, dtype=torch.float64)])
    try:
        main_dino.train_dino(args)
    except Interrupted:
        print("stopped")
    recorder.result["reference_centers"] = recorder.centers
    torch.save(recorder.result, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
