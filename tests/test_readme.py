"""Runs every command and snippet of the README, in a folder that looks like the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from .hub_server import HubServer
from .transformers_puma.conftest import TEXT, make_processor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split("#")[0].strip() for line in SHELL.splitlines()]
# Run by other tests, at sizes that a test can afford.
ELSEWHERE = ("make test", "make report", "python examples/emoji/train.py", "python examples/lora_style.py")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "hub_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "puma-release").mkdir()
    (folder / "puma-release/ckpts").symlink_to(ROOT / "tests/parity/data/official_release_tiny/ckpts")
    return folder


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_language_model(folder: Path) -> None:
    """In place of LLaMA-3 8B."""
    torch.manual_seed(0)
    tokenizer = make_processor(num_location_tokens=1).tokenizer
    LlamaForCausalLM(LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_encoder(folder: Path) -> None:
    """In place of CLIP-L/14, for decoders of 32 channels."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    CLIPVisionModel(config).save_pretrained(folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, checkout):
    if command.startswith(ELSEWHERE):
        return check_elsewhere(command)
    if command == "make demo":
        recipe = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, check=True, capture_output=True, text=True)
        command = re.search(r"python (examples/demo\.py.*)", recipe.stdout)[0]
    if command in ("puma demo", "puma serve"):
        return check_server(command, checkout)
    if command.startswith("puma init"):
        make_language_model(checkout / "llm")
        make_encoder(checkout / "vision")
        command = command.replace("meta-llama/Meta-Llama-3-8B", "llm").replace("open_clip:ViT-L-14/openai", "vision")
    program, *arguments = shlex.split(command)
    before = set(checkout.rglob("*"))
    output = run([sys.executable, *(["-m", "puma_cli"] if program == "puma" else []), *arguments], checkout)
    assert output.strip() or set(checkout.rglob("*")) - before


def check_server(command: str, folder: Path) -> None:
    """It listens at the address that the README says, and its first page comes; on a port of the test's own."""
    named = re.search(rf"{command} .*http://127.0.0.1:(\d+)", README)[1]
    program = [sys.executable, "-m", "puma_cli", command.split()[1]]
    assert f"default: {named}" in run([*program, "--help"], folder)
    process = subprocess.Popen([*program, "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[-1]
        for path in ("/docs", "/v1/models") if command == "puma serve" else ("/",):
            assert urllib.request.urlopen(f"{address}{path}").status == 200
    finally:
        process.kill()
        process.wait()


def check_elsewhere(command: str) -> None:
    """The commands that this test cannot run exist as they are written."""
    if command == "make test":
        recipe = subprocess.run(["make", "--dry-run", "test"], cwd=ROOT, check=True, capture_output=True, text=True)
        assert "-m pytest" in recipe.stdout and shutil.which("make")
        return
    if command == "make report":
        dry_run = ["make", "--dry-run", "--no-print-directory", "report"]
        recipe = subprocess.run(dry_run, cwd=ROOT, check=True, capture_output=True, text=True)
        lines = recipe.stdout.splitlines()[-3:]  # before them comes what is not there yet
        assert [Path(shlex.split(line)[1]).name for line in lines] == ["report.py", "report.py", "compare_scales.py"]
        for line in lines:
            check_options(line)
        return
    check_options(command)


def check_options(command: str) -> None:
    script, *arguments = shlex.split(command)[1:]
    options = run([sys.executable, script, "--help"], ROOT)
    assert all(argument in options for argument in arguments if argument.startswith("--"))


def test_snippets(checkout, tmp_path):
    """All Python blocks, one after the other, with a Hub of the test's own."""
    script = tmp_path / "snippets.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", README, re.S)))
    with HubServer(tmp_path / "hub") as hub:
        environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, script], cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (checkout / "runs/mine/model.safetensors").exists()
