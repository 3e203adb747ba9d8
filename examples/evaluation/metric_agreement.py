"""The metrics of `puma eval` beside reference implementations, on the same pictures and the same weights:

    python examples/evaluation/metric_agreement.py

prints a table with the largest difference of each. CLIP ViT-B/32, DINO ViT-S/16 and Inception have random weights,
the same on both sides: agreement is about the arithmetic (preparation, network, formula) and needs no download. LPIPS
has the weights of its release, or those of `--lpips-weights`.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import torch.nn.functional as F
import torch_fidelity
import torchvision
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision import transforms
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from diffusers_puma.evaluation import (
    frechet_distance,
    load_clip,
    load_dino,
    load_inception,
    load_lpips,
    lpips_distance,
    psnr,
)
from diffusers_puma.evaluation.encoders import cosine
from diffusers_puma.evaluation.pictures import to_tensor

CAPTIONS = ("a cat on a mat", "two dogs", "rain", "A red cube on a blue ball.", "noto style", "", "a b c", "sun")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Layers of torchvision's AlexNet and where torchmetrics keeps them.
CONVOLUTIONS = {0: "slice1.0", 3: "slice2.3", 6: "slice3.6", 8: "slice4.8", 10: "slice5.10"}
Case = tuple[str, str, list[float], list[float]]  # metric, reference, our values, its values


def make_pictures(count: int, size: int = 64) -> list[Image.Image]:
    """Coloured blobs, so that neighbouring pixels are alike as in photographs."""
    generator = np.random.default_rng(0)
    grids = generator.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC) for grid in grids]


def psnr_case(first: list, second: list) -> Case:
    one, two = to_tensor(first), to_tensor(second)
    expected = peak_signal_noise_ratio(one, two, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return "PSNR", "torchmetrics", psnr(one, two).tolist(), expected.tolist()


def lpips_case(first: list, second: list, weights: Path | None) -> Case:
    network = load_lpips(weights)
    ours = lpips_distance(network, to_tensor(first), to_tensor(second))
    expected = plain_lpips(network.state_dict(), to_tensor(first), to_tensor(second))
    return "LPIPS", "torchvision's AlexNet and the paper's formula", ours.tolist(), expected.tolist()


@torch.no_grad()
def plain_lpips(state: dict, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """(n,) of pictures in [0, 1]: unit features, squared differences, weighted channels, mean over positions."""
    alexnet = torchvision.models.alexnet(weights=None).features
    for layer, name in zip(
        (0, 3, 6, 8, 10), ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10"), strict=True
    ):
        alexnet[layer].load_state_dict({key: state[f"net.{name}.{key}"] for key in ("weight", "bias")})
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    sides = [(2 * side - 1 - shift[:, None, None]) / scale[:, None, None] for side in (first, second)]
    total, head = torch.zeros(len(first)), 0
    for layer in alexnet[:12]:
        sides = [layer(side) for side in sides]
        if isinstance(layer, torch.nn.ReLU):
            sides = [side.clone() for side in sides]  # the next layer may work in place
            one, two = (F.normalize(side, dim=1, eps=1e-10) for side in sides)
            total += F.conv2d((one - two).square(), state[f"lin{head}.model.1.weight"]).mean((1, 2, 3))
            head += 1
    return total


def clip_cases(first: list, second: list, arch: str, folder: Path) -> Iterator[Case]:
    """CLIP's own transforms, written out, and open_clip's model called as its README does."""
    torch.manual_seed(0)
    model = open_clip.create_model(arch).eval()
    file = folder / "clip.pt"
    torch.save(model.state_dict(), file)
    clip, size = load_clip(f"{arch}/{file}"), model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    prepare = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    captions = list(CAPTIONS[: len(first)])
    with torch.no_grad():
        one, two = (model.encode_image(torch.stack([prepare(p) for p in part])) for part in (first, second))
        words = model.encode_text(open_clip.tokenize(captions))
    vectors, reference = clip.pictures(first), "open_clip"
    yield "CLIP-I", reference, cosine(vectors, clip.pictures(second)), F.cosine_similarity(one, two).tolist()
    yield "CLIP-T", reference, cosine(vectors, clip.texts(captions)), F.cosine_similarity(one, words).tolist()


def dino_case(first: list, second: list, folder: Path, depth: int) -> Case:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    ours = ViTModel(ViTConfig(**sizes, num_hidden_layers=depth, layer_norm_eps=1e-6), add_pooling_layer=False)
    theirs = timm.create_model("vit_small_patch16_224.dino", pretrained=False, num_classes=0, depth=depth).eval()
    theirs.load_state_dict(timm_names(ours.state_dict(), depth))
    ours.save_pretrained(folder / "dino")
    ViTImageProcessor(image_mean=IMAGENET["mean"], image_std=IMAGENET["std"]).save_pretrained(folder / "dino")
    dino = load_dino(str(folder / "dino"))
    prepare = transforms.Compose(
        [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(**IMAGENET)]
    )
    with torch.no_grad():
        one, two = (theirs(torch.stack([prepare(p) for p in part])) for part in (first, second))
    expected = F.cosine_similarity(one, two).tolist()
    return "DINO", "timm", cosine(dino.pictures(first), dino.pictures(second)), expected


def timm_names(state: dict, depth: int) -> dict:
    """A vision transformer of transformers under timm's names."""
    embeddings, patches = "embeddings.", "embeddings.patch_embeddings.projection."
    found = {
        "cls_token": state[f"{embeddings}cls_token"],
        "pos_embed": state[f"{embeddings}position_embeddings"],
        **{f"patch_embed.proj.{key}": state[patches + key] for key in ("weight", "bias")},
        **{f"norm.{key}": state[f"layernorm.{key}"] for key in ("weight", "bias")},
    }
    names = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for layer in range(depth):
        for key in ("weight", "bias"):
            parts = [state[f"layers.{layer}.attention.{part}_proj.{key}"] for part in "qkv"]
            found[f"blocks.{layer}.attn.qkv.{key}"] = torch.cat(parts)
            for ours, theirs in names.items():
                found[f"blocks.{layer}.{theirs}.{key}"] = state[f"layers.{layer}.{ours}.{key}"]
    return found


