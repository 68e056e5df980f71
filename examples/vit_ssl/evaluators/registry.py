"""Every protocol by its name on the command line."""

from __future__ import annotations

from typing import Any, NamedTuple

from evaluators.dense.segmentation.segmentation import SegmentationOptions, segmentation
from evaluators.dense.video.segmentation import VideoOptions, video_segmentation
from evaluators.few_shot.few_shot import FewShotOptions, fewshot
from evaluators.finetune.finetune import finetune
from evaluators.finetune.options import FinetuneOptions, SmallFinetuneOptions
from evaluators.knn import KNNOptions, knn
from evaluators.linear.attentive import AttentiveOptions, attentive
from evaluators.linear.linear import LinearOptions, linear
from evaluators.linear.robustness import RobustnessOptions, robustness
from evaluators.ood.ood import OodOptions, ood
from evaluators.protocol import Evaluator
from evaluators.prototypes.clustering import ClusteringOptions, clustering
from evaluators.prototypes.prototypes import PrototypesOptions, prototypes
from evaluators.retrieval.retrieval import RetrievalOptions, retrieval
from evaluators.transfer import TransferOptions, transfer


class Protocol(NamedTuple):
    """A protocol as evaluate.py runs it."""

    options: type[Any]
    evaluate: Evaluator
    split: str | None = None  # what it measures on, where that is not --split
    features: bool = True  # it begins with the features of that split, which are extracted before the clock starts
    own_data: bool = False  # --data is a folder of its own kind, which `all` gets as --NAME-data
    left_out: str = ""  # why `all` does not run it
    rows_as: str = ""  # what results.jsonl calls it, where that is another name


LONG = "it trains the whole network"
TOKENS = "it keeps every patch token, which takes space and time"

# `all` runs them in this order, which nothing else relies on.
PROTOCOLS: dict[str, Protocol] = {
    "retrieval": Protocol(RetrievalOptions, retrieval, features=False, own_data=True),
    "video": Protocol(VideoOptions, video_segmentation, features=False, own_data=True),
    "segmentation": Protocol(SegmentationOptions, segmentation, features=False, own_data=True),
    "transfer": Protocol(TransferOptions, transfer, left_out="it is about other data sets, each one command"),
    "finetune": Protocol(FinetuneOptions, finetune, features=False, left_out=LONG),
    "finetune-small": Protocol(SmallFinetuneOptions, finetune, features=False, left_out=LONG, rows_as="finetune"),
    "knn": Protocol(KNNOptions, knn),
    "linear": Protocol(LinearOptions, linear),
    "fewshot": Protocol(FewShotOptions, fewshot),
    "prototypes": Protocol(PrototypesOptions, prototypes, split="train", features=False),
    "ood": Protocol(OodOptions, ood),
    "clustering": Protocol(ClusteringOptions, clustering),
    "robustness": Protocol(RobustnessOptions, robustness),
    "attentive": Protocol(AttentiveOptions, attentive, features=False, left_out=TOKENS),
}
