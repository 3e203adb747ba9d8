"""`puma eval understanding`: questions about pictures (report tables 4 and 5)."""

import argparse
from pathlib import Path

from .errors import UserError
from .eval_compare import draw_results, read_all, read_results
from .eval_options import add_run_options, check_files, choose_gpu, missing_packages_as_user_errors, report_results
from .eval_report import INPUT_SCALES
from .model_source import ModelSource, find_model
from .options import positive

BENCHMARKS = ("mmbench", "mme", "gqa", "vqav2", "pope", "vizwiz", "questions")
RESULTS = "results.json"
LAYOUTS = """\
what --data holds; in braces the part that --split names, with its default:
  mmbench    mmbench_{dev_20230712}.tsv
  mme        existence/, count/, .. of MME_Benchmark_release_version
  gqa        {testdev_balanced}_questions.json, images/
  vqav2      v2_OpenEnded_mscoco_{test-dev2015}_questions.json, v2_mscoco_{val2014}_annotations.json, test2015/, ..;
             of test-dev2015 also v2_OpenEnded_mscoco_test2015_questions.json
  pope       {coco}/coco_pope_random.json, .._popular.json, .._adversarial.json, val2014/
  vizwiz     {test}.json, {test}/
  questions  {test}.jsonl with image, question, answer and question_type, or a saved DatasetDict with these columns
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "understanding",
        help="answers to the questions of a benchmark (tables 4 and 5)",
        description="Ask a benchmark's questions in LLaVA-1.5's protocol, and write the submission file where answers "
        "are hidden. --out gets a folder for each benchmark.",
        epilog=LAYOUTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS, help="`questions` is a table of your own")
    add_run_options(parser, "understanding", "folder in the benchmark's own layout, see below")
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="DIR_OR_ID",
        help="in place of --model, models that read different scales: prints table 5 of all results in --out",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer, in tokens (128)"
    )


def run(args: argparse.Namespace) -> None:
    if args.models and args.model:
        raise UserError("--model and --models exclude each other")
    data = check_files(args)
    models = [find_model(name) for name in args.models or [args.model]]
    for model in models:
        model.require_language_model("a question")
    with missing_packages_as_user_errors():
        from transformers_puma.evaluation.understanding import find_benchmark

        benchmark = find_benchmark(args.benchmark)(data, args.split, args.limit)
    folder = Path(args.out, args.benchmark)
    if not args.models:
        _report(_evaluate(args, models[0], benchmark, folder), args.plot)
        return
    folders = [folder / model.name.strip("/").replace("/", "--") for model in models]
    for model, own in zip(models, folders, strict=True):
        _evaluate(args, model, benchmark, own)
    files = [own / RESULTS for own in folders]
    if all(file.is_file() for file in files):  # another process may still be at work
        draw_results(read_all(files), args.plot)
        print("\n".join(input_scales_table(sorted(Path(args.out).glob(f"*/*/{RESULTS}")))))


def _evaluate(args: argparse.Namespace, source: ModelSource, benchmark, folder: Path) -> Path | None:
    from transformers_puma.evaluation.understanding import evaluate_understanding

    from .loading import load_language_model, quiet_libraries

    choose_gpu()
    model, processor = load_language_model(source, args.device, args.dtype)
    with quiet_libraries():
        return evaluate_understanding(
            model,
            processor,
            benchmark,
            folder,
            model_name=source.name,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
        )


def _report(file: Path | None, plot: str | None) -> None:
    if file is None:
        return
    results = read_results(file)
    if results["submission"]:
        print(file.with_name(results["submission"]))
    report_results(file, results, plot)


def input_scales_table(files: list[Path]) -> list[str]:
    """Lines of the report's table 5 for results of any benchmarks: a row for each set of scales that a model reads,
    coarsest first, and the report's number in brackets.

    Raises:
        UserError: two results of one benchmark by models that read the same scales.
    """
    table: dict[tuple[int, ...], dict[str, float]] = {}
    for file in files:
        results = read_results(file)
        settings = results["settings"]
        row, name = table.setdefault(tuple(settings["input_scales"]), {}), settings["benchmark"]
        if name in row:
            scales = scales_name(settings["input_scales"])
            raise UserError(f"{file}: {name} was measured on another model that reads {scales} too")
        score = results["scores"].get(name, {}).get(results["headline"])  # none where answers are hidden
        row[name] = score and score["mean"]
    names = [name for name in BENCHMARKS if any(name in row for row in table.values())]
    lines = ["  ".join(["scales".ljust(10), *(name.rjust(18) for name in names)])]
    for scales in sorted(table, key=lambda scales: (len(scales), -scales[0])):
        label = scales_name(scales)
        cells = (_cell(table[scales].get(name), INPUT_SCALES.get(label, {}).get(name)) for name in names)
        lines.append("  ".join([label.ljust(10), *(cell.rjust(18) for cell in cells)]))
    return lines


def scales_name(scales: tuple[int, ...] | list[int]) -> str:
    """As in the report: `f3`, or `f4-f0` for a range; other sets `f4+f0`."""
    low, high = min(scales), max(scales)
    if low == high:
        return f"f{low}"
    if len(scales) == high - low + 1:
        return f"f{high}-f{low}"
    return "+".join(f"f{scale}" for scale in sorted(scales, reverse=True))


def _cell(value: float | None, reported: float | None) -> str:
    own = "" if value is None else f"{value:.1f}"
    return own if reported is None else f"{own} [{reported:.1f}]"
