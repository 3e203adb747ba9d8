"""`puma eval reconstruction`: pictures encoded and decoded again (report table 1)."""

import argparse

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
        "reconstruction",
        help="PSNR and LPIPS against the original and between seeds (table 1)",
        description="Encode and decode pictures: PSNR_r, LPIPS_r against the original, PSNR_d, LPIPS_d between seeds.",
    )
    add_run_options(
        parser,
        "reconstruction",
        "a folder of pictures (ImageNet's validation set), parquet files or a data set with an image column",
    )
    add_drawing_options(parser, "0 1")
    add_lpips_option(parser)


def run(args: argparse.Namespace) -> None:
    data, model = check_files(args), find_model(args.model)
    model.require_encoder()
    with missing_packages_as_user_errors():
        from diffusers_puma.evaluation import Reconstruction, load_lpips, open_pictures

        samples = open_pictures(data, args.split)
        lpips = load_lpips(args.lpips_weights)
    drawer = load_drawer(args, model, (0, 1))
    run_evaluation(args, Reconstruction(drawer, lpips.to(drawer.pipe.device)), samples, model.name)
