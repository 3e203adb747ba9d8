"""`puma eval compare`: results side by side, with the report's own rows beside them."""

import argparse
import json
from collections.abc import ItemsView
from pathlib import Path
from typing import Any

from puma_files import read_json

from .errors import UserError, shown
from .eval_report import INPUT_SCALES, OTHERS, REPORT

NEAR_ONE = ("clip_", "dino", "lpips", "nmse_")
LOSSES = {"lost_coding": "encoder and decoder", "lost_prediction": "prediction", "lost_drift": "drift"}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="results of runs side by side, with the report's",
        description="Print results of one evaluation side by side, with the report's own rows beside them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its results.json")
    add_plot_option(parser)


def add_plot_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot",
        metavar="OUT.png",
        help="also draw the results: for pictures the granularity curve, control against diversity over the scales",
    )


def run(args: argparse.Namespace) -> None:
    results = read_all([find_results(name) for name in args.runs])
    draw_results(results, args.plot)
    print_results(results)
    if args.plot is not None:
        print(args.plot)


def draw_results(results: list[dict[str, Any]], output: str | None) -> None:
    """`--plot`; nothing without it."""
    if output is not None:
        from .eval_plot import plot_results
        from .pictures import check_output

        plot_results(results, check_output(output))


def find_results(name: str) -> Path:
    path = Path(name).expanduser()
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no results: {path} (an evaluation writes them when all its samples are done)")
    return path


def read_results(file: Path) -> dict[str, Any]:
    results = read_json(file)
    settings = results.get("settings") if isinstance(results.get("settings"), dict) else {}
    missing = [name for name in ("task", "scores", "num_samples") if name not in results]
    missing += [f"settings.{name}" for name in ("model", "data") if name not in settings]
    if missing:
        raise UserError(f"{file} is not the results file of an evaluation: it has no {', '.join(missing)}")
    for row, scores in _items(results["scores"], f"{file}: scores"):
        for metric, score in _items(scores, f"{file}: scores of {row}"):
            if not isinstance(dict(_items(score, f"{file}: {metric} of {row}")).get("mean"), int | float):
                raise UserError(f"{file}: {metric} of {row} must have a number as mean, got {shown(score)}")
    return results


def _items(value: Any, what: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what} must be an object, got {shown(value)}")
    return value.items()


def read_all(files: list[Path]) -> list[dict[str, Any]]:
    """Raises `UserError` for results of different evaluations."""
    results = [read_results(file) for file in files]
    tasks = {result["task"] for result in results}
    if len(tasks) > 1:
        raise UserError(f"these are results of different evaluations: {', '.join(sorted(tasks))}")
    return results


def print_results(results: list[dict[str, Any]]) -> None:
    """Prints one or several results of the same evaluation."""
    names = [chr(ord("A") + index) for index in range(len(results))]
    print(f"{results[0]['task']}, means with 95 % bootstrap intervals")
    for name, result in zip(names, results, strict=True):
        settings = result["settings"]
        print(f"{name}: {settings['model']} on {settings['data']}, {result['num_samples']} samples")
    for line in _differences(names, results):
        print(line)
    if any(result["scores"] for result in results):
        print("\n".join(["", *_align(_rows(names, results)), *reported_rows(results)]))
    if results[0]["task"] == "features":
        print("\n".join(["", *_align(lost_quality(names, results))]))


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
    lines = [["", "metric", *names, "report"]]
    rows = {row: None for result in results for row in result["scores"]}
    for row in rows:
        metrics = {name: None for result in results for name in result["scores"].get(row, {})}
        for metric in metrics:
            cells = [_cell(result["scores"].get(row, {}).get(metric), metric) for result in results]
            lines.append([_row_name(row), metric, *cells, _number(report.get(row, {}).get(metric), metric)])
    # Of data and metrics that the report does not have it has no number, and then no column.
    return lines if any(line[-1] for line in lines[1:]) else [line[:-1] for line in lines]


def _row_name(row: str) -> str:
    return f"scale {row}" if row.isdigit() else row


def _cell(score: dict[str, float] | None, metric: str) -> str:
    if score is None:
        return ""
    interval = f" [{_number(score['low'], metric)}, {_number(score['high'], metric)}]" if "low" in score else ""
    return _number(score["mean"], metric) + interval


def _number(value: float | None, metric: str) -> str:
    """Metrics around 1 with four decimals; decibels, percent and Fréchet distances with two."""
    if value is None:
        return ""
    return f"{value:.{4 if metric.startswith(NEAR_ONE) else 2}f}"


def lost_quality(names: list[str], results: list[dict[str, Any]]) -> list[list[str]]:
    """Where each model loses its PSNR, in dB, scale by scale; at the end the largest loss."""
    lines = [["where PSNR is lost (dB)", *LOSSES.values(), "most in"]]
    for name, result in zip(names, results, strict=True):
        for scale in sorted(filter(str.isdigit, result["scores"])):
            measured = result["scores"][scale]
            if not LOSSES.keys() <= measured.keys():
                continue
            lost = {label: measured[metric]["mean"] for metric, label in LOSSES.items()}
            most = max(lost, key=lost.get)
            lines.append(
                [f"{name}, scale {scale}", *(f"{round(value, 2) + 0.0:.2f}" for value in lost.values()), most]
            )
    return lines


def reported_rows(results: list[dict[str, Any]]) -> list[str]:
    """Lines with the report's rows of other models, and of models that read one scale (table 5), as far as they have
    what was measured."""
    task = results[0]["task"]
    by_benchmark = task == "understanding"
    rows = [(row, metric) for result in results for row, metrics in result["scores"].items() for metric in metrics]
    columns = list(dict.fromkeys(row if by_benchmark else metric for row, metric in rows))
    lines = _table("others in the report", OTHERS.get(task, {}), columns)
    return lines + (_table("table 5, scales read", INPUT_SCALES, columns) if by_benchmark else [])


def _table(title: str, rows: dict[str, dict[str, float]], columns: list[str]) -> list[str]:
    """A heading and the rows that have a number, with an empty line before; nothing if none has."""
    columns = [column for column in columns if any(column in row for row in rows.values())]
    rows = {name: row for name, row in rows.items() if row.keys() & set(columns)}
    lines = [[name, *(_number(row.get(column), column) for column in columns)] for name, row in rows.items()]
    return ["", *_align([[title, *columns], *lines])] if lines else []


def _align(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
