"""What the comparisons of tuned language models share: their arguments and the stage that tunes one."""

import argparse
from pathlib import Path

from emoji_tasks import alone
from train import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--scenes", type=Path, default=Path("data/emoji-scenes"))
    parser.add_argument("--cache", type=Path, default=Path("runs/emoji/cache"))
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--steps", type=int, required=True, help="budget of each tuning")
    parser.add_argument("--jobs", type=int, default=2, help="tunings side by side")


def tuning(name: str, task: str, arguments: argparse.Namespace, more: dict[str, object] | None = None) -> Stage:
    """Tunes `arguments.pretrained` on one of `KINDS` alone, into the folder `name` of `arguments.out`; `more` are
    further options of tune_language_model.py."""
    out = arguments.out / name
    options = {
        "--data": arguments.data,
        "--scenes": arguments.scenes,
        "--cache": arguments.cache,
        "--pretrained": arguments.pretrained,
        "--preset": arguments.preset,
        "--max_steps": arguments.steps,
        "--out": out,
        **(more or {}),
    }
    command = [str(part) for pair in options.items() for part in pair]
    command += ["--shares", *map(str, alone(task))]
    return Stage(name, "tune_language_model.py", command, out)
