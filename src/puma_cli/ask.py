"""`puma ask`: an answer to a question about a picture. Loads the language model only."""

import argparse

from .model_source import find_model
from .options import MAX_NEW_TOKENS, add_model_options, positive
from .pictures import read_picture


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("ask", help="an answer to a question about a picture", description=__doc__)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help=f"longest answer, in tokens (default: the model's own, or {MAX_NEW_TOKENS})",
    )
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    picture = read_picture(args.image)
    model = find_model(args.model)
    model.require_language_model("a question")

    from .answering import AnswerOptions, answer
    from .loading import load_language_model, quiet_libraries

    mllm, processor = load_language_model(model, args.device, args.dtype)
    inputs = processor.prepare_question([args.question], [[picture]])
    with quiet_libraries():
        result = answer(mllm, processor, inputs, AnswerOptions(args.max_new_tokens))
    print(result.text)
