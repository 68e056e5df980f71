"""Runs facebookresearch/msn's src/msn_train.py on small images: train_msn.py CHECKOUT OUTPUT SETTINGS.

Settings: "unit" keeps the prototypes at norm 1 and trains with SGD, "start_of" names the result whose weights to start
from, "norms" spreads the prototype norms, "compare" compares with float64, "sinkhorn" is MSN's use_sinkhorn, "epochs"
is the number of epochs; a checkpoint beside OUTPUT is resumed. Replaced are: the data, timers that need a GPU, and what
`stand_ins` lists.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstream import equations, stand_ins

K, P, TAU, IMAGES, FOCAL = 24, 16, 0.1, 4, 2


class Views(torch.utils.data.Dataset):
    """4 images: the target view, one random view, then the focal views."""

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(index)
        return [torch.randn(3, size, size, generator=generator) for size in (224, 224, *[96] * FOCAL)], 0


class Sampler:
    def set_epoch(self, epoch: int) -> None:
        torch.manual_seed(epoch)  # the order of the images, and drop path


def loader(**kwargs: Any) -> tuple[Any, Sampler]:
    return torch.utils.data.DataLoader(Views(), batch_size=kwargs["batch_size"], shuffle=True), Sampler()


def config(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    resume = (folder / "msn-latest.pth.tar").exists()
    return {
        "meta": {
            "model_name": "deit_tiny",
            "output_dim": P,
            "hidden_dim": 32,
            "load_checkpoint": resume,
            "read_checkpoint": None,
            "copy_data": False,
            "use_pred_head": False,
            "use_bn": False,
            "drop_path_rate": 0.0,
        },
        "criterion": {
            "me_max": True,
            "use_ent": True,
            "ent_weight": 0.1,
            "use_sinkhorn": bool(settings.get("sinkhorn")),
            "num_proto": K,
            "batch_size": 2,
            "temperature": TAU,
            "start_sharpen": 0.25,
            "final_sharpen": 0.2,
        },
        "data": {
            "label_smoothing": 0.0,
            "color_jitter_strength": 0.5,
            "root_path": "",
            "image_folder": "",
            "patch_drop": 0.0,
            "rand_size": 224,
            "rand_views": 1,
            "focal_views": FOCAL,
            "focal_size": 96,
        },
        "optimization": {
            "clip_grad": 3.0,
            "weight_decay": 0.04,
            "final_weight_decay": 0.4,
            "epochs": 2,
            "warmup": 0,
            "start_lr": 2e-4,
            "lr": 1e-3,
            "final_lr": 1e-6,
        },
        "logging": {"folder": str(folder), "write_tag": "msn"},
    }


def reference(anchors: Tensor, targets: Tensor, prototypes: Tensor, t: float, sinkhorn: bool) -> Tensor:
    """MSN's total loss with log C_p in the predictions, in probabilities and in float64."""
    log_c = equations._LogNormalizer.apply(prototypes.norm(dim=1) / TAU, P)

    def predictions(views: Tensor) -> Tensor:
        return (nn.functional.normalize(views) @ prototypes.T / TAU + log_c).softmax(dim=1)

    with torch.no_grad():
        sharp = predictions(targets) ** (1 / t)
        sharp = sharp / sharp.sum(dim=1, keepdim=True)
        for _ in range(3 * sinkhorn):
            sharp = sharp / sharp.sum(dim=0)
            sharp = sharp / sharp.sum(dim=1, keepdim=True)
        sharp = sharp.repeat(1 + FOCAL, 1)
    p = predictions(anchors)
    me_max = math.log(K) - torch.special.entr(p.mean(dim=0)).sum()
    return -(sharp * p.log()).sum(dim=1).mean() + me_max + 0.1 * torch.special.entr(p).sum(dim=1).mean()


class Recorder:
    """Stands before the loss that `init_msn_loss` makes."""

    def __init__(self, init: Any, settings: dict[str, Any]) -> None:
        self.init, self.settings = init, settings
        self.result: dict[str, Any] = {"losses": [], "errors": []}

    def __call__(self, **kwargs: Any) -> Any:
        return partial(self.loss, self.init(**kwargs))

    def loss(self, loss: Any, **kwargs: Any) -> Any:
        anchors, prototypes = kwargs["anchor_views"], kwargs["prototypes"]
        first = "prototypes" not in self.result
        if first and self.settings.get("norms"):
            prototypes.data = nn.functional.normalize(prototypes.data) * torch.linspace(0.4, 4, K)[:, None]
        if self.settings.get("unit"):
            prototypes.data = nn.functional.normalize(prototypes.data)
        if first and self.settings.get("unit"):  # no step along the norms, which MSN's loss does not see
            prototypes.register_hook(lambda g: g - (g * prototypes).sum(dim=1, keepdim=True) * prototypes.detach())
        result = loss(**kwargs)
        total = result[0] + result[1] + 0.1 * result[2]
        self.result["losses"].append(total.detach().clone())
        if self.settings.get("compare"):
            got = torch.autograd.grad(total, [anchors, prototypes], retain_graph=True)
            exact = [x.detach().double().requires_grad_() for x in (anchors, prototypes)]
            want = reference(exact[0], kwargs["target_views"].double(), exact[1], kwargs["T"], kwargs["use_sinkhorn"])
            differences = [
                float((a - b).norm() / b.norm()) for a, b in zip(got, torch.autograd.grad(want, exact), strict=True)
            ]
            self.result["errors"].append([float(((total - want) / want).abs()), *differences])
        self.result["prototypes"] = prototypes
        return result


class Stop(Exception):
    """Raised at the beginning of the epoch at which the training is to stop."""


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    stand_ins.install(crop_sizes=[], images=0)
    sys.path.insert(0, checkout)
    from src import msn_train

    folder = Path(output).parent
    recorder = Recorder(msn_train.init_msn_loss, settings)
    msn_train.init_msn_loss = recorder
    msn_train.gpu_timer = lambda closure: (closure(), 0.0)
    msn_train.make_transforms = lambda **kwargs: None
    msn_train.init_data = loader
    if settings.get("unit"):
        torch.optim.AdamW = partial(torch.optim.SGD, lr=1.0)
    encoders: list[nn.Module] = []
    init_model, init_opt = msn_train.init_model, msn_train.init_opt

    def model(**kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        encoders.append(init_model(**kwargs))
        return encoders[0]

    def optimizer(**kwargs: Any) -> Any:
        result = init_opt(**kwargs)
        recorder.result["groups"] = [[tuple(p.shape) for p in group["params"]] for group in result[1].param_groups]
        return result

    def epoch(self: Sampler, number: int) -> None:
        if number == settings.get("stop_at"):
            raise Stop
        torch.manual_seed(number)

    Sampler.set_epoch = epoch
    msn_train.init_model, msn_train.init_opt = model, optimizer
    try:
        msn_train.main(config(folder, settings))
    except Stop:
        print("stopped")
    saved = torch.load(folder / "msn-latest.pth.tar")
    recorder.result |= {
        "student": saved["encoder"],
        "teacher": saved["target_encoder"],
        "state_of_loss": {"prototypes": saved["prototypes"]},
    }
    del recorder.result["prototypes"]
    torch.save(recorder.result, output)


if __name__ == "__main__":
    main(*sys.argv[1:3], json.loads(sys.argv[3]))
