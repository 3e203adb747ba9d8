"""Evaluation of pictures: the report's tables 1, 2, 3 and 6, today's benchmarks, and where a model loses quality."""

from .data import Samples, open_captions, open_edits, open_pictures
from .drawing import Drawer
from .evaluate import Evaluation, evaluate
from .lpips import load_lpips, lpips_distance
from .pictures import psnr
from .reconstruction import Reconstruction

__all__ = [
    "Drawer",
    "Evaluation",
    "Reconstruction",
    "Samples",
    "evaluate",
    "load_lpips",
    "lpips_distance",
    "open_captions",
    "open_edits",
    "open_pictures",
    "psnr",
]
