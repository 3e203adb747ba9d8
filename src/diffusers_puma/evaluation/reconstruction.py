"""Report table 1: pictures encoded and decoded again, against the original and against another seed."""

from typing import Any

import torch

from transformers_puma.evaluation.runner import Row

from .drawing import Drawer, add_scores, mean_over_pairs, summarize
from .lpips import lpips_distance
from .pictures import as_square, psnr, to_tensor


class Reconstruction:
    """PSNR_r, LPIPS_r against the original and PSNR_d, LPIPS_d between seeds, at every scale of a `Drawer`.

    The original is resized to the drawer's size first; the encoder sees that picture. With several seeds, _r is the
    mean over them and _d the mean over all pairs of them; with one seed there is no _d.
    """

    task = "reconstruction"

    def __init__(self, drawer: Drawer, lpips: torch.nn.Module) -> None:
        self.drawer, self.lpips = drawer, lpips

    def settings(self) -> dict[str, Any]:
        return self.drawer.settings()

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return summarize(rows, self.drawer.scales)

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        """Samples with `id` and `image` -> rows with `scores`, `{scale: {metric: value}}`."""
        originals = [as_square(sample["image"], self.drawer.size) for sample in samples]
        drawn = self.drawer.draw([sample["id"] for sample in samples], image=originals)
        rows = [{"id": sample["id"], "scores": {}} for sample in samples]
        for scale, groups in drawn.items():
            add_scores(rows, str(scale), self._scores(originals, groups))
        return rows

    def _scores(self, originals: list, groups: list[list]) -> dict[str, list[float]]:
        distances = {
            "psnr": lambda first, second: psnr(to_tensor(first), to_tensor(second)),
            "lpips": lambda first, second: lpips_distance(self.lpips, to_tensor(first), to_tensor(second)),
        }
        scores = {}
        for name, distance in distances.items():
            by_seed = [distance(originals, pictures) for pictures in zip(*groups, strict=True)]
            scores[f"{name}_r"] = torch.stack(by_seed).mean(0).tolist()
            if len(by_seed) > 1:
                scores[f"{name}_d"] = mean_over_pairs(distance, groups)
        return scores
