"""Evaluation of pictures: the report's tables 1, 2, 3 and 6, today's benchmarks, and where a model loses quality."""

from .benchmarks import BENCHMARKS, BenchmarkPictures, open_benchmark
from .data import Samples, open_captions, open_edits, open_pictures
from .drawing import Drawer
from .editing import Editing
from .encoders import AlexNetEncoder, frechet_distance, load_clip, load_dino, load_inception
from .evaluate import Evaluation, evaluate
from .features import FeatureErrors
from .generation import Generation
from .lpips import load_lpips, lpips_distance
from .pictures import psnr
from .reconstruction import Reconstruction

__all__ = [
    "BENCHMARKS",
    "AlexNetEncoder",
    "BenchmarkPictures",
    "Drawer",
    "Editing",
    "Evaluation",
    "FeatureErrors",
    "Generation",
    "Reconstruction",
    "Samples",
    "evaluate",
    "frechet_distance",
    "load_clip",
    "load_dino",
    "load_inception",
    "load_lpips",
    "lpips_distance",
    "open_benchmark",
    "open_captions",
    "open_edits",
    "open_pictures",
    "psnr",
]
