"""`puma eval generation`: pictures drawn from captions (report tables 2 and 6), or for other benchmarks' scorers."""

import argparse
from typing import TYPE_CHECKING

from .errors import UserError
from .eval_options import (
    add_drawing_options,
    add_lpips_option,
    add_run_options,
    check_files,
    check_metrics,
    draw_benchmark,
    load_drawer,
    missing_packages_as_user_errors,
    process_device,
    run_evaluation,
)
from .model_source import find_model

if TYPE_CHECKING:
    from diffusers_puma.evaluation import Samples

# Each with the network of `Generation` that measures it.
METRICS = {"clip": "clip", "lpips": "lpips", "fid": "frechet", "frechet_alexnet": "frechet"}
DEFAULT = ["clip", "lpips", "fid"]
SEEDS = (0, 1)
BENCHMARKS = ("geneval", "dpg")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generation",
        help="CLIP-I, CLIP-T, LPIPS and FID of text to image (tables 2 and 6); pictures for GenEval and DPG-Bench",
        description="Draw pictures from captions and compare them with the caption, the true picture and another "
        "seed; or draw a benchmark's pictures for its own scorer.",
    )
    add_run_options(
        parser,
        "generation",
        "COCO 2014 (a folder with captions_val2014.json and val2014), parquet files or a data set with captions; "
        "with --benchmark, evaluation_metadata.jsonl of GenEval or the folder dpg_bench/prompts",
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="draw its pictures only, in its own layout")
    parser.add_argument(
        "--template", metavar="TEXT", help="prompts of a data set's columns, such as '{name} in {style} style'"
    )
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, help="(clip lpips fid, as far as there is something to compare)"
    )
    parser.add_argument("--clip", metavar="ARCH/TAG", help="of open_clip, or ARCH/FILE (ViT-B-32/openai)")
    parser.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's, for FID (default: downloaded)")
    add_drawing_options(parser, "0 1; 0 .. 3 with --benchmark")
    add_lpips_option(parser)


def run(args: argparse.Namespace) -> None:
    data, model = check_files(args), find_model(args.model)
    model.require_language_model("a prompt")
    if args.benchmark is not None:
        return draw_benchmark(args, model, data)
    metrics = check_metrics(args.metrics or DEFAULT)
    if {"fid", "frechet_alexnet"} <= metrics:
        raise UserError("--metrics: fid and frechet_alexnet are the same distance with different networks; choose one")
    with missing_packages_as_user_errors():
        from diffusers_puma.evaluation import (
            AlexNetEncoder,
            Generation,
            load_clip,
            load_inception,
            load_lpips,
            open_captions,
        )
        from diffusers_puma.evaluation.encoders import CLIP

        samples = open_captions(data, args.split, args.template)
        metrics -= _idle(metrics, samples, args)
        device = process_device(args)
        clip = load_clip(args.clip or CLIP, device) if "clip" in metrics else None
        alexnet = load_lpips(args.lpips_weights).to(device) if {"lpips", "frechet_alexnet"} & metrics else None
        frechet = load_inception(args.inception_weights, device) if "fid" in metrics else None
    if "frechet_alexnet" in metrics:
        frechet = AlexNetEncoder(alexnet)
    lpips = alexnet if "lpips" in metrics else None
    drawer = load_drawer(args, model, SEEDS)
    run_evaluation(args, Generation(drawer, args.out, clip, lpips, frechet), samples, model.name)


def _idle(metrics: set[str], samples: "Samples", args: argparse.Namespace) -> set[str]:
    """The metrics that would find nothing to compare.

    Raises:
        UserError: one of those that `--metrics` names.
    """
    from diffusers_puma.evaluation.generation import lacking

    needs = lacking(samples.have("image"), len(args.seeds or SEEDS))
    idle = {metric for metric in metrics if METRICS[metric] in needs}
    if args.metrics and idle:
        metric = min(idle)
        raise UserError(f"--metrics {metric} needs {needs[METRICS[metric]]}, and {args.data} has captions alone")
    return idle
