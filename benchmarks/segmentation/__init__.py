"""How well patch features of networks pretrained on the photographs tell which photograph a pixel is from."""

from benchmarks.segmentation.run import rendered, segmentation
from benchmarks.segmentation.scenes import photo_scenes

__all__ = ["photo_scenes", "rendered", "segmentation"]
