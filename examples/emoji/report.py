"""Measure a small PUMA on what no training saw, and write it down: all tables, plots and sheets with one command:

    python examples/emoji/report.py --model hub_configs/puma-emoji --out runs/emoji/report

Writes `report.json`, `report.md` and PNG files into `--out`. Each finished sample is kept there, so the same command
goes on where it was stopped, and a larger `--count` adds to a smaller one; another model or judge needs another
folder. What starts from pictures alone (reconstruction) also works on other data, such as that of build_stamps.py.
"""

import argparse
import json
from pathlib import Path

import report_edits
import report_questions
import report_reconstruction
import report_scenes
import report_text_to_image
import torch
from datasets import DatasetDict, load_from_disk
from emoji_training import load_pictures
from judge import Judge
from measuring import Bench, fingerprint
from report_pages import write_page
from report_plots import write_plots

from diffusers_puma import PumaPipeline
from transformers_puma.evaluation.runner import versions, write_json

CONTACT_SHEET = 8  # prompts


def measure(bench: Bench, tasks: DatasetDict | None, count: int) -> dict:
    """The results of all parts that the data has."""
    quarter, half = max(1, count // 4), max(1, count // 2)
    results = {"reconstruction": report_reconstruction.run(bench, count)}
    if tasks is not None:
        results["text_to_image"] = report_text_to_image.run(bench, count)
        results["features"] = report_text_to_image.run_features(bench, count, results["text_to_image"]["table"])
        results["scenes"] = report_scenes.run(bench, tasks["prompts"], half)
        results["edits"] = report_edits.run(bench, "edits", tasks["edits"], quarter)
        results["conditions"] = report_edits.run(bench, "conditions", tasks["conditions"], quarter)
        results["questions"] = report_questions.run(bench, tasks, half)
    return results


def write_sheets(bench: Bench, results: dict, out: Path) -> None:
    """One sheet of random held-out examples a task: input, output, truth."""
    sheets = {"reconstruction": lambda: report_reconstruction.sheet(bench, results["reconstruction"])}
    if "text_to_image" in results:
        sheets["text_to_image"] = lambda: report_text_to_image.sheet(bench, results["text_to_image"], CONTACT_SHEET)
        sheets["scenes"] = lambda: report_scenes.sheet(bench, results["scenes"])
        for part in ("edits", "conditions"):
            sheets[part] = lambda part=part: report_edits.sheet(bench, part, results[part])
        sheets["questions"] = lambda: report_questions.sheet(bench, results["questions"])
    for name, make in sheets.items():
        make().save(out / f"{name}.png")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("hub_configs/puma-emoji"))
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--tasks", type=Path, default=Path("data/emoji-evaluation"), help="of emoji_evaluation.py")
    parser.add_argument("--judge", type=Path, default=Path("runs/emoji/judge"), help="of train_judge.py")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/report"))
    parser.add_argument("--samples", type=Path, help="folder of the finished samples (default: OUT/samples)")
    parser.add_argument("--lpips-weights", type=Path, help="AlexNet's, default those that load_lpips downloads once")
    parser.add_argument("--count", type=int, default=48, help="held-out samples of a part")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = load_pictures(str(arguments.data))
    from_words = "heldout_pair" in pictures
    tasks = load_from_disk(str(arguments.tasks)) if from_words else None
    judge = Judge.load(arguments.judge) if from_words else None
    pipe = PumaPipeline.from_pretrained(arguments.model, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    # Paths do not decide numbers; what is in them does.
    settings = {"model": fingerprint(arguments.model), "data": fingerprint(arguments.data)}
    settings |= {"num_inference_steps": pipe.config.default_num_inference_steps}
    if from_words:
        settings |= {"judge": fingerprint(arguments.judge), "tasks": fingerprint(arguments.tasks)}
    judge = judge and judge.to(device)
    folder = arguments.samples or arguments.out / "samples"
    bench = Bench(pipe, judge, pictures, folder, settings, arguments.lpips_weights)

    results = measure(bench, tasks, arguments.count)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_sheets(bench, results, arguments.out)
    plots = write_plots(results, arguments.out)
    described = settings | {"path of the model": str(arguments.model), "path of the data": str(arguments.data)}
    if from_words:
        described["judge on real pictures"] = judge_ceiling(arguments.judge)
    write_json(arguments.out / "report.json", {"settings": described, "versions": versions(), **results})
    page = write_page(results, described, plots)
    (arguments.out / "report.md").write_text(page, encoding="utf-8")
    print(page)


def judge_ceiling(folder: Path) -> dict:
    """What training measured of the judge on real held-out pictures."""
    return json.loads((folder / "training.json").read_text())["measured"]


if __name__ == "__main__":
    main()
