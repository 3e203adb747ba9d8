"""`puma serve` by OpenAI's own client, `puma demo` by Gradio's: against the pipeline on the same folder."""

import asyncio
import base64
import gc
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import httpx
import openai
import pytest
import torch
import uvicorn
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image, ImageChops

from diffusers_puma import PumaPipeline
from puma_cli import main, server
from puma_cli.answering import prepare
from puma_cli.pictures import read_picture
from puma_cli.server import build_app
from transformers_puma import PumaForConditionalGeneration, PumaProcessor

PICTURE = Path(__file__).parents[1] / "parity" / "data" / "official_release_tiny" / "input.png"
QUESTION = "what is it?"
LONG = 1500  # tokens


@contextmanager
def running(command: str, folder: Path, *options: str) -> Iterator[str]:
    """The address of a command's server, which stops without a traceback when it is interrupted."""
    arguments = [sys.executable, "-m", "puma_cli", command, "--model", str(folder), "--port", "0", *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    yield line.split()[-1]
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err


@contextmanager
def serving(pipe: PumaPipeline) -> Iterator[openai.OpenAI]:
    """A client of a server in this process, whose model can be watched."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(build_app(pipe, "full"), log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        server.should_exit = True
        thread.join()


@contextmanager
def watched(mllm: PumaForConditionalGeneration) -> Iterator[list[list[int]]]:
    """The answers that are written meanwhile, each as the positions in the sequence at which its steps begin."""
    answers: list[list[int]] = []

    def watch(module, args, kwargs):
        position = int(kwargs["position_ids"][0, 0])
        if position == 0:
            answers.append([])
        answers[-1].append(position)

    handle = mllm.register_forward_pre_hook(watch, with_kwargs=True)
    yield answers
    handle.remove()


@pytest.fixture(scope="module")
def client(full_folder) -> Iterator[openai.OpenAI]:
    with running("serve", full_folder) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pipe(full_folder) -> PumaPipeline:
    return PumaPipeline.from_pretrained(full_folder, dtype=torch.float32)


def pictures(response) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in response.data]


def assert_same(first: list[Image.Image], second: list[Image.Image]) -> None:
    assert len(first) == len(second)
    assert not any(ImageChops.difference(a, b).getbbox() for a, b in zip(first, second, strict=True))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_url(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(client: openai.OpenAI, **options):
    url = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
    parts = [image_url(url), {"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": parts}]
    return client.chat.completions.create(**{"model": "full", "messages": messages} | options)


def assert_in_turn(answers: list[list[int]]) -> None:
    """That no step of an answer is between those of another, and that only the last, of 4 tokens, came to its end."""
    for prompt, *steps in answers:
        assert prompt == 0 and steps == list(range(steps[0], steps[0] + len(steps)) if steps else [])
    assert all(len(steps) < LONG for steps in answers) and len(answers[-1]) == 4


class TestServe:
    def test_no_two_threads_use_one_tokenizer(self, pipe, monkeypatch):
        """It takes text for special tokens then, at times."""
        used: list[tuple[str, PumaProcessor]] = []

        def watch(processor, conversation):
            used.append(("begin", processor))
            time.sleep(0.2)
            inputs = prepare(processor, conversation)
            used.append(("end", processor))
            return inputs

        monkeypatch.setattr(server, "prepare", watch)
        with serving(pipe) as client, ThreadPoolExecutor() as threads:
            list(threads.map(lambda _: ask(client, max_tokens=1), range(3)))
        assert [moment for moment, _ in used] == ["begin", "end"] * 3
        assert all(processor is not pipe.processor for _, processor in used)

    def test_pictures_from_words(self, client, pipe):
        given = {"scale": 2, "seed": 5, "steps": 2, "guidance": 3}
        response = client.images.generate(prompt="a cat", n=2, size="16x16", extra_body=given)
        inputs = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": seeded(5), "width": 16, "height": 16}
        assert_same(pictures(response), pipe("a cat", scale=2, num_images_per_prompt=2, **inputs).images)

    def test_all_scales_and_schedules(self, client, pipe):
        response = client.images.generate(prompt="a cat", extra_body={"scale": "all", "seed": 5})
        expected = pipe("a cat", scale="all", generator=seeded(5)).images
        assert [item.scale for item in response.data] == list(expected)
        assert_same(pictures(response), [images[0] for images in expected.values()])
        response = client.images.generate(prompt="a cat", extra_body={"scale": "4:0.5,1", "seed": 5})
        assert_same(pictures(response), pipe("a cat", scale=[(0.5, 4), (1.0, 1)], generator=seeded(5)).images)
        assert len(client.images.generate(prompt="a cat", extra_body={"scale": "best"}).data) == 1

    def test_edits_and_variations(self, client, pipe):
        picture = read_picture(PICTURE)
        response = client.images.edit(image=PICTURE, prompt="red", extra_body={"seed": 5})
        assert_same(pictures(response), pipe("red", image=picture, generator=seeded(5)).images)
        response = client.images.edit(image=[PICTURE, PICTURE], prompt="both", extra_body={"seed": 5})
        assert_same(pictures(response), pipe("both", image=[[picture, picture]], generator=seeded(5)).images)
        with PICTURE.open("rb") as file, pytest.warns(DeprecationWarning):
            response = client.images.create_variation(image=file, n=2, extra_body={"scale": 3, "seed": 5})
        expected = pipe(image=picture, scale=3, num_images_per_prompt=2, generator=seeded(5)).images
        assert_same(pictures(response), expected)

    def test_answers_whole_and_in_pieces(self, client, pipe):
        expected = pipe.ask(read_picture(PICTURE), QUESTION, max_new_tokens=12)
        response = ask(client, max_tokens=12)
        assert response.choices[0].message.content == expected
        assert response.choices[0].finish_reason == "length" and response.usage.completion_tokens == 12
        chunks = [chunk.choices[0] for chunk in ask(client, max_tokens=12, stream=True)]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == expected
        assert len(chunks) > 3 and [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]

    def test_whoever_goes_away_in_an_answer_leaves_the_model_free(self, client, pipe):
        with ask(client, stream=True) as stream:
            next(stream)
            next(stream)
        expected = pipe.ask(read_picture(PICTURE), QUESTION, max_new_tokens=4)
        assert ask(client, max_tokens=4, timeout=60).choices[0].message.content == expected

    def test_answers_that_are_left_end_and_none_overlap(self, pipe):
        with serving(pipe) as client, watched(pipe.mllm) as answers:
            with ask(client, stream=True, max_tokens=LONG) as first:
                next(first)
                next(first)
                with ask(client, stream=True, max_tokens=LONG) as second:  # waits for its turn
                    next(second)
            ask(client, max_tokens=4)
        assert_in_turn(answers)
        assert len(answers[0]) > 1

    def test_an_answer_ends_that_is_left_while_something_is_sent(self, pipe):
        """By the protocol between server and application: of a client that reads no more, and then goes away."""
        app = build_app(pipe, "full")
        scope = {"type": "http", "http_version": "1.1", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        scope |= {"method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
        scope["headers"] = [(b"content-type", b"application/json")]

        async def request(leave_after: int, **fields) -> None:
            messages, gone, left = [body(fields)], asyncio.Event(), leave_after

            async def receive() -> dict:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict) -> None:
                nonlocal left
                left -= message["type"] == "http.response.body"
                if left == 0:
                    gone.set()
                    await asyncio.Event().wait()

            await app(scope, receive, send)

        def body(fields: dict) -> dict:
            fields["messages"] = [{"role": "user", "content": QUESTION}]
            return {"type": "http.request", "body": json.dumps(fields).encode()}

        async def requests() -> None:
            await request(3, stream=True, max_tokens=LONG)
            await request(9, max_tokens=4)

        gc.disable()  # it would close what is left open, some time
        try:
            with watched(pipe.mllm) as answers:
                asyncio.run(requests())
        finally:
            gc.enable()
        assert_in_turn(answers)

    def test_conversations_and_sampling(self, client):
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "bye"},
        ]
        greedy = [ask(client, messages=messages, max_completion_tokens=8, temperature=t) for t in (0, 0, 2)]
        first, second, _ = (response.choices[0].message.content for response in greedy)
        assert first == second
        sampled = {ask(client, max_tokens=8, temperature=2, top_p=0.99).choices[0].message.content for _ in range(3)}
        assert len(sampled) > 1

    def test_what_is_served(self, client):
        assert [model.id for model in client.models.list()] == ["full"]
        assert client.models.retrieve("full").id == "full"
        with pytest.raises(openai.NotFoundError, match="there is no model 'org/other' here, only 'full'"):
            client.models.retrieve("org/other")

    @pytest.mark.parametrize(("method", "path", "status"), [("get", "/nothing", 404), ("post", "/models", 405)])
    def test_routes_that_are_not_there(self, client, method, path, status):
        with pytest.raises(openai.APIStatusError) as caught:
            getattr(client, method)(path, cast_to=object)
        assert (caught.value.status_code, caught.value.type) == (status, "invalid_request_error")
        assert f"/v1{path}" in caught.value.body["message"]

    def test_null_is_not_given(self, client, pipe):
        given = {"scale": None, "steps": None, "seed": 5}
        response = client.images.generate(prompt="a cat", n=None, size=None, response_format=None, extra_body=given)
        assert_same(pictures(response), pipe("a cat", generator=seeded(5)).images)
        response = ask(client, max_tokens=4, temperature=None, extra_body={"stream": None})
        assert response.choices[0].message.content == pipe.ask(read_picture(PICTURE), QUESTION, max_new_tokens=4)

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"extra_body": {"scale": 7}}, "scale: must be 0 (finest) to 4 (coarsest) or all or best, got '7'"),
            ({"extra_body": {"scale": [3, 4]}}, "scale: must be a scale, all, best or a schedule"),
            ({"size": "big"}, "size: must be auto or WIDTHxHEIGHT in pixels, got 'big'"),
            ({"size": "15x16"}, "width must be a positive multiple of"),
            (
                {"size": "16x100000"},
                "size: neither side may have more than 32 pixels with this model, got '16x100000'",
            ),
            ({"n": 2, "extra_body": {"scale": "best"}}, "n: scale best gives the one picture that ranks first, got 2"),
            ({"n": 99}, "n: "),
            ({"quality": "high"}, "quality: "),
            ({"extra_body": {"seed": -1}}, "seed: "),
            ({"response_format": "url"}, "response_format: "),
            ({"prompt": "", "extra_body": {"scale": "best"}}, "scale best ranks pictures"),
        ],
    )
    def test_mistakes_about_pictures(self, client, options, text):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(**{"prompt": "a cat"} | options)
        assert text in caught.value.body["message"] and caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        ("body", "content_type", "text"),
        [
            ('{"prompt": ', "application/json", "the body is not valid JSON: Expecting value at character 11"),
            ("[1]", "application/json", "the body must be a JSON object, with the content type application/json"),
            (
                '{"prompt": "a"}',
                "text/plain",
                "the body must be a JSON object, with the content type application/json",
            ),
            ("", "application/json", "the body must be a JSON object, with the content type application/json"),
        ],
    )
    def test_bodies_that_are_no_object(self, client, body, content_type, text):
        response = httpx.post(
            f"{client.base_url}images/generations", content=body, headers={"content-type": content_type}
        )
        assert (response.status_code, response.json()["error"]["message"]) == (400, text)

    @pytest.mark.parametrize("temperature", [1e-300, 1e-45, -1, 3])
    def test_temperatures_that_cannot_be(self, client, temperature):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="temperature: "):
                ask(client, temperature=temperature, stream=stream, max_tokens=2)
        assert ask(client, temperature=1e-6, max_tokens=2).usage.completion_tokens == 2

    def test_mistakes_about_given_pictures(self, client, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(openai.BadRequestError, match="not a picture: text.png"):
            client.images.edit(image=tmp_path / "text.png", prompt="red")
        with pytest.raises(openai.BadRequestError, match="image: at most 10 pictures, got 11"):
            client.images.edit(image=[PICTURE] * 11, prompt="red")
        with pytest.raises(openai.BadRequestError, match="mask: "):
            client.images.edit(image=PICTURE, mask=PICTURE, prompt="red")
        with pytest.raises(openai.BadRequestError, match="it takes words, and no picture"):
            client.images.edit(image=PICTURE, prompt="red", extra_body={"scale": "best"})
        with pytest.raises(openai.NotFoundError, match="there is no model 'other' here, only 'full'"):
            client.images.generate(prompt="a cat", model="other")

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ([{"type": "image_url", "image_url": {"url": "http://host/a.png"}}], "nothing is fetched: 'http://host"),
            ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}], "is not base64"),
            ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,ä"}}], "content[0]: the data of the"),
            ([{"type": "input_audio", "input_audio": {}}], "messages[0].content[0] must be a text or an image_url"),
            (
                [{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}],
                "messages[0].content[0]: detail must be auto, as pictures are read in one size",
            ),
            ([{"type": "text", "text": "a", "name": "b"}], "must be a text or an image_url"),
            (5, "messages[0].content must be a text or a list of parts, got 5"),
        ],
    )
    def test_mistakes_in_messages(self, client, content, text):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, messages=[{"role": "user", "content": content}])
        assert text in caught.value.body["message"]
        with pytest.raises(openai.BadRequestError, match="a role of system, user, assistant"):
            ask(client, messages=[{"role": "tool", "content": "a"}])
        with pytest.raises(openai.BadRequestError, match="the last of messages must be the user's"):
            ask(client, messages=[])
        user, system = ({"role": role, "content": "a"} for role in ("user", "system"))
        with pytest.raises(openai.BadRequestError, match="chat template refuses the messages: unknown role system"):
            ask(client, messages=[user, system, user], stream=True)

    def test_errors_repeat_no_long_text(self, client):
        text = "x" * 10_000
        for request in (
            lambda: ask(client, messages=[{"role": "tool", "content": text}]),
            lambda: ask(client, messages=[{"role": "user", "content": {"text": text}}]),
            lambda: ask(client, messages=[{"role": "user", "content": [{"type": "video", "url": text}]}]),
            lambda: ask(client, messages=[{"role": "user", "content": [image_url(text)]}]),
            lambda: ask(client, model=text),
            lambda: client.images.generate(prompt="a cat", size=text),
            lambda: client.images.generate(prompt="a cat", extra_body={"scale": text}),
            lambda: client.images.generate(prompt="a cat", extra_body={"scale": f"3:{text},0"}),
            lambda: client.models.retrieve(text),
            lambda: client.get(f"/{text}", cast_to=object),
        ):
            with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
                request()
            assert 20 < len(caught.value.body["message"]) < 250

    def test_decoders_alone(self, decoders_folder):
        with running("serve", decoders_folder) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            with PICTURE.open("rb") as file, pytest.warns(DeprecationWarning):
                assert len(client.images.create_variation(image=file, extra_body={"scale": 1}).data) == 1
            with pytest.raises(openai.BadRequestError, match="language model"):
                client.images.generate(prompt="a cat")
            with pytest.raises(openai.BadRequestError, match="decoders has none"):
                ask(client, model="decoders")


class TestDemo:
    def test_the_page_draws_reconstructs_and_answers(self, full_folder, pipe):
        def shown(gallery: list[dict]) -> list[Image.Image]:
            return [Image.open(item["image"]) for item in gallery]

        picture = read_picture(PICTURE)
        with running("demo", full_folder) as address:
            page = Client(address, verbose=False)
            options = {"pictures": 2, "seed": 5, "steps": 2, "guidance": 3}
            inputs = {"num_images_per_prompt": 2, "num_inference_steps": 2, "guidance_scale": 3.0}
            drawn = page.predict("a cat", None, "auto", **options, api_name="/draw")
            assert_same(shown(drawn), pipe("a cat", **inputs, generator=seeded(5)).images)
            edited = page.predict("red", handle_file(PICTURE), "auto", **options, api_name="/draw")
            assert_same(shown(edited), pipe("red", image=picture, **inputs, generator=seeded(5)).images)
            copies = page.predict(handle_file(PICTURE), "all", **options, api_name="/reconstruct")
            expected = pipe(image=picture, scale="all", **inputs, generator=seeded(5)).images
            assert [item["caption"] for item in copies] == [f"scale {k}" for k in expected for _ in range(2)]
            assert_same(shown(copies), [item for items in expected.values() for item in items])
            answer = page.predict(handle_file(PICTURE), QUESTION, api_name="/ask")
            assert answer == pipe.ask(picture, QUESTION, max_new_tokens=128)
            with pytest.raises(AppError, match="a prompt is needed"):
                page.predict(" ", None, api_name="/draw")
            with pytest.raises(AppError, match="a picture is needed"):
                page.predict(None, api_name="/reconstruct")


class TestStart:
    @pytest.mark.parametrize("command", ["serve", "demo"])
    def test_mistakes(self, command, full_folder, language_model_folder, monkeypatch, capsys):
        def fails(*arguments) -> str:
            assert main([command, *map(str, arguments)]) == 2
            return capsys.readouterr().err

        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"cannot listen on 127.0.0.1:{port}: " in fails("--model", full_folder, "--port", port)
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
            port = taken.getsockname()[1]
            assert f"cannot listen on [::1]:{port}: " in fails("--model", full_folder, "--host", "::1", "--port", port)
        assert "has no decoders" in fails("--model", language_model_folder)
        assert "--port: must be a whole number from 0 to 65535, got '70000'" in fails("--port", 70000)
        for name in ("server", "web_page"):
            monkeypatch.delitem(sys.modules, f"puma_cli.{name}", raising=False)
        monkeypatch.setitem(sys.modules, "fastapi", None)
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert f"is not installed: pip install 'puma-hub[{command}]'" in fails("--model", full_folder, "--port", 0)

    def test_addresses_of_ipv6(self, decoders_folder):
        with running("serve", decoders_folder, "--host", "::1") as address:
            assert address.startswith("http://[::1]:")
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            assert [model.id for model in client.models.list()] == ["decoders"]
