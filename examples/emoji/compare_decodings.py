"""Compare three ways to write an image and two heads, at an equal budget and all else equal:

    python examples/emoji/compare_decodings.py --seconds 600 --jobs 2 --model hub_configs/puma-emoji

Trains six language models to draw and a little to edit, with the script of the recipe's pretraining, on the same
cached features with the same tokenizer, in the same order of rows, and puts their measures in one table
(`decodings.md`, `decodings.json`). The decoders are those of `--model`, whose encoder must be the one that the cache
was made with. Each training resumes, and nothing that is done is done again.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import report_edits
import report_text_to_image
import torch
from datasets import DatasetDict, load_from_disk
from emoji_training import load_pictures
from judge import Judge
from measuring import Bench, fingerprint
from report_pages import EDIT_COLUMNS, markdown, number, table_of
from train import Stage, run
from train_language_model import build_processor
from transformers import CLIPVisionModel

from diffusers_puma import PumaPipeline
from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.evaluation.runner import versions, write_json

DECODINGS = ("autoregressive", "next_scale", "prefilled")
HEADS = ("regression", "flow")
SHARES = (0.9, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0)  # mostly drawing, and some editing: see emoji_tasks.KINDS
SPEED_STEPS = 40  # steps that tell how long one takes
TEXT_TO_IMAGE = {
    "concept_top1": "concept, top 1",
    "concept_top5": "concept, top 5",
    "similarity_to_text": "similarity to the text",
    "similarity_to_picture": "similarity to the true picture",
    "lpips_d": "LPIPS between two seeds",
}


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
    command = [str(part) for pair in fixed.items() for part in pair] + ["--shares", *map(str, SHARES)]
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


def measure_cost(pipe: PumaPipeline, prompt: str, repeats: int = 3) -> dict[str, float]:
    """Passes of the language model and seconds (median) for the features of one picture at scales 3 and 0."""
    cost = {}
    for scale in (3, 0):
        passes, seconds = 0, []

        def count(*_):
            nonlocal passes
            passes += 1

        hook = pipe.mllm.model.language_model.register_forward_hook(count)
        for _ in range(repeats):
            start = time.perf_counter()
            pipe.generate_image_features([prompt], None, scale, torch.Generator().manual_seed(0))
            seconds.append(time.perf_counter() - start)
        hook.remove()
        cost |= {f"passes, scale {scale}": passes // repeats, f"seconds, scale {scale}": sorted(seconds)[repeats // 2]}
    return cost


def measure_variant(
    folder: Path, arguments: argparse.Namespace, pictures: dict, tasks: DatasetDict, judge: Judge
) -> dict:
    mllm = PumaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PumaProcessor.from_pretrained(folder)
    pipe = PumaPipeline.from_pretrained(arguments.model, mllm=mllm, processor=processor, dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    prints = {"model": arguments.model, "language model": folder, "data": arguments.data, "tasks": arguments.tasks}
    settings = {name: fingerprint(path) for name, path in prints.items()} | {"judge": fingerprint(arguments.judge)}
    bench = Bench(pipe, judge, pictures, arguments.out / "samples" / folder.name, settings, arguments.lpips_weights)
    record = json.loads((folder / "training.json").read_text())
    seconds = next(entry["train_runtime"] for entry in record["log"] if "train_runtime" in entry)
    count = arguments.count
    return {
        "steps": record["steps"],
        "training seconds": seconds,
        "features": report_text_to_image.run_features(bench, 2 * count),
        "text_to_image": report_text_to_image.run(bench, count),
        "edits": report_edits.run(bench, "edits", tasks["edits"], max(1, count // 4)),
        "cost": measure_cost(pipe, "tangerine in noto style"),
    }


def measure(models: dict[str, Path], arguments: argparse.Namespace) -> dict:
    """Of each variant; samples that were measured before are read."""
    pictures, tasks = load_pictures(str(arguments.data)), load_from_disk(str(arguments.tasks))
    judge = Judge.load(arguments.judge).to("cuda" if torch.cuda.is_available() else "cpu")
    return {name: measure_variant(folder, arguments, pictures, tasks, judge) for name, folder in models.items()}


def by_scale(results: dict, value) -> str:
    """A table of variants by scales; `value(result, scale)` is a score or a number."""
    scales = sorted(range(5), reverse=True)
    rows = [[name, *(number(value(result, scale), 3) for scale in scales)] for name, result in results.items()]
    return markdown(["", *(f"scale {scale}" for scale in scales)], rows)


def write_page(results: dict) -> str:
    pieces = ["# Three ways to write an image, two heads", "## Budget and cost"]
    header = [
        "",
        "steps",
        "training seconds",
        "passes, scale 3",
        "scale 0",
        "seconds for features, scale 3",
        "scale 0",
    ]
    rows = []
    for name, result in results.items():
        cost = result["cost"]
        row = [result["steps"], f"{result['training seconds']:.0f}", cost["passes, scale 3"], cost["passes, scale 0"]]
        rows.append([name, *map(str, row), *(f"{cost[f'seconds, scale {scale}']:.2f}" for scale in (3, 0))])
    pieces.append(markdown(header, rows))
    for split in ("free-running, training captions", "free-running, unseen pairs", "teacher-forced, unseen pairs"):
        pieces.append(f"## Squared error of features over variance, {split}")
        pieces.append(by_scale(results, lambda r, s, split=split: r["features"]["error over variance"][split][s]))
    pieces.append(
        "A sample has the error of a mean and its own variance on top: flow heads are to be judged by pictures."
    )
    for metric, title in TEXT_TO_IMAGE.items():
        pieces.append(f"## Text to image, unseen pairs: {title}")
        pieces.append(by_scale(results, lambda r, s, m=metric: r["text_to_image"]["table"][f"scale {s}"][m]))
    table = {
        f"{name}, {label}": scores
        for name, result in results.items()
        for label, scores in result["edits"]["table"].items()
    }
    pieces += ["## Editing of unseen concepts", table_of(table, EDIT_COLUMNS)]
    return "\n\n".join(pieces) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Arguments after -- go to train_language_model.py."
    )
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--scenes", type=Path, default=Path("data/emoji-scenes"))
    parser.add_argument("--cache", type=Path, default=Path("runs/emoji/cache"))
    parser.add_argument("--encoder", type=Path, default=Path("runs/emoji/encoder"), help="the cache was made with it")
    parser.add_argument("--model", type=Path, default=Path("hub_configs/puma-emoji"), help="its decoders draw")
    parser.add_argument("--judge", type=Path, default=Path("runs/emoji/judge"), help="of train_judge.py")
    parser.add_argument("--tasks", type=Path, default=Path("data/emoji-evaluation"), help="of emoji_evaluation.py")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/decodings"))
    parser.add_argument("--lpips-weights", type=Path, help="AlexNet's, default those that load_lpips downloads once")
    parser.add_argument("--count", type=int, default=32, help="held-out samples to draw")
    parser.add_argument("--train-only", action="store_true", help="measure nothing yet")
    parser.add_argument("--preset", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--seconds", type=float, help="budget of each training in time, at the speed of side by side")
    budget.add_argument("--steps", type=int, help="budget of each training in steps")
    parser.add_argument("training", nargs="*", help="more options of the trainings, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    models = train_variants(arguments)
    if arguments.train_only:
        return
    results = measure(models, arguments)
    write_json(arguments.out / "decodings.json", {"versions": versions(), "results": results})
    page = write_page(results)
    (arguments.out / "decodings.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