class RandomInception(FeatureExtractorInceptionV3):
    """FID's network before weights are read into it."""

    def load_state_dict(self, state_dict, **kwargs):
        return None


def fid_case(first: list, second: list, folder: Path) -> Case:
    """torch-fidelity from picture files to the number, with its own network, statistics and matrix root."""
    torch.manual_seed(0)
    torch.save({}, folder / "empty.pth")
    network = RandomInception("inception-v3-compat", ["2048"], str(folder / "empty.pth"))
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):  # torch's own start lets what it sees vanish over so many layers
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(network.state_dict(), folder / "inception.pth")
    for name, part in (("first", first), ("second", second)):
        (folder / name).mkdir()
        for index, picture in enumerate(part):
            picture.save(folder / name / f"{index:04d}.png")
    options = {"feature_extractor_weights_path": str(folder / "inception.pth"), "cuda": False, "verbose": False}
    inputs = {"input1": str(folder / "first"), "input2": str(folder / "second")}
    expected = torch_fidelity.calculate_metrics(**inputs, fid=True, cache=False, save_cpu_ram=True, **options)
    encoder = load_inception(folder / "inception.pth")
    ours = frechet_distance(encoder.pictures(first), encoder.pictures(second))
    return "FID", "torch-fidelity", [ours], [expected["frechet_inception_distance"]]


def cases(count: int, lpips_weights: Path | None, clip_arch: str = "ViT-B-32", dino_depth: int = 12) -> Iterator[Case]:
    """Every metric of the tables on `count` pairs of pictures, at most 8."""
    made = make_pictures(2 * count)
    first, second = made[:count], made[count:]
    with tempfile.TemporaryDirectory() as name:
        yield psnr_case(first, second)
        yield lpips_case(first, second, lpips_weights)
        yield from clip_cases(first, second, clip_arch, Path(name))
        yield dino_case(first, second, Path(name), dino_depth)
        yield fid_case(first, second, Path(name))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=len(CAPTIONS), help="pairs of pictures, at most 8")
    parser.add_argument("--lpips-weights", type=Path, help="as of puma eval (default: downloaded once)")
    arguments = parser.parse_args(argv)
    logging.disable(logging.WARNING)  # of weights that are random, as they should be
    print(f"{'metric':8}{'reference':48}{'ours':>12}{'reference':>12}{'difference':>12}")
    for metric, reference, ours, expected in cases(arguments.count, arguments.lpips_weights):
        difference = np.abs(np.subtract(ours, expected)).max()
        print(f"{metric:8}{reference:48}{np.mean(ours):12.6f}{np.mean(expected):12.6f}{difference:12.1e}")


if __name__ == "__main__":
    main()
