"""Networks that judge pictures: CLIP, DINO, and the features of FID. Loaded through the libraries that publish them.

Every encoder gives (n, d) float32 on the CPU. None of their weights is in a package registry: they come from the Hub
or its cache, or from a file that is named.
"""

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from transformers_puma.open_clip_vision import needs_quick_gelu

from .lpips import check_size
from .pictures import to_tensor

CLIP = "ViT-B-32/openai"
DINO = "facebook/dino-vits16"
# What the libraries raise when weights cannot be had: of the Hub's client and urllib, of torch, of open_clip.
UNAVAILABLE = (OSError, RuntimeError, ValueError, UnpicklingError)


class ClipEncoder:
    """Pictures and texts in one space, as unit vectors, by an open_clip model.

    name: for the results.
    preprocess: PIL picture -> (3, height, width).
    tokenizer: texts -> (n, length) ids.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        tokenizer: Callable[[list[str]], torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.name, self.model = name, model.eval().to(device)
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.device = torch.device(device)

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        batch = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
        return F.normalize(self.model.encode_image(batch).float(), dim=-1).cpu()

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts).to(self.device)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1).cpu()


class DinoEncoder:
    """Unit vectors of a transformers vision transformer's class token.

    name: for the results.
    processor: the image processor that was saved with it.
    """

    def __init__(self, name: str, model: nn.Module, processor: Callable, device: torch.device | str = "cpu") -> None:
        self.name, self.model = name, model.eval().to(device)
        self.processor, self.device = processor, torch.device(device)

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixel_values = self.processor(pictures, return_tensors="pt")["pixel_values"].to(self.device)
        return F.normalize(self.model(pixel_values).last_hidden_state[:, 0].float(), dim=-1).cpu()


class InceptionEncoder:
    """The 2048 pooled features of FID's Inception, torch-fidelity's conversion of the original network."""

    name = "fid"

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu") -> None:
        self.network, self.device = network.eval().to(device), torch.device(device)

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixels = (to_tensor(pictures) * 255).round().to(torch.uint8)
        return self.network(pixels.to(self.device))[0].float().cpu()


class AlexNetEncoder:
    """The last features of LPIPS' AlexNet, averaged over the picture: (n, 256).

    For a Fréchet distance where Inception cannot be had. It ranks models on the same data; its values are no FID.
    """

    name = "frechet_alexnet"

    def __init__(self, lpips: nn.Module) -> None:
        self.lpips = lpips

    @torch.no_grad()
    def pictures(self, pictures: list[Image.Image]) -> torch.Tensor:
        pixels = (2 * to_tensor(pictures) - 1).to(next(self.lpips.parameters()).device)
        check_size(pixels)
        return self.lpips.net(self.lpips.scaling_layer(pixels))[-1].mean((2, 3)).cpu()


FrechetEncoder = InceptionEncoder | AlexNetEncoder


def load_clip(name: str = CLIP, device: torch.device | str = "cpu") -> ClipEncoder:
    """An open_clip model.

    Args:
        name: `ARCH/TAG` with a tag that open_clip knows, or `ARCH/FILE` with weights on disk. Weights of OpenAI's that
            come as a file need an architecture such as `ViT-B-32-quickgelu`; with a tag open_clip knows that itself.

    Raises:
        ValueError: an architecture or tag that open_clip does not know.
        OSError: weights that are not there.
    """
    import open_clip

    arch, _, tag = name.partition("/")
    quick_gelu = needs_quick_gelu(arch, tag)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=tag, force_quick_gelu=quick_gelu)
    except UNAVAILABLE as error:
        raise OSError(
            f"the CLIP weights {name} could not be loaded ({_reason(error)}): without a network, give a file as "
            "`name`, ARCH/FILE"
        ) from error
    return ClipEncoder(name, model, preprocess, open_clip.get_tokenizer(arch), device)


def load_dino(name: str = DINO, device: torch.device | str = "cpu") -> DinoEncoder:
    """A DINO of transformers: a name on the Hub, or a folder. Raises `OSError` if it is not there."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        # DINO was trained and is measured on PIL's resize, from which torchvision's differs in the fourth decimal.
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")
        return DinoEncoder(name, AutoModel.from_pretrained(name), processor, device)
    except UNAVAILABLE as error:
        raise OSError(
            f"the DINO {name} could not be loaded ({_reason(error)}): without a network, give its folder as `name`"
        ) from error


def load_inception(weights: str | Path | None = None, device: torch.device | str = "cpu") -> InceptionEncoder:
    """FID's network.

    Args:
        weights: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; by default it is downloaded from its
            releases once.

    Raises:
        OSError: no such file, or no download.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"no such file with Inception weights: {weights}")
    file = None if weights is None else str(weights)
    try:
        if file is not None:
            # torch-fidelity unpickles whatever it is given; this raises unless it is tensors alone.
            torch.load(file, map_location="meta", weights_only=True)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file)
    except UNAVAILABLE as error:
        raise OSError(
            f"FID's Inception could not be loaded ({_reason(error)}): without a network, give torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth as `weights`"
        ) from error
    return InceptionEncoder(network, device)


def _reason(error: Exception) -> str:
    """What a library says, without the list of weights or of advice that follows."""
    return str(error).partition("\n")[0]


def cosine(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Of unit vectors (n, d) row by row."""
    return (first * second).sum(-1).tolist()


def frechet_distance(real: torch.Tensor, drawn: torch.Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (n, d) and (m, d), by torchmetrics in float64."""
    same = nn.Identity()  # where torchmetrics expects a network: what it is given are features already
    same.num_features = real.shape[1]
    metric = FrechetInceptionDistance(feature=same).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(drawn.double(), real=False)
    return metric.compute().item()
