"""The devices the tests of the library run on: the same parametrised tests, also on a GPU where there is one."""

import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
