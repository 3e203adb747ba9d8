"""What keeps the code base in shape: where imports may go, and that nothing is vendored."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports; relative imports are resolved against its package."""
    names = set()
    package = path.relative_to(ROOT / "src").parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def importers(package: str) -> list[Path]:
    return [path for path in SOURCES if path.relative_to(ROOT / "src").parts[0] == package]


def reaches(path: Path, *packages: str) -> set[str]:
    return {n for n in imported_modules(path) if any(n == p or n.startswith(f"{p}.") for p in packages)}


def test_the_language_model_knows_no_decoder():
    for path in importers("transformers_puma"):
        assert not reaches(path, "diffusers_puma", "diffusers", "puma_cli"), path


def test_the_decoders_know_no_command_line():
    for path in importers("diffusers_puma"):
        assert not reaches(path, "puma_cli"), path


@pytest.mark.parametrize("package", ["transformers_puma", "diffusers_puma"])
def test_the_models_do_not_know_their_training(package):
    for path in importers(package):
        if path.parent.name == package:
            assert not reaches(path, f"{package}.training", "transformers.Trainer", "trl", "peft"), path


def test_the_first_stage_knows_no_decoder_and_the_second_no_text():
    """The pipeline is cut at the features."""
    stages = ROOT / "src/diffusers_puma"
    assert not reaches(stages / "feature_stage.py", "diffusers_puma.unet_puma", "diffusers_puma.decoder_stage")
    assert not reaches(stages / "decoder_stage.py", "transformers", "diffusers_puma.feature_stage")
    assert not reaches(stages / "unet_puma.py", "transformers", "transformers_puma")


def test_granularity_and_loss_are_pure_functions():
    for name in ("granularity.py", "loss_puma.py"):
        tree = ast.parse((ROOT / "src/transformers_puma" / name).read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], name


def test_what_remote_code_needs_is_flat():
    """`trust_remote_code` copies sibling modules imported as `from .x import y`, and nothing else."""
    package = ROOT / "src/transformers_puma"
    todo = ["configuration_puma.py", "modeling_puma.py", "processing_puma.py", "image_processing_puma.py"]
    seen = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((package / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, (name, ast.unparse(node))
                todo.append(f"{node.module}.py")
    assert "granularity.py" in seen
    shipped = {path.name for path in (ROOT / "hub_configs/puma-emoji").glob("*.py")}
    assert seen == shipped


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_file_is_vendored_or_too_long(path):
    text = path.read_text()
    assert not re.search(r"#\s*Copied from", text)
    assert not re.search(r"Copyright \d{4}", text)
    assert len(text.splitlines()) <= 450


def test_nothing_unpickles_code():
    for path in [*SOURCES, *(ROOT / "examples").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"\b(pickle|joblib|dill)\b\.", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_the_shipped_models_copy_of_the_code_is_this_code():
    """For `trust_remote_code`. After a change: `cp src/transformers_puma/NAME hub_configs/puma-emoji/`."""
    copies = sorted((ROOT / "hub_configs/puma-emoji").glob("*.py"))
    assert "modeling_puma.py" in {path.name for path in copies}
    for path in copies:
        assert path.read_text() == (ROOT / "src/transformers_puma" / path.name).read_text(), path.name
