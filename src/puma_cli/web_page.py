"""The page of `puma demo`. Imports the libraries."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch
from fastapi import FastAPI
from PIL import Image

from diffusers_puma import PumaPipeline
from diffusers_puma.pipeline_puma import IMAGE_SCALE, TEXT_SCALE

from .answering import AnswerOptions, answer
from .errors import UserError, one_line
from .options import MAX_SEED
from .pictures import read_picture

AUTO = "auto"
MAX_PICTURES = 8  # of one scale in one call


def build_app(pipe: PumaPipeline, name: str) -> FastAPI:
    """The page as an application; `name` of the model is its title."""
    return gr.mount_gradio_app(FastAPI(), build_page(pipe, Path(name).name), path="/")


def build_page(pipe: PumaPipeline, title: str) -> gr.Blocks:
    """Tabs for what the model's parts can do: pictures from words (and pictures), reconstruction, answers."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        if pipe.mllm is not None:
            with gr.Tab("Draw"):
                _draw_tab(pipe)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(pipe)
        if pipe.mllm is not None:
            with gr.Tab("Ask"):
                _ask_tab(pipe)
    return page


def _draw_tab(pipe: PumaPipeline) -> None:
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", info="what to draw; with a picture, what to make of it")
            picture = gr.Image(label="Picture (optional)", type="filepath", image_mode=None)
            options = _options(pipe, f"auto is {TEXT_SCALE} for words alone and {IMAGE_SCALE} with a picture")
            button = gr.Button("Draw", variant="primary")
        gallery = gr.Gallery(label="Pictures", object_fit="contain", format="png")

    def draw(prompt, picture, scale, pictures, seed, steps, guidance):
        with _complaints():
            if not prompt.strip():
                raise UserError("a prompt is needed: what to draw")
            given = [[read_picture(picture)]] if picture else None
            return _draw(pipe, scale, pictures, seed, steps, guidance, prompt=prompt, image=given)

    gr.on([button.click, prompt.submit], draw, [prompt, picture, *options], gallery, concurrency_id="model")


def _reconstruct_tab(pipe: PumaPipeline) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(label="Picture", type="filepath", image_mode=None)
            options = _options(pipe, f"auto is {IMAGE_SCALE}, the finest; coarse scales vary the picture")
            button = gr.Button("Reconstruct", variant="primary")
        gallery = gr.Gallery(label="Pictures", object_fit="contain", format="png")

    def reconstruct(picture, scale, pictures, seed, steps, guidance):
        with _complaints():
            if picture is None:
                raise UserError("a picture is needed")
            return _draw(pipe, scale, pictures, seed, steps, guidance, image=read_picture(picture))

    button.click(reconstruct, [picture, *options], gallery, concurrency_id="model")


def _ask_tab(pipe: PumaPipeline) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(label="Picture", type="filepath", image_mode=None)
            question = gr.Textbox(label="Question")
            button = gr.Button("Ask", variant="primary")
        output = gr.Textbox(label="Answer")

    def ask(picture, question):
        with _complaints():
            if picture is None or not question.strip():
                raise UserError("a picture and a question are needed")
            inputs = pipe.processor.prepare_question([question], [[read_picture(picture)]])
            return answer(pipe.mllm, pipe.processor, inputs, AnswerOptions()).text

    gr.on([button.click, question.submit], ask, [picture, question], output, concurrency_id="model")


def _options(pipe: PumaPipeline, scale_info: str) -> list[gr.components.Component]:
    """Inputs of `_draw` after the pipeline, in its order."""
    scale = gr.Dropdown([AUTO, "all", *pipe.scales], value=AUTO, label="Scale", info=scale_info)
    with gr.Accordion("Sampling", open=False):
        return [
            scale,
            gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures", info="of each scale, from different noise"),
            gr.Number(0, label="Seed", info="empty for a random one", precision=0, minimum=0, maximum=MAX_SEED),
            gr.Slider(1, 1000, pipe.config.default_num_inference_steps, step=1, label="Denoising steps"),
            gr.Slider(1, 10, 2, step=0.1, label="Guidance", info="1 is none"),
        ]


def _draw(
    pipe: PumaPipeline, scale: int | str, number: float, seed: float | None, steps: float, guidance: float, **inputs
) -> list[tuple[Image.Image, str]]:
    """Pictures with their captions; `inputs` are the prompt and the pictures of the pipeline's call."""
    pictures = pipe(
        **inputs,
        scale=None if scale == AUTO else scale,
        num_images_per_prompt=int(number),
        num_inference_steps=int(steps),
        guidance_scale=guidance,
        generator=None if seed is None else torch.Generator().manual_seed(int(seed)),
    ).images
    if isinstance(pictures, dict):
        return [(item, f"scale {k}") for k, items in pictures.items() for item in items]
    return [(item, "") for item in pictures]


@contextmanager
def _complaints() -> Iterator[None]:
    """Shows on the page what is wrong with the input."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(one_line(error), print_exception=False) from error
