"""Which scales of a picture the language model reads (the report's table 5 in small):

    python examples/emoji/compare_scales.py --steps 80 --jobs 2

Tunes one model for each scale alone and one for all of them, to answer questions, from the same trained model, on
the same rows in the same order; the others' positions of a given picture are hidden in training and afterwards. Puts
the exact answers about held-out pictures by type in one table (`scales.md`, `scales.json`). Each tuning resumes, and
nothing that is done is done again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import report_questions
import torch
from comparing import add_arguments, tuning
from datasets import DatasetDict, load_from_disk
from emoji_training import load_pictures
from measuring import Bench, fingerprint
from report_pages import markdown, number
from train import Stage, run

from diffusers_puma import PumaPipeline
from transformers_puma import PumaForConditionalGeneration, PumaProcessor
from transformers_puma.evaluation.runner import versions, write_json

NUM_SCALES = 5


def variants() -> dict[str, list[int]]:
    """Name -> the scales that are read."""
    alone = {f"f{scale}": [scale] for scale in reversed(range(NUM_SCALES))}
    return {**alone, "all": list(range(NUM_SCALES))}


def reading(name: str, scales: list[int], arguments: argparse.Namespace) -> Stage:
    """Questions alone, with only these scales of a picture to read."""
    stage = tuning(name, "ask", arguments)
    return replace(stage, arguments=[*stage.arguments, "--input_scales", *map(str, scales)])


def measure_variant(
    folder: Path, arguments: argparse.Namespace, pictures: dict, tasks: DatasetDict, settings: dict
) -> dict:
    mllm = PumaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = PumaProcessor.from_pretrained(folder)
    pipe = PumaPipeline.from_pretrained(
        arguments.model, scales=[], mllm=mllm, processor=processor, dtype=torch.float32
    ).to("cuda" if torch.cuda.is_available() else "cpu")
    settings = settings | {"language model": fingerprint(folder)}
    bench = Bench(pipe, None, pictures, arguments.out / "samples" / folder.name, settings)
    return report_questions.run(bench, tasks, arguments.count)


def average(result: dict) -> float:
    """Mean over the types of questions, each counted once."""
    return sum(score["mean"] for score in result["types"].values()) / len(result["types"])


def write_page(results: dict[str, dict]) -> str:
    """One row a type of question, one column a model."""
    first = next(iter(results.values()))["types"]
    rows = [
        [
            type,
            *(number(result["types"][type], 3) for result in results.values()),
            f"{score['most frequent answer']:.3f}",
        ]
        for type, score in first.items()
    ]
    constant = sum(score["most frequent answer"] for score in first.values()) / len(first)
    rows.append(["mean of the types", *(f"{average(result):.3f}" for result in results.values()), f"{constant:.3f}"])
    header = ["question", *(f"reads {name}" for name in results), "most frequent answer"]
    return "# Which scales the language model reads\n\n" + markdown(header, rows) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tasks", type=Path, default=Path("data/emoji-evaluation"), help="of emoji_evaluation.py")
    parser.add_argument(
        "--pretrained", type=Path, default=Path("hub_configs/puma-emoji"), help="where each tuning starts"
    )
    parser.add_argument(
        "--model", type=Path, default=Path("hub_configs/puma-emoji"), help="whose encoder made the cache"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/scales"))
    parser.add_argument("--count", type=int, default=48, help="held-out questions of each type")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    run([reading(name, scales, arguments) for name, scales in variants().items()], logs, arguments.jobs)
    pictures, tasks = load_pictures(str(arguments.data)), load_from_disk(str(arguments.tasks))
    settings = {"data": fingerprint(arguments.data), "tasks": fingerprint(arguments.tasks)}
    results = {
        name: measure_variant(arguments.out / name, arguments, pictures, tasks, settings) for name in variants()
    }
    write_json(arguments.out / "scales.json", {"steps": arguments.steps, "versions": versions(), "results": results})
    page = write_page(results)
    (arguments.out / "scales.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
