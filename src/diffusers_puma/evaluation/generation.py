"""Report tables 2 and 6: pictures drawn from captions, against the caption, the true picture and another seed."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from transformers_puma.evaluation.runner import ArrayFile, Row, read_arrays

from .drawing import Drawer, add_scores, mean_over_pairs, summarize
from .encoders import ClipEncoder, FrechetEncoder, cosine, frechet_distance
from .lpips import lpips_distance
from .pictures import as_square, to_tensor

BEST = {"clip_i": max, "clip_t": max, "lpips_t": min}


def lacking(have_pictures: bool, num_seeds: int) -> dict[str, str]:
    """The networks of `Generation` that would find nothing to compare, each with what it would need.

    have_pictures: whether the samples have true pictures.
    num_seeds: of the drawer.
    """
    if have_pictures:
        return {}
    needs = {"frechet": "true pictures"}
    return needs if num_seeds > 1 else {**needs, "lpips": "true pictures or several seeds"}


class Generation:
    """Scores of every scale of a `Drawer`; those whose network is given, and whose picture or caption a sample has.

    clip_t: CLIP's cosine between picture and caption.
    clip_i: CLIP's cosine between picture and true picture.
    lpips_t: LPIPS to the true picture.
    lpips_d: LPIPS between seeds, the mean over all pairs.
    fid: Fréchet distance to the true pictures, under the name of the `frechet` network.

    All but lpips_d are of the first seed, which makes the "5-scale max" of clip_i and clip_t that of the report: the
    best of five pictures. It is an oracle for clip_i, which needs the true picture.

    folder: of the run, where features for `frechet` are kept.
    """

    task = "generation"

    def __init__(
        self,
        drawer: Drawer,
        folder: str | Path,
        clip: ClipEncoder | None = None,
        lpips: torch.nn.Module | None = None,
        frechet: FrechetEncoder | None = None,
    ) -> None:
        if clip is None and lpips is None and frechet is None:
            raise ValueError("nothing to measure: pass at least one of clip, lpips and frechet")
        self.drawer, self.folder, self.clip, self.lpips, self.frechet = drawer, Path(folder), clip, lpips, frechet
        self._arrays = ArrayFile(folder)

    def settings(self) -> dict[str, Any]:
        return {
            **self.drawer.settings(),
            "lpips": self.lpips is not None,
            "clip": self.clip and self.clip.name,
            "frechet": self.frechet and self.frechet.name,
        }

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        """Samples with `id`, `prompt` and maybe the true `image` -> rows with `scores`, and with `features` of
        `frechet`.

        Raises:
            ValueError: a network that would find nothing to compare, before anything is drawn.
        """
        prompts = [sample["prompt"] for sample in samples]
        truth = [sample["image"] for sample in samples] if all("image" in sample for sample in samples) else None
        for network, need in lacking(truth is not None, len(self.drawer.seeds)).items():
            if getattr(self, network) is not None:
                raise ValueError(f"{network} needs {need}, and these samples have prompts alone")
        drawn = self.drawer.draw([sample["id"] for sample in samples], prompt=prompts)
        rows = [{"id": sample["id"], "scores": {}} for sample in samples]
        for scale, groups in drawn.items():
            add_scores(rows, str(scale), self._scores(prompts, truth, groups))
        if self.frechet is not None:
            self._keep_features(rows, truth, drawn)
        return rows

    def _scores(
        self, prompts: list[str], truth: list[Image.Image] | None, groups: list[list[Image.Image]]
    ) -> dict[str, list[float]]:
        pictures, scores = [group[0] for group in groups], {}
        if self.clip is not None:
            vectors = self.clip.pictures(pictures)
            scores["clip_t"] = cosine(vectors, self.clip.texts(prompts))
            if truth is not None:
                scores["clip_i"] = cosine(vectors, self.clip.pictures(truth))
        if self.lpips is not None:
            if truth is not None:
                squares = [as_square(picture, self.drawer.size) for picture in truth]
                scores["lpips_t"] = self._lpips(squares, pictures).tolist()
            if len(groups[0]) > 1:
                scores["lpips_d"] = mean_over_pairs(self._lpips, groups)
        return scores

    def _lpips(self, first: list[Image.Image], second: list[Image.Image]) -> torch.Tensor:
        return lpips_distance(self.lpips, to_tensor(first), to_tensor(second))

    def _keep_features(self, rows: list[Row], truth: list[Image.Image], drawn: dict[int, list]) -> None:
        # The centre, as COCO's true pictures are cut for FID elsewhere: a squeezed picture would look unlike any.
        size = (self.drawer.size, self.drawer.size)
        squares = [ImageOps.fit(picture, size, Image.Resampling.BICUBIC) for picture in truth]
        sets = {"real": squares, **{str(scale): [group[0] for group in groups] for scale, groups in drawn.items()}}
        for name, pictures in sets.items():
            for row, vector in zip(rows, self.frechet.pictures(pictures), strict=True):
                row.setdefault("features", {})[name] = self._arrays.append(vector.numpy())

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        scores = summarize(rows, self.drawer.scales, BEST)
        if len(rows) > 1 and self.frechet is not None:
            real = self._read_features(rows, "real")
            for scale in self.drawer.scales:
                distance = frechet_distance(real, self._read_features(rows, str(scale)))
                scores[str(scale)][self.frechet.name] = {"mean": distance}
        return scores

    def _read_features(self, rows: list[Row], name: str) -> torch.Tensor:
        return torch.from_numpy(read_arrays(self.folder, [row["features"][name] for row in rows]))
