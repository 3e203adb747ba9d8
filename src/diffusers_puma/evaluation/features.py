"""Where a model loses quality: in the decoder's VAE, in encoder and decoder, in regression, or in drift.

For a prompt with a true picture there are three sets of features at each scale, each decoded from the same noise:

    truth   the encoder's, of the true picture
    forced  what the language model predicts of each feature from the true ones before it (teacher forcing)
    free    what it predicts from its own predictions, as in use

What the row "vae" lacks of the picture is lost in the VAE; from there to psnr_truth encoder and decoder lose it
(lost_coding); from psnr_truth to psnr_forced the prediction does (lost_prediction); from psnr_forced to psnr_free the
errors that it feeds on (lost_drift). Encoder and decoder are told apart by what the encoder sees in the decoded
picture: a decoder that keeps to its features has an nmse_decoder near 0, and what its picture still lacks was not in
them. Text to image has no single truth: nmse near 1 is the rule where a caption leaves much open.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from transformers_puma import flatten_scales
from transformers_puma.evaluation.intervals import bootstrap_mean
from transformers_puma.evaluation.runner import ArrayFile, Row, read_arrays, sample_seed
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

from ..feature_stage import Features
from ..loading import bring_in
from .drawing import Drawer, add_scores
from .lpips import lpips_distance
from .pictures import as_square, psnr, to_tensor

VAE = "vae"
STAGES = ("truth", "forced", "free")
# Pairs of stages whose squared error is measured: what was predicted, and what it should be.
ERRORS = {
    "forced": ("forced", "truth"),
    "free": ("free", "truth"),
    "drift": ("free", "forced"),
    "decoder": ("decoder", "truth"),
}


class FeatureErrors:
    """Errors of features and of what is decoded from them, at every scale of a `Drawer`, which has one seed.

    nmse_forced, nmse_free: squared error against the truth, in units of the variance of true features over the data
        and the positions of a scale (1 is what predicting their mean would give). Left out where that is none: at the
        coarsest scale, of pictures that are all the same.
    nmse_drift: squared error of free against forced features, in the same unit.
    nmse_decoder: squared error of the features of the picture that is decoded from true ones, in the same unit.
    psnr_X, lpips_X: of the picture decoded from stage X against the true picture.
    lost_coding, lost_prediction, lost_drift: PSNR in dB that is lost from one stage to the next, see above.

    folder: of the run, where mean features are kept.
    """

    task = "features"

    def __init__(self, drawer: Drawer, folder: str | Path, lpips: torch.nn.Module) -> None:
        drawer.require_one_seed()
        self.drawer, self.folder, self.lpips = drawer, Path(folder), lpips
        self._arrays = ArrayFile(folder)

    def settings(self) -> dict[str, Any]:
        return self.drawer.settings()

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        """Samples with `id`, `prompt` and `image`, the true picture; edits with `image`, the source, and `target`."""
        prompts = [sample["prompt"] for sample in samples]
        is_edit = "target" in samples[0]
        targets = [sample["target" if is_edit else "image"] for sample in samples]
        sources = [[sample["image"]] for sample in samples] if is_edit else None
        ids = [sample["id"] for sample in samples]

        stages = self._features(ids, prompts, sources, targets)
        truth = to_tensor([as_square(target, self.drawer.size) for target in targets])
        rows = [{"id": i, "scores": {}} for i in ids]
        add_scores(rows, VAE, self._vae(targets, truth))
        coarsest = stages["truth"][max(stages["truth"])].float().mean(1).cpu()
        for row, mean in zip(rows, coarsest, strict=True):
            row["mean"] = self._arrays.append(mean.numpy())
        pictures = {name: self.drawer.draw(ids, image_features=features) for name, features in stages.items()}
        for scale in self.drawer.scales:
            features = {name: stage[scale].float() for name, stage in stages.items()}
            decoded = self.drawer.pipe.encode_image([group[0] for group in pictures["truth"][scale]])[scale]
            scores = _squared_errors({**features, "decoder": decoded.float()})
            for name in STAGES:
                drawn = to_tensor([group[0] for group in pictures[name][scale]])
                scores[f"psnr_{name}"] = psnr(truth, drawn).tolist()
                scores[f"lpips_{name}"] = lpips_distance(self.lpips, truth, drawn).tolist()
            add_scores(rows, str(scale), scores)
            for row in rows:
                row["scores"][str(scale)] |= _losses(row["scores"][VAE]["psnr"], row["scores"][str(scale)])
        return rows

    def _features(
        self,
        ids: list[int | str],
        prompts: list[str],
        sources: list[list[Image.Image]] | None,
        targets: list[Image.Image],
    ) -> dict[str, Features]:
        """The three stages, each `{scale: (B, k, C)}`; features that are samples share their noise."""
        pipe, model = self.drawer.pipe, self.drawer.pipe.mllm
        truth = pipe.encode_image(targets)
        inputs = pipe.processor.prepare_generation(prompts, sources).to(bring_in(pipe, model))
        seeds = [sample_seed(self.drawer.seeds[0], i) for i in ids]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        free = pipe.generate_image_features(prompts, sources, min(self.drawer.scales), generators)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = model.draw_feature_noise(len(prompts), 0, generators, model.device)
        forced = teacher_forced_features(model, **inputs, target_features=flatten_scales(truth), noise=noise)
        return {"truth": truth, "forced": forced, "free": free}

    @torch.no_grad()
    def _vae(self, targets: list[Image.Image], truth: torch.Tensor) -> dict[str, list[float]]:
        """What is left of the true pictures after the VAE alone, at the size that the decoders draw."""
        pipe = self.drawer.pipe
        unet = getattr(pipe, f"unet_{min(self.drawer.scales)}")
        size = unet.config.sample_size * pipe.vae_scale_factor
        pixels = 2 * to_tensor([as_square(target, size) for target in targets]) - 1
        device, dtype = bring_in(pipe, pipe.vae), pipe.vae.dtype
        # In fp16 an encoder of SDXL's kind overflows as its decoder does.
        latents = pipe.vae.to(torch.float32).encode(pixels.to(device)).latent_dist.mode()
        pipe.vae.to(dtype)
        decoded = pipe.decode_latents(latents * pipe.vae.config.scaling_factor)
        pictures = pipe.image_processor.postprocess(decoded, "pil")
        drawn = to_tensor([as_square(picture, self.drawer.size) for picture in pictures])
        return {"psnr": psnr(truth, drawn).tolist(), "lpips": lpips_distance(self.lpips, truth, drawn).tolist()}

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        # Pooling keeps the mean over a picture, so that it is the same at every scale.
        mean = read_arrays(self.folder, [row["mean"] for row in rows]).mean(0, dtype=np.float64)
        table = {}
        for name in [VAE, *map(str, sorted(self.drawer.scales))]:
            values = {key: np.array([row["scores"][name][key] for row in rows]) for key in rows[0]["scores"][name]}
            if name != VAE:
                power = values.pop("power").mean()
                variance = power - np.square(mean).mean()
                errors = {key: values.pop(key) for key in list(values) if key.startswith("mse_")}
                if variance > 1e-6 * power:  # of one picture, or of equal ones, there is only rounding
                    values |= {f"n{key}": error / variance for key, error in errors.items()}
            table[name] = {key: bootstrap_mean(value) for key, value in values.items()}
        return table


def _losses(vae: float, scores: dict[str, float]) -> dict[str, float]:
    """Of one sample, from its PSNR after the VAE alone and after each stage."""
    levels = [vae, *(scores[f"psnr_{name}"] for name in STAGES)]
    lost = [before - after for before, after in pairwise(levels)]
    return dict(zip(("lost_coding", "lost_prediction", "lost_drift"), lost, strict=True))


def _squared_errors(features: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of stages (B, k, C): for each sample the mean squared errors, and of the truth the mean square ("power")."""
    errors = {
        f"mse_{name}": (features[given] - features[expected]).square().mean((1, 2)).tolist()
        for name, (given, expected) in ERRORS.items()
    }
    return {"power": features["truth"].square().mean((1, 2)).tolist(), **errors}
