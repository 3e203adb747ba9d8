"""`puma eval editing`: edited pictures (report table 3), or for other benchmarks' scorers."""

import argparse

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

METRICS = ("clip", "dino", "lpips")
BENCHMARKS = ("imgedit", "gedit")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "editing",
        help="CLIP-I, CLIP-T and DINO of edits (table 3); pictures for ImgEdit-Bench and GEdit-Bench",
        description="Edit pictures and compare them with their source, with the caption of what they should be and, "
        "in data that has it, with the true picture; or draw a benchmark's edits for its own scorer.",
    )
    add_run_options(
        parser,
        "editing",
        "the Emu-Edit test set, or parquet files or a data set with image, instruction and output_caption or target; "
        "with --benchmark, basic_edit.json of ImgEdit beside its pictures, or the data set GEdit-Bench",
    )
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="draw its edits only, in its own layout")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="(clip dino)")
    parser.add_argument("--clip", metavar="ARCH/TAG", help="of open_clip, or ARCH/FILE (ViT-B-32/openai)")
    parser.add_argument("--dino", metavar="DIR_OR_ID", help="of transformers (facebook/dino-vits16)")
    add_drawing_options(parser, "0")
    add_lpips_option(parser)


def run(args: argparse.Namespace) -> None:
    data, model = check_files(args), find_model(args.model)
    model.require_language_model("a prompt")
    if args.benchmark is not None:
        return draw_benchmark(args, model, data)
    metrics = check_metrics(args.metrics or ["clip", "dino"])
    with missing_packages_as_user_errors():
        from diffusers_puma.evaluation import Editing, load_clip, load_dino, load_lpips, open_edits
        from diffusers_puma.evaluation.encoders import CLIP, DINO

        samples = open_edits(data, args.split)
        device = process_device(args)
        clip = load_clip(args.clip or CLIP, device) if "clip" in metrics else None
        dino = load_dino(args.dino or DINO, device) if "dino" in metrics else None
        lpips = load_lpips(args.lpips_weights).to(device) if "lpips" in metrics else None
    drawer = load_drawer(args, model, (0,))
    run_evaluation(args, Editing(drawer, clip, dino, lpips), samples, model.name)
