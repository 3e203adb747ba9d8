"""`puma reconstruct`: a picture encoded and decoded again, without the language model."""

import argparse

from .model_source import find_model
from .options import add_model_options, add_output_option, add_sampling_options, scale_or_schedule
from .pictures import check_output, read_picture


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "reconstruct", help="a picture encoded and decoded again at one scale or all", description=__doc__
    )
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "--scale",
        type=scale_or_schedule,
        metavar="N|all|N:PART,..",
        help="0 (finest) to 4 (coarsest), `all`, or decoders in turn: `3:0.4,0` for the first 0.4 of the steps with "
        "scale 3 and the rest with scale 0 (default: 0)",
    )
    add_output_option(parser, "reconstruction.png")
    add_sampling_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    output = check_output(args.output)
    picture = read_picture(args.image)
    model = find_model(args.model)
    model.require_decoders()
    model.require_scale(args.scale)
    model.require_encoder()

    from diffusers_puma.pipeline_puma import IMAGE_SCALE

    from .drawing import draw, load_for, write_pictures

    pipe = load_for(args, model, IMAGE_SCALE)
    write_pictures(draw(pipe, args, image=picture), output, "reconstruction", [picture])
