"""Whether an adapter for one task is better at it than the model that is tuned on all of them:

    python examples/emoji/compare_adapters.py --pretrained runs/emoji/mllm_tuned --steps 80 --jobs 2

Tunes one LoRA adapter for each task, on its rows alone, from the same model, and puts the loss of held-out rows before
and after in one table (`adapters.md`, `adapters.json`). Each tuning resumes, and nothing that is done is done again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from comparing import add_arguments, tuning
from report_pages import markdown
from train import Stage, run

from transformers_puma.evaluation.runner import versions, write_json

TASKS = {"draw": "text to image", "ask": "understanding", "edit": "editing", "condition": "conditional generation"}

# Conditions were drawn of concepts that no training saw, the other tasks' rows are of unseen pairs.
HELD_OUT = {"condition": "heldout_concept"}


def adapting(task: str, arguments: argparse.Namespace) -> Stage:
    options = {
        "--warmup_steps": arguments.steps // 10,
        "--eval_on_start": True,
        "--own_feature_share": 0.0,  # trained on what is measured, features from true ones
        "--held_out": HELD_OUT.get(task, "heldout_pair"),
        "--lora_r": arguments.rank,
    }
    stage = tuning(task, task, arguments, options)
    return replace(stage, arguments=[*stage.arguments, *arguments.training])


def before_and_after(folder: Path) -> dict[str, float]:
    """Loss of held-out rows, and the adapter's size in bytes."""
    record = json.loads((folder / "training.json").read_text())
    losses = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    size = (folder / "adapter_model.safetensors").stat().st_size
    return {"before": losses[0], "after": losses[-1], "bytes": size}


def write_page(results: dict[str, dict]) -> str:
    rows = [
        [TASKS[task], f"{result['before']:.4f}", f"{result['after']:.4f}", f"{result['bytes']:,}"]
        for task, result in results.items()
    ]
    header = ["task", "loss of held-out rows, one model for all tasks", "with an adapter", "bytes of the adapter"]
    return "# One adapter for each task\n\n" + markdown(header, rows) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--pretrained", type=Path, default=Path("runs/emoji/mllm_tuned"), help="tuned on all tasks")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji/adapters"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks to try (all)")
    parser.add_argument("training", nargs="*", help="more options of the tunings, after --")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logs = arguments.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    run([adapting(task, arguments) for task in arguments.only], logs, arguments.jobs)
    results = {task: before_and_after(arguments.out / task) for task in arguments.only}
    write_json(arguments.out / "adapters.json", {"steps": arguments.steps, "versions": versions(), "results": results})
    page = write_page(results)
    (arguments.out / "adapters.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
