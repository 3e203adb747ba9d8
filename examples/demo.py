"""What a model can do, on one sheet: pictures of a few prompts, and a real picture decoded again, at all its scales.

    python examples/demo.py

Writes outputs/demo.png and prints the model's answer to a question about the picture. Without `--model` the small one
of the checkout draws; its training held back what is asked of it here: the picture's concept in every style, each
prompt's concept in that style, and scenes with both things of the last one.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from diffusers_puma import PumaPipeline
from diffusers_puma.contact_sheet import contact_sheet
from puma_cli.errors import one_line
from puma_cli.loading import load_pipeline, quiet_libraries
from puma_cli.model_source import find_model
from puma_cli.pictures import check_output, read_picture, write_png

PROMPTS = [
    "tangerine in noto style",
    "green heart in twemoji style",
    "glowing star in fluent 3d style",
    "a pizza to the left of a red heart in twemoji style",
]
PICTURE = Path(__file__).parent / "assets" / "strawberry.png"
QUESTION = "Which colour is it?"
CELL = 128  # pixels


def draw_sheet(
    pipe: PumaPipeline, prompts: list[str], picture: Image.Image, answer: str, steps: int | None
) -> Image.Image:
    """A row of all scales for each prompt, and one for the picture and its reconstructions."""
    options = {"scale": "all", "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    drawn = pipe(prompt=prompts, **options).images
    rows = [(prompt, [images[row] for images in drawn.values()]) for row, prompt in enumerate(prompts)]
    decoded = pipe(image=picture, **options).images
    label = f"reconstruction of a picture. {QUESTION} {answer}"
    rows.append((label, [*(images[0] for images in decoded.values()), picture]))
    titles = [f"scale {scale}: {pipe.mllm.config.tokens_per_scale[scale]} tokens" for scale in drawn]
    return contact_sheet(rows, [*titles, "the picture"], CELL)


def run(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or Hub id (default: the small model of the checkout)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="PROMPT", help="what to draw")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="what to reconstruct and to ask about")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo.png"), help="sheet to write")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    check_output(options.out)
    picture = read_picture(options.picture)
    model = find_model(options.model)
    model.require_decoders()
    model.require_language_model("the demo")
    pipe = load_pipeline(model, model.decoders)
    with quiet_libraries():
        answer = pipe.ask(picture, QUESTION, max_new_tokens=32)
        sheet = draw_sheet(pipe, options.prompts, picture, answer, options.steps)
    write_png(sheet, options.out)
    print(f"{QUESTION} {answer}")
    print(f"{options.out} ({time.perf_counter() - start:.0f} s)")


def main(arguments: list[str] | None = None) -> int:
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"demo: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
