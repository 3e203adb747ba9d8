"""`puma generate`: a picture from words, or from words and pictures."""

import argparse

from .model_source import find_model
from .options import add_model_options, add_output_option, add_sampling_options, check_best, scale_schedule_or_best
from .pictures import check_output, read_picture


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate", help="a picture from words, or from words and pictures", description=__doc__
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw; with --image, what to make of it")
    # One file each: with several, the option would take a prompt that follows it as one more file.
    parser.add_argument("--image", action="append", metavar="FILE", help="picture the prompt is about; repeatable")
    parser.add_argument(
        "--scale",
        type=scale_schedule_or_best,
        metavar="N|all|best|N:PART,..",
        help="0 (finest, follows a given picture closely) to 4 (coarsest); `all` for a sheet of every scale; `best` "
        "for the scale whose picture the model itself finds to fit the prompt best; `3:0.4,0` for the first 0.4 of "
        "the steps with scale 3 and the rest with scale 0 (default: 3, with --image 0)",
    )
    add_output_option(parser, "puma.png")
    add_sampling_options(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    output = check_output(args.output)
    given = [read_picture(file) for file in args.image or []]
    check_best(args.scale, args.prompt, given)
    model = find_model(args.model)
    model.require_decoders()
    model.require_scale(args.scale)
    model.require_language_model("a prompt")

    from diffusers_puma.pipeline_puma import IMAGE_SCALE, TEXT_SCALE

    from .drawing import draw, load_for, write_pictures
    from .scoring import caption_scorer

    pipe = load_for(args, model, IMAGE_SCALE if given else TEXT_SCALE)
    inputs = {"prompt": args.prompt}
    if given:
        inputs["image"] = [given]
    if args.scale == "best":
        inputs["scorer"] = caption_scorer(pipe.mllm, pipe.processor)
    write_pictures(draw(pipe, args, **inputs), output, args.prompt, given)
