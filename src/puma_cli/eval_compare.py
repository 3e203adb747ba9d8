"""`puma eval compare`: results side by side, with the report's own rows beside them."""

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import UserError, one_line
from .eval_report import OTHERS, REPORT


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="results of runs side by side, with the report's",
        description="Print results of one evaluation side by side, with the report's own rows beside them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its results.json")
    parser.add_argument(
        "--plot", metavar="OUT.png", help="also draw the granularity curve: control against diversity over the scales"
    )


def run(args: argparse.Namespace) -> None:
    files = [find_results(name) for name in args.runs]
    if args.plot is not None:
        from .eval_plot import plot_granularity
        from .pictures import check_output

        plot_granularity(read_all(files), check_output(args.plot))
    print_results(files)
    if args.plot is not None:
        print(args.plot)


def find_results(name: str) -> Path:
    path = Path(name).expanduser()
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no results: {path} (an evaluation writes them when all its samples are done)")
    return path


def read_results(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {one_line(error)}") from error
    if not isinstance(results, dict) or not {"task", "scores", "settings", "num_samples"} <= results.keys():
        raise UserError(f"{file} is not the results file of an evaluation")
    return results


def read_all(files: list[Path]) -> list[dict[str, Any]]:
    """Raises `UserError` for results of different evaluations."""
    results = [read_results(file) for file in files]
    tasks = {result["task"] for result in results}
    if len(tasks) > 1:
        raise UserError(f"these are results of different evaluations: {', '.join(sorted(tasks))}")
    return results


def print_results(files: list[Path]) -> list[dict[str, Any]]:
    """Prints one or several results of the same evaluation, and returns them."""
    results = read_all(files)
    names = [chr(ord("A") + index) for index in range(len(results))]
    print(f"{results[0]['task']}, means with 95 % bootstrap intervals")
    for name, result in zip(names, results, strict=True):
        settings = result["settings"]
        print(f"{name}: {settings['model']} on {settings['data']}, {result['num_samples']} samples")
    for line in _differences(names, results):
        print(line)
    if any(result["scores"] for result in results):
        print("\n".join(["", *_align(_rows(names, results)), *_others(results[0])]))
    return results


def _differences(names: list[str], results: list[dict[str, Any]]) -> list[str]:
    """Settings that are not the same, so that numbers may not compare; model and data stand above."""
    keys = {key: None for result in results for key in result["settings"] if key not in ("model", "data")}
    values = {key: [json.dumps(result["settings"].get(key)) for result in results] for key in keys}
    return [
        f"  {key}: " + ", ".join(f"{name} {value}" for name, value in zip(names, found, strict=True))
        for key, found in values.items()
        if len(set(found)) > 1
    ]


def _rows(names: list[str], results: list[dict[str, Any]]) -> list[list[str]]:
    report = REPORT.get(results[0]["task"], {})
    lines = [["", "metric", *names, *(["report"] if report else [])]]
    rows = {row: None for result in results for row in result["scores"]}
    for row in rows:
        metrics = {name: None for result in results for name in result["scores"].get(row, {})}
        for metric in metrics:
            cells = [_cell(result["scores"].get(row, {}).get(metric)) for result in results]
            reported = [_number(report.get(row, {}).get(metric))] if report else []
            lines.append([_row_name(row), metric, *cells, *reported])
    return lines


def _row_name(row: str) -> str:
    return f"scale {row}" if row.isdigit() else row


def _cell(score: dict[str, float] | None) -> str:
    if score is None:
        return ""
    interval = f" [{_number(score['low'])}, {_number(score['high'])}]" if "low" in score else ""
    return _number(score["mean"]) + interval


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"


def _others(result: dict[str, Any]) -> list[str]:
    """The report's rows of other models, of the metrics that were measured."""
    others = OTHERS.get(result["task"], {})
    measured = {metric: None for scores in result["scores"].values() for metric in scores}
    metrics = [metric for metric in measured if any(metric in row for row in others.values())]
    if not metrics:
        return []
    lines = [["others in the report", *metrics]]
    lines += [[name, *(_number(row.get(metric)) for metric in metrics)] for name, row in others.items()]
    return ["", *_align(lines)]


def _align(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
