"""The demo on a tiny model."""

from PIL import Image

from diffusers_puma import PumaPipeline
from examples.demo import PICTURE, main
from tests.diffusers_puma.conftest import make_decoder_components, make_language_model, make_processor


def test_one_sheet_and_an_answer(tmp_path, capsys):
    processor = make_processor()
    components = {**make_decoder_components(), "mllm": make_language_model(processor), "processor": processor}
    PumaPipeline(**components, default_num_inference_steps=2).save_pretrained(tmp_path / "model")
    capsys.readouterr()  # saving may import what prints
    out = tmp_path / "new" / "demo.png"
    assert main(["--model", str(tmp_path / "model"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Which colour is it?") and lines[-1].startswith(str(out))
    width, height = Image.open(out).size
    assert width > 6 * 128 and height > 4 * 128
    assert main(["--model", str(tmp_path / "model"), "--out", str(out), "--steps", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("demo: error: num_inference_steps must be")


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main(["--model", str(tmp_path), "--out", str(tmp_path / "demo.png")]) == 2
    assert capsys.readouterr().err.startswith(f"demo: error: {tmp_path} is not a model folder")
    assert PICTURE.is_file()
