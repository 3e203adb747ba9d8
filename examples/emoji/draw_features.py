"""Let a language model write the features of training pictures, for decoders that are to draw what it writes:

    python examples/emoji/draw_features.py --model runs/emoji/mllm_tuned --out runs/emoji/drawn

Written features differ from the encoder's: errors add up from scale to scale. Batches are a pure function of seed and
number, and each is a file, so the same command goes on where it was stopped.
"""

import argparse
import os
import random
from pathlib import Path

import torch
from build_scenes import load_scenes
from cache_features import load_cache
from emoji_edits import Picture
from emoji_tasks import DRAWING_KINDS, EmojiSplit
from emoji_training import load_pictures
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm
from train_language_model import load_trained

from transformers_puma import PumaForConditionalGeneration, PumaProcessor

BATCH = 32
SHARES = (0.55, 0.30, 0.15)  # of DRAWING_KINDS
SCENE_SHARE = 0.5  # of what is drawn from words


class DrawingTasks:
    """Batches of tasks of the training split that end with a picture, which is known by its latents and features."""

    def __init__(self, data: str, scenes: str, cache: str, seed: int):
        self.pixels, self.images = load_pictures(data)["train"], load_scenes(scenes)["train"]
        self.split = EmojiSplit(self.pixels.described(), self.images.remove_columns("image").to_list())
        self.caches = {"emoji": load_cache(cache, "train"), "scenes": load_cache(cache, "scenes_train")}
        self.seed = seed

    def batch(self, number: int) -> tuple[list[str], list[list[Image.Image]], list[Picture]]:
        """Prompts, the pictures given with each, and what is to be drawn; all of one kind, so of about one length."""
        rng = random.Random(f"{self.seed} {number}")
        kind = rng.choices(DRAWING_KINDS, SHARES)[0]
        tasks = [self.split.drawing_task(kind, rng, SCENE_SHARE) for _ in range(BATCH)]
        prompts = [words for words, _ in tasks]
        given = [[self.image(picture) for picture in pictures[:-1]] for _, pictures in tasks]
        return prompts, given, [pictures[-1] for _, pictures in tasks]

    def image(self, picture: Picture) -> Image.Image:
        which, row = picture
        return to_pil_image(self.pixels.pixels[row]) if which == "emoji" else self.images[row]["image"]

    def known(self, name: str, pictures: list[Picture]) -> torch.Tensor:
        """`name` of the cache, of each picture."""
        return torch.stack([self.caches[which][name][row] for which, row in pictures])


def write_batch(
    model: PumaForConditionalGeneration, processor: PumaProcessor, tasks: DrawingTasks, number: int
) -> dict[str, torch.Tensor]:
    """In half precision `latents` (B, 4, h, w) and `features` (B, k_0, C) of the true pictures, and for each scale i
    `written_i` (B, k_i, C)."""
    prompts, given, drawn = tasks.batch(number)
    inputs = processor.prepare_generation(prompts, given).to(model.device)
    written = model.generate_image_features(**inputs)
    tensors = {name: tasks.known(name, drawn) for name in ("latents", "features")}
    return tensors | {f"written_{scale}": features.half().cpu() for scale, features in written.items()}


def load_drawn(folder: str, names: list[str]) -> dict[str, torch.Tensor]:
    """These tensors of all batches that `write_batch` made."""
    parts = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/emoji/mllm_tuned", help="the trained language model")
    parser.add_argument("--data", default="data/emoji")
    parser.add_argument("--scenes", default="data/emoji-scenes", help="folder that build_scenes.py wrote")
    parser.add_argument("--cache", default="runs/emoji/cache", help="folder that cache_features.py wrote")
    parser.add_argument("--out", default="runs/emoji/drawn")
    parser.add_argument("--batches", type=int, default=400, help=f"of {BATCH} pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if Path(arguments.out).exists():
        return
    partial = Path(f"{arguments.out}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    model, processor = load_trained(arguments.model)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tasks = DrawingTasks(arguments.data, arguments.scenes, arguments.cache, arguments.seed)
    for number in tqdm(range(arguments.batches), desc="writing features"):
        file = partial / f"{number:05d}.safetensors"
        if not file.exists():
            save_file(write_batch(model, processor, tasks, number), file.with_suffix(".tmp"))
            os.replace(file.with_suffix(".tmp"), file)
    os.replace(partial, arguments.out)


if __name__ == "__main__":
    main()
