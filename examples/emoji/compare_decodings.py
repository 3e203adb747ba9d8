"""Compare three ways to write an image and two heads, at an equal budget and all else equal:

    python examples/emoji/compare_decodings.py --seconds 600 --jobs 2 --model hub_configs/puma-emoji

Trains six language models on the same cached features with the same tokenizer, in the same order of rows, and puts
their measures in one table (`decodings.md`, `decodings.json`). The decoders are those of `--model`, whose encoder must
be the one that the cache was made with. Each training resumes, and nothing that is done is done again.
"""

import argparse
import itertools
import json
import math
from pathlib import Path

from emoji_training import load_pictures
from train import Stage, run
from train_language_model import build_processor
from transformers import CLIPVisionModel

DECODINGS = ("autoregressive", "next_scale", "prefilled")
HEADS = ("regression", "flow")
SPEED_STEPS = 40  # steps that tell how long one takes


def variants() -> dict[str, list[str]]:
    """Name -> options of train_language_model.py."""
    return {
        f"{decoding}-{head}": ["--image_decoding", decoding, "--image_head", head]
        for decoding, head in itertools.product(DECODINGS, HEADS)
    }


def training(name: str, options: list[str], arguments: argparse.Namespace, out: Path, steps: int) -> Stage:
    fixed = {
        "--data": arguments.data,
        "--cache": arguments.cache,
        "--encoder": arguments.encoder,
        "--scenes": arguments.scenes,
        "--processor": arguments.out / "processor",
        "--preset": arguments.preset,
        "--max_steps": steps,
        "--warmup_steps": min(100, steps // 10),
        "--out": out,
    }
    command = [str(part) for pair in fixed.items() for part in pair]
    return Stage(name, "train_language_model.py", [*command, *options, *arguments.training], out)


def steps_per_second(folder: Path) -> float:
    log = json.loads((folder / "training.json").read_text())["log"]
    return next(entry["train_steps_per_second"] for entry in log if "train_steps_per_second" in entry)


def train_variants(arguments: argparse.Namespace) -> dict[str, Path]:
    """The six trained models, by name."""
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processor = arguments.out / "processor"
    if not processor.exists():
        texts = load_pictures(arguments.data)["train"].texts
        partial = arguments.out / "processor.partial"
        build_processor(texts, CLIPVisionModel.from_pretrained(arguments.encoder)).save_pretrained(partial)
        partial.rename(processor)
    steps = dict.fromkeys(variants(), arguments.steps)
    if arguments.steps is None:
        speeds = {name: arguments.out / "speed" / name for name in steps}
        run(
            [training(f"speed-{name}", variants()[name], arguments, out, SPEED_STEPS) for name, out in speeds.items()],
            logs,
            arguments.jobs,
        )
        steps = {name: math.ceil(arguments.seconds * steps_per_second(folder)) for name, folder in speeds.items()}
    models = {name: arguments.out / name for name in steps}
    run(
        [training(name, variants()[name], arguments, out, steps[name]) for name, out in models.items()],
        logs,
        arguments.jobs,
    )
    return models


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Arguments after -- go to train_language_model.py."
    )
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--scenes", type=Path, default=Path("data/emoji-scenes"))
    parser.add_argument("--cache", type=Path, default=Path("runs/emoji/cache"))
    parser.add_argument("--encoder", type=Path, default=Path("runs/emoji/encoder"), help="the cache was made with it")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/decodings"))
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="budget of each training in time, at the speed of side by side")
    budget.add_argument("--steps", type=int, help="budget of each training in steps")
    parser.add_argument("training", nargs="*", help="more options of the trainings, after --")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    train_variants(arguments)


if __name__ == "__main__":
    main()
