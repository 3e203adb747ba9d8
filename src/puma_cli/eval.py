"""`puma eval`: the report's tables and more, measured on any model.

Each run has a folder and goes on from where it was stopped. With several processes:

    torchrun --nproc-per-node 8 -m puma_cli eval reconstruction --model DIR --data imagenet/val --out runs/table1
"""

import argparse

from . import eval_compare, eval_editing, eval_features, eval_generation, eval_reconstruction, eval_understanding

EVALUATIONS = {
    "reconstruction": eval_reconstruction,
    "generation": eval_generation,
    "editing": eval_editing,
    "understanding": eval_understanding,
    "features": eval_features,
    "compare": eval_compare,
}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="measure a model as the report does",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluations = parser.add_subparsers(dest="evaluation", metavar="WHAT", required=True)
    for evaluation in EVALUATIONS.values():
        evaluation.add_parser(evaluations)


def run(args: argparse.Namespace) -> None:
    EVALUATIONS[args.evaluation].run(args)
