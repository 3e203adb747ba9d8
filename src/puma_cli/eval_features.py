"""`puma eval features`: where a model loses quality, from the encoder to the decoder."""

import argparse

from .errors import UserError
from .eval_options import (
    add_drawing_options,
    add_lpips_option,
    add_run_options,
    check_files,
    load_drawer,
    missing_packages_as_user_errors,
    run_evaluation,
)
from .model_source import find_model


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "features",
        help="where a model loses quality: encoder, prediction, drift or decoder",
        description="Compare features that the model writes freely, with teacher forcing and the true ones, and what "
        "the decoders make of each.",
    )
    add_run_options(
        parser,
        "features",
        "captions with true pictures, as for generation; with --edits, edits with their target",
    )
    parser.add_argument("--edits", action="store_true", help="the data are edits, with image, prompt and target")
    parser.add_argument(
        "--template", metavar="TEXT", help="prompts of a data set's columns, such as '{name} in {style} style'"
    )
    add_drawing_options(parser, "0")
    add_lpips_option(parser)


def run(args: argparse.Namespace) -> None:
    if args.edits and args.template:
        raise UserError("--template is for captions, and --edits have their own prompts")
    data, model = check_files(args), find_model(args.model)
    model.require_language_model("a prompt")
    with missing_packages_as_user_errors():
        from diffusers_puma.evaluation import FeatureErrors, load_lpips, open_captions, open_edits

        samples = open_edits(data, args.split) if args.edits else open_captions(data, args.split, args.template)
        truth = "target" if args.edits else "image"
        if not samples.have(truth):
            raise UserError(f"{data} has no true pictures: the column {truth} is missing")
        lpips = load_lpips(args.lpips_weights)
    drawer = load_drawer(args, model, (0,))
    run_evaluation(args, FeatureErrors(drawer, args.out, lpips.to(drawer.pipe.device)), samples, model.name)
