"""The command line as users call it: what it writes and prints, and one line for each of their mistakes.

Commands run in this process, but for two that check a fresh one.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import puma_cli
from diffusers_puma import PumaPipeline
from puma_cli import main
from puma_cli.pictures import check_output, read_picture, write_png

RELEASE = Path(__file__).parents[1] / "parity" / "data" / "official_release_tiny"
PICTURE = RELEASE / "input.png"
SIZE = (16, 16)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder: `run(*arguments)` -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    # A model's name that is no folder must not send the tests to the network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def fails(run, tmp_path):
    """`fails(text, *arguments)`: the command leaves one line on stderr that holds `text`, and no file.

    With `loading=True` it fails while a model is loaded: the libraries' progress bars stand before that line.
    """

    def call(text: str, *arguments, loading: bool = False) -> None:
        before = sorted(tmp_path.rglob("*"))
        status, out, err = run(*arguments)
        *bars, message = err.removesuffix("\n").split("\n")
        assert (status, out) == (2, "")
        assert message.startswith("puma: error: ") and text in message
        assert all("Loading" in bar for bar in bars) if loading else not bars
        assert sorted(tmp_path.rglob("*")) == before

    return call


def copy(folder: Path, target: Path, without: str = "") -> Path:
    """A copy of a model folder, but for the files that match a pattern."""
    shutil.copytree(folder, target)
    for file in target.glob(without) if without else []:
        file.unlink()
    return target


@pytest.fixture
def unloadable(full_folder, decoders_folder, language_model_folder, tmp_path) -> SimpleNamespace:
    """The folders with every weight file removed: whoever tried to load them would not come to the error at hand."""
    folders = {"full": full_folder, "decoders": decoders_folder, "language_model": language_model_folder}
    return SimpleNamespace(
        **{name: copy(folder, tmp_path / name, "**/*.safetensors") for name, folder in folders.items()}
    )


def pixels(file: Path) -> np.ndarray:
    return np.array(Image.open(file))


class TestStart:
    def test_help_and_info_import_no_torch(self):
        code = f"""if True:
            import sys
            from puma_cli import main
            assert main(["info", {str(RELEASE / "ckpts" / "clip-vit-large-patch14")!r}]) == 0
            assert main(["generate", "a cat", "--scale", "7"]) == 2
            assert main(["reconstruct", "missing.png"]) == 2
            try:
                main(["--help"])
            except SystemExit as stop:
                assert stop.code == 0
            try:
                main(["--version"])
            except SystemExit as stop:
                assert stop.code == 0
            assert not {{"torch", "transformers", "diffusers"}} & set(sys.modules)
        """
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for command in puma_cli.COMMANDS:
            assert command in done.stdout

    def test_a_mistake_outside_of_a_checkout(self, tmp_path):
        shutil.copytree(Path(puma_cli.__file__).parent, tmp_path / "site" / "puma_cli")
        command = [sys.executable, "-m", "puma_cli", "generate", "a cat"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("puma: error: --model is required") and done.stderr.count("\n") == 1

    def test_program_errors_keep_their_traceback(self, run, monkeypatch):
        def broken(args):
            raise TypeError("a fault of the program")

        monkeypatch.setattr(puma_cli.COMMANDS["info"], "run", broken)
        with pytest.raises(TypeError, match="a fault of the program"):
            run("info")

    def test_messages_of_libraries_become_one_line(self, run, monkeypatch):
        def refused(args):
            raise OSError("no such thing:\n\n  - look here\n  - or there")

        monkeypatch.setattr(puma_cli.COMMANDS["info"], "run", refused)
        assert run("info") == (2, "", "puma: error: no such thing: - look here - or there\n")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ([], "COMMAND"),
            (["paint"], "invalid choice: 'paint'"),
            (["generate"], "PROMPT"),
            (["generate", "a", "--scale", "7"], "--scale: must be 0 (finest) to 4 (coarsest) or all or best, got '7'"),
            (["generate", "a", "--scale", "-1"], "--scale"),
            (["reconstruct", PICTURE, "--scale", "best"], "--scale: must be 0 (finest) to 4 (coarsest) or all, got"),
            (["generate", "a", "--steps", "0"], "--steps"),
            (["generate", "a", "--seed", "x"], "--seed"),
            (["generate", "a", "--guidance", "nan"], "--guidance"),
            (["generate", "a", "--dtype", "int8"], "--dtype"),
            (["generate", "a", "-o", "missing/a.png"], "no such folder for the output: missing"),
            (["generate", "a", "--scale", "3:0.9,2:0.4,0"], "parts of the steps must rise to 1, as in 3:0.4,0"),
            (["generate", "a", "--scale", "3:0.4,0:0.9"], "parts of the steps must rise to 1"),
            (["generate", "a", "--scale", "3,0"], "up to which it draws, as in 3:0.4,0, got '3,0'"),
            (["generate", "a", "--scale", "3:0.4,8"], "must be 0 (finest) to 4 (coarsest), got '8'"),
            (["generate", "a", "-o", "a.jpg"], "must be a .png file, got a.jpg"),
            (["generate", "a", "--image", "missing.png"], "no such file: missing.png"),
            (["generate", "a", "--image", __file__], "not a picture: "),
            (["generate", "a", "--image", PICTURE, "--scale", "best"], "no picture"),
            (["generate", " ", "--scale", "best"], "it takes words"),
            (["generate", "a", "--model", "missing"], "no such model folder: missing"),
            (["generate", "a", "--model", "./missing/too"], "no such model folder: missing/too"),
            (["generate", "a", "--model", "nobody/nothing"], "there is no folder nobody/nothing"),
            (["generate", "a", "--model", __file__], "is a file"),
            (["generate", "a", "--model", RELEASE], "is not a model folder"),
            (["reconstruct", "missing.png"], "no such file"),
            (["reconstruct", RELEASE], "not a file"),
            (["reconstruct", PICTURE, "-o", "missing/a.png"], "no such folder for the output"),
            (["ask", "missing.png", "what?"], "no such file"),
            (["ask", PICTURE], "QUESTION"),
            (["convert", "missing", "target"], "no such folder: missing"),
            (["convert", RELEASE, RELEASE], "must be a new or an empty folder"),
            (["convert", RELEASE / "ckpts", "target"], "laid out like the release"),
            (["info", "missing"], "no such model folder"),
        ],
    )
    def test_arguments_and_files(self, fails, arguments, text):
        fails(text, *arguments)

    def test_models_before_anything_is_loaded(self, fails, unloadable):
        fails("has no decoders", "generate", "a", "--model", unloadable.language_model)
        fails("has no decoders", "reconstruct", PICTURE, "--model", unloadable.language_model)
        fails("a prompt needs a language model", "generate", "a", "--model", unloadable.decoders)
        fails("a question needs a language model", "ask", PICTURE, "what?", "--model", unloadable.decoders)
        fails("only for 1, 3, 4", "reconstruct", PICTURE, "--scale", "2", "--model", unloadable.decoders)
        fails("is a single decoder", "reconstruct", PICTURE, "--model", unloadable.full / "unet_0")
        fails("no such folder for the output", "generate", "a", "-o", "no/a.png", "--model", unloadable.full)
        (unloadable.full / "model_index.json").write_text("{")
        fails("model_index.json is not valid JSON", "generate", "a", "--model", unloadable.full)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
    def test_no_gpu(self, fails, unloadable):
        fails("there is no GPU", "generate", "a", "--device", "cuda", "--model", unloadable.full)

    def test_no_weights(self, fails, unloadable):
        fails("holds no weights", "reconstruct", PICTURE, "--model", unloadable.decoders)
        fails("holds no weights", "ask", PICTURE, "what?", "--model", unloadable.full)

    @pytest.mark.parametrize(
        ("part", "weight"),
        [
            ("mllm/model.safetensors", "image_head.bias"),
            ("unet_3/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ],
    )
    @pytest.mark.parametrize("shape", [None, (3,)])
    def test_weights_that_do_not_fit(self, fails, full_folder, tmp_path, part, weight, shape):
        file = copy(full_folder, tmp_path / "model") / part
        weights = load_file(file)
        del weights[weight]
        save_file(weights | ({weight: torch.zeros(shape)} if shape else {}), file, metadata={"format": "pt"})
        fails(weight, "generate", "a", "--model", tmp_path / "model", loading=True)

    @pytest.mark.parametrize("part", ["mllm/model", "unet_3/diffusion_pytorch_model"])
    def test_pointers_in_place_of_weights(self, fails, full_folder, tmp_path, part):
        file = copy(full_folder, tmp_path / "model") / f"{part}.safetensors"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        fails("", "generate", "a", "--model", tmp_path / "model", loading=True)
        fails("no complete safetensors file", "info", tmp_path / "model")
        file.write_bytes((full_folder / f"{part}.safetensors").read_bytes()[:-1])
        fails("no complete safetensors file", "info", tmp_path / "model")


class TestGenerate:
    def test_one_picture(self, run, full_folder, tmp_path):
        status, out, err = run("generate", "a cat", "--model", full_folder)
        assert (status, out) == (0, "puma.png\n")
        assert "scale 3" in err and "LOAD REPORT" not in err and "Warning" not in err
        pipe = PumaPipeline.from_pretrained(full_folder)
        expected = pipe("a cat", scale=3, generator=torch.Generator().manual_seed(0)).images[0]
        assert (pixels(tmp_path / "puma.png") == np.array(expected)).all()

    def test_options_reach_the_pipeline(self, run, full_folder, tmp_path):
        options = ["--seed", "5", "--steps", "2", "--guidance", "1", "--scale", "4", "--dtype", "float32"]
        assert run("generate", "a cat", "--model", full_folder, "-o", "a.png", *options)[:2] == (0, "a.png\n")
        pipe = PumaPipeline.from_pretrained(full_folder, scales=[4])
        generator = torch.Generator().manual_seed(5)
        expected = pipe("a cat", scale=4, num_inference_steps=2, guidance_scale=1, generator=generator).images[0]
        assert (pixels(tmp_path / "a.png") == np.array(expected)).all()

    def test_reads_only_the_decoder_asked_for(self, run, full_folder, tmp_path):
        model = copy(full_folder, tmp_path / "model", without="unet_[012]/*.safetensors")
        model = copy(model, tmp_path / "fewer", without="unet_4/*.safetensors")
        assert run("generate", "a cat", "--model", model)[0] == 0
        assert run("generate", "a cat", "--model", model, "--scale", "4")[0] == 2

    def test_all_scales_and_the_best(self, run, full_folder, tmp_path):
        status, out, _ = run("generate", "a cat", "--model", full_folder, "--scale", "all", "-o", "cat.png")
        files = ["cat.png", *(f"cat_{scale}.png" for scale in range(5))]
        assert status == 0 and out.split() == files
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(files)
        assert all(Image.open(file).size == SIZE for file in files[1:])
        assert Image.open("cat.png").width > 5 * 128
        pictures = [pixels(file).tolist() for file in files[1:]]

        assert run("generate", "a cat", "--model", full_folder, "--scale", "best", "-o", "best.png")[0] == 0
        assert pixels(Path("best.png")).tolist() in pictures

    def test_decoders_in_turn(self, run, full_folder, tmp_path):
        command = ("generate", "a cat", "--model", full_folder, "--steps", 2)
        assert run(*command, "--scale", "3:0.5,0", "-o", "turns.png")[0] == 0
        assert run(*command, "--scale", 3, "-o", "coarse.png")[0] == 0
        turns, coarse = ((tmp_path / name).read_bytes() for name in ("turns.png", "coarse.png"))
        assert turns != coarse

    def test_with_pictures(self, run, full_folder, tmp_path):
        images = ["--image", PICTURE, "--image", RELEASE / "input.png"]
        assert run("generate", "swap", *images, "--model", full_folder, "--scale", "4")[:2] == (0, "puma.png\n")
        pipe = PumaPipeline.from_pretrained(full_folder, scales=[4])
        picture = Image.open(PICTURE).convert("RGB")
        output = pipe("swap", image=[[picture, picture]], scale=4, generator=torch.Generator().manual_seed(0))
        assert (pixels(tmp_path / "puma.png") == np.array(output.images[0])).all()

    def test_a_prompt_after_a_picture(self, run, full_folder, tmp_path):
        assert run("generate", "--model", full_folder, "--image", PICTURE, "swap")[:2] == (0, "puma.png\n")
        after = (tmp_path / "puma.png").read_bytes()
        assert run("generate", "swap", "--model", full_folder, "--image", PICTURE)[0] == 0
        assert (tmp_path / "puma.png").read_bytes() == after

    def test_model_of_the_checkout(self, run, full_folder, tmp_path, monkeypatch):
        copy(full_folder, tmp_path / "hub_configs" / "puma-emoji")
        (tmp_path / "notebooks").mkdir()
        monkeypatch.chdir(tmp_path / "notebooks")
        status, out, _ = run("info")
        assert status == 0 and str(tmp_path / "hub_configs" / "puma-emoji") in out
        assert run("generate", "a cat", "--scale", "4")[:2] == (0, "puma.png\n")


class TestReconstruct:
    def test_nearest_scale_by_default(self, run, decoders_folder, tmp_path):
        assert run("reconstruct", PICTURE, "--model", decoders_folder)[:2] == (0, "reconstruction.png\n")
        pipe = PumaPipeline.from_pretrained(decoders_folder)
        picture = Image.open(PICTURE).convert("RGB")
        expected = pipe(image=picture, scale=1, generator=torch.Generator().manual_seed(0)).images[0]
        assert (pixels(tmp_path / "reconstruction.png") == np.array(expected)).all()

    def test_all_scales_that_are_there(self, run, decoders_folder):
        status, out, _ = run("reconstruct", PICTURE, "--model", decoders_folder, "--scale", "all", "-o", "r.png")
        assert status == 0 and out.split() == ["r.png", "r_1.png", "r_3.png", "r_4.png"]


class TestAsk:
    def test_loads_no_decoder(self, run, full_folder, language_model_folder, tmp_path):
        question = ["ask", PICTURE, "what <s> is this?", "--max-new-tokens", "7"]
        pipe = PumaPipeline.from_pretrained(full_folder, scales=[])
        expected = pipe.ask(Image.open(PICTURE).convert("RGB"), "what <s> is this?", max_new_tokens=7)
        model = copy(full_folder, tmp_path / "model", without="unet_*/*.safetensors")
        for folder in (model, language_model_folder):
            status, out, _ = run(*question, "--model", folder)
            assert (status, out) == (0, expected + "\n")


class TestConvert:
    def test_released_decoders(self, run):
        status, out, err = run("convert", RELEASE, "released/puma")
        assert (status, out) == (0, "released/puma\n")
        assert err.count("converted the") == 5
        assert PumaPipeline.from_pretrained("released/puma", scales=[2]).scales == [2]
        assert run("reconstruct", PICTURE, "--model", "released/puma", "--steps", "2", "--scale", "4")[0] == 0


class TestInfo:
    def test_pipeline(self, run, full_folder):
        status, out, _ = run("info", full_folder)
        assert status == 0
        pipe = PumaPipeline.from_pretrained(full_folder)
        total = 0
        for name in ("mllm", "vae", *(f"unet_{scale}" for scale in range(5))):
            count = sum(weight.numel() for weight in getattr(pipe, name).state_dict().values())
            total += count
            row = next(line for line in out.splitlines() if line.startswith(name))
            assert type(getattr(pipe, name)).__name__ in row and f"{count:,}  F32" in row
        assert f"{total:,} parameters" in out
        assert "encoder: 32 x 32 pixels -> 16 x 16 tokens of 32 channels, 5 scales" in out
        assert "scale 1: 64 tokens -> 16 x 16 pixels" in out
        encoder = sum(weight.numel() for weight in pipe.mllm.model.vision_tower.state_dict().values())
        assert f"{encoder:,}" in out

    def test_parts(self, run, decoders_folder, language_model_folder):
        out = run("info", decoders_folder)[1]
        assert "CLIPVisionModel" in out and "scale 3" in out and "scale 0" not in out
        assert "16 x 16 tokens" in out
        for folder, part, name in [
            (language_model_folder, "mllm", "PumaForConditionalGeneration"),
            (decoders_folder / "unet_1", "decoder", "PumaUNet2DConditionModel"),
            (decoders_folder / "image_encoder", "CLIPVisionModel", "CLIPVisionModel"),
            (decoders_folder / "vae", "AutoencoderKL", "AutoencoderKL"),
        ]:
            out = run("info", folder)[1]
            assert any(line.split()[:2] == [part, name] for line in out.splitlines())
            assert ("projector and heads" in out) == (part == "mllm")

    @pytest.mark.parametrize("part", ["vae", "unet_1"])
    def test_incomplete(self, fails, full_folder, tmp_path, part):
        folder = copy(full_folder, tmp_path / "full", without=f"{part}/config.json")
        fails(f"{folder / part / 'config.json'} is missing", "info", folder)

    @pytest.mark.parametrize(
        ("part", "entry"), [("vae", "block_out_channels"), ("unet_1", "num_tokens"), ("unet_1", "sample_size")]
    )
    def test_incomplete_config(self, fails, full_folder, tmp_path, part, entry):
        file = copy(full_folder, tmp_path / "full") / part / "config.json"
        config = json.loads(file.read_text())
        del config[entry]
        file.write_text(json.dumps(config))
        fails(f"{file} describes no", "info", tmp_path / "full")

    def test_other_models(self, run, decoders_folder, tmp_path):
        """What they have in common with PUMA is told, and the rest of it left out."""
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {"depth": 32}}))
        status, out, _ = run("info", tmp_path)
        assert status == 0 and "encoder" not in out
        index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "layers_out": [10, 20]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        shutil.copytree(decoders_folder / "vae", tmp_path / "vae")
        status, out, _ = run("info", tmp_path)
        assert status == 0 and "AutoencoderKL" in out and "layers_out" not in out and "steps" not in out

    def test_shards(self, run, tmp_path, language_model_folder):
        model = copy(language_model_folder, tmp_path / "model", without="model.safetensors")
        weights = list(load_file(language_model_folder / "model.safetensors").items())
        save_file(dict(weights[:9]), model / "model-00001-of-00002.safetensors")
        save_file(dict(weights[9:]), model / "model-00002-of-00002.safetensors")
        whole, shards = run("info", language_model_folder)[1], run("info", model)[1]
        assert whole.splitlines()[1:] == shards.splitlines()[1:]


class TestPictures:
    def test_transparent_parts_are_white(self, tmp_path):
        picture = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        picture.putpixel((1, 0), (0, 0, 255, 255))
        picture.save(tmp_path / "a.png")
        assert np.array(read_picture(tmp_path / "a.png")).tolist() == [[[255, 255, 255], [0, 0, 255]]]

    def test_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
        assert read_picture(tmp_path / "a.jpg").size == (2, 4)

    @pytest.mark.parametrize(("mode", "order", "suffix"), [("I;16", "<", "png"), ("I;16B", ">", "tif")])
    def test_grey_of_16_bits(self, tmp_path, mode, order, suffix):
        data = np.array([0, 257, 7 * 257 + 128, 7 * 257 + 129, 65535], dtype=f"{order}u2").tobytes()
        file = tmp_path / f"a.{suffix}"
        Image.frombytes(mode, (5, 1), data).save(file)
        assert Image.open(file).mode == mode
        assert np.array(read_picture(file)).tolist() == [[[value] * 3 for value in (0, 1, 7, 8, 255)]]

    def test_a_pgm_of_16_bits(self, tmp_path):
        (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + np.array([0, 16384, 32768, 65535], dtype=">u2").tobytes())
        assert np.array(read_picture(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 64, 128, 255]

    def test_cut_off(self, tmp_path):
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a.qoi")
        (tmp_path / "a.qoi").write_bytes((tmp_path / "a.qoi").read_bytes()[:15])  # its decoder raises an IndexError
        with pytest.raises(puma_cli.UserError, match="cannot read the picture .*a.qoi"):
            read_picture(tmp_path / "a.qoi")
        (tmp_path / "a.png").write_bytes(PICTURE.read_bytes()[:500])
        with pytest.raises(puma_cli.UserError, match="cannot read the picture .*a.png"):
            read_picture(tmp_path / "a.png")

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        file = check_output(tmp_path / "a.png")
        write_png(Image.new("RGB", (1, 1)), file)
        before = file.read_bytes()
        with pytest.raises(OSError):
            write_png(Image.new("HSV", (1, 1)), file)
        assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
        write_png(Image.new("RGB", (5, 5)), file)
        assert Image.open(file).size == (5, 5)

    def test_output_is_a_folder(self, tmp_path):
        (tmp_path / "b.png").mkdir()
        with pytest.raises(puma_cli.UserError, match="is a folder"):
            check_output(tmp_path / "b.png")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_output_folder_not_writable(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(puma_cli.UserError, match="not writable"):
            check_output(tmp_path / "a.png")
        tmp_path.chmod(0o700)


def test_init_names_the_part_that_is_not_there(capsys, tmp_path):
    """At once: a bare name is no Hub id, so nothing is asked there."""
    assert main(["init", "--llm", "nope", "--vision", "open_clip:A/b", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "puma: error: --llm nope: no such model folder\n"
