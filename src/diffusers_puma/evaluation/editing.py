"""Report table 3: edited pictures against their source, the caption of what they should be, and its picture."""

from typing import Any

import torch
from PIL import Image

from transformers_puma.evaluation.runner import Row

from .drawing import Drawer, add_scores, means, summarize
from .encoders import ClipEncoder, DinoEncoder, cosine
from .lpips import lpips_distance
from .pictures import as_square, psnr, to_tensor

BEST = {"clip_i": max, "clip_t": max, "dino": max, "psnr_t": max, "lpips_t": min}
UNCHANGED = "unchanged"


class Editing:
    """Scores of every scale of a `Drawer`; those whose network is given, and whose caption or target a sample has.

    clip_i, dino: cosine between the edited picture and its source.
    clip_t: CLIP's cosine between the edited picture and the target's caption.
    lpips_s: LPIPS between the edited picture and its source.
    psnr_t, lpips_t: against the target's true picture, for data that has it.

    The drawer has one seed: the report has one picture of each scale. A row "unchanged" has what the source scores as
    its own edit, which an edit that does nothing reaches as well.
    """

    task = "editing"

    def __init__(
        self,
        drawer: Drawer,
        clip: ClipEncoder | None = None,
        dino: DinoEncoder | None = None,
        lpips: torch.nn.Module | None = None,
    ) -> None:
        if clip is None and dino is None and lpips is None:
            raise ValueError("nothing to measure: pass at least one of clip, dino and lpips")
        drawer.require_one_seed()
        self.drawer, self.clip, self.dino, self.lpips = drawer, clip, dino, lpips

    def settings(self) -> dict[str, Any]:
        return {
            **self.drawer.settings(),
            "lpips": self.lpips is not None,
            "clip": self.clip and self.clip.name,
            "dino": self.dino and self.dino.name,
        }

    def __call__(self, samples: list[dict[str, Any]]) -> list[Row]:
        """Samples with `id`, `image`, `prompt` and maybe `caption` and `target` -> rows with `scores`."""
        sources, prompts = [sample["image"] for sample in samples], [sample["prompt"] for sample in samples]
        drawn = self.drawer.draw([sample["id"] for sample in samples], prompt=prompts, image=sources)
        rows = [{"id": sample["id"], "scores": {}} for sample in samples]
        # As edits are: CLIP's own preprocessing would crop a source that is not square.
        squares = [as_square(source, self.drawer.size) for source in sources]
        for scale, groups in drawn.items():
            add_scores(rows, str(scale), self._scores(samples, squares, [group[0] for group in groups]))
        add_scores(rows, UNCHANGED, self._scores(samples, squares, squares))
        return rows

    def _scores(
        self, samples: list[dict[str, Any]], sources: list[Image.Image], pictures: list[Image.Image]
    ) -> dict[str, list[float]]:
        scores = {}
        if self.clip is not None:
            vectors = self.clip.pictures(pictures)
            scores["clip_i"] = cosine(vectors, self.clip.pictures(sources))
            if all("caption" in sample for sample in samples):
                scores["clip_t"] = cosine(vectors, self.clip.texts([sample["caption"] for sample in samples]))
        if self.dino is not None:
            scores["dino"] = cosine(self.dino.pictures(pictures), self.dino.pictures(sources))
        if self.lpips is not None:
            scores["lpips_s"] = lpips_distance(self.lpips, to_tensor(sources), to_tensor(pictures)).tolist()
        if all("target" in sample for sample in samples):
            targets = to_tensor([as_square(sample["target"], self.drawer.size) for sample in samples])
            scores["psnr_t"] = psnr(targets, to_tensor(pictures)).tolist()
            if self.lpips is not None:
                scores["lpips_t"] = lpips_distance(self.lpips, targets, to_tensor(pictures)).tolist()
        return scores

    def scores(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return {**summarize(rows, self.drawer.scales, BEST), UNCHANGED: means(rows, UNCHANGED)}
