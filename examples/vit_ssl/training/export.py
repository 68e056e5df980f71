"""What a run leaves for others to go on with: the backbone, and the heads with their centre."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers.utils import logging as transformers_logging

from storage.checksums import write_checksums
from storage.whole_file import whole_folder
from training.run import load_run


def export(output: Path, push_to_hub: str | None = None) -> None:
    """Save what others go on with: the teacher's backbone of the last checkpoint, and both heads with their centre.

    On request the backbone, a transformers model, goes to the hub, with the teacher's head beside it.
    """
    transformers_logging.disable_progress_bar()
    run = load_run(output)
    backbone, heads = run.backbone, run.method.pretrained_heads()
    if run.recipe.method == "ibot":
        backbone.embeddings.mask_token = None  # which only pretraining needs
    with whole_folder(output / "backbone") as folder:
        backbone.save_pretrained(folder)
        write_checksums(folder)
    print(f"the teacher's backbone is in {output / 'backbone'}")
    for name, head in heads.items():
        with whole_folder(output / "heads" / name) as folder:
            head.save_pretrained(folder)
            write_checksums(folder)
    if push_to_hub is not None:
        backbone.push_to_hub(push_to_hub)
        if heads:
            dataclasses.replace(heads["teacher"], backbone=push_to_hub).push_to_hub(f"{push_to_hub}-head")
