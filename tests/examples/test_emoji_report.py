"""The report of the small model on a tiny one, untrained, and what it stands on: judge, measures, other data."""

import io
import json
import lzma
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from diffusers_puma import PumaPipeline
from transformers_puma import flatten_scales
from transformers_puma.evaluation.runner import read_rows
from transformers_puma.evaluation.teacher_forcing import teacher_forced_features

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "emoji"))

import build_stamps  # noqa: E402
import compare_decodings  # noqa: E402
import compare_scales  # noqa: E402
import report  # noqa: E402
import report_edits  # noqa: E402
import report_questions  # noqa: E402
import report_scenes  # noqa: E402
import report_text_to_image  # noqa: E402
import train_judge  # noqa: E402
from build_dataset import FEATURES  # noqa: E402
from emoji_evaluation import BOXES, EDITS, PROMPTS, QUESTIONS  # noqa: E402
from emoji_training import load_pictures  # noqa: E402
from judge import UNKNOWN, Judge, hits  # noqa: E402
from measuring import generators, numbered, spread  # noqa: E402
from report_pages import SECTIONS  # noqa: E402
from report_reconstruction import nearest  # noqa: E402
from train_decoder import build_decoder, noise_scheduler  # noqa: E402
from train_encoder import build_vision  # noqa: E402
from train_language_model import LanguageModelArguments, build_model, build_processor  # noqa: E402
from train_vae import build_vae  # noqa: E402

STYLES, COLOURS = ("round", "square"), ("red", "green", "blue", "orange")
DECODINGS = ("autoregressive", "next_scale", "prefilled")


def picture(colour: str, style: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    (ImageDraw.Draw(image).ellipse if style == "round" else ImageDraw.Draw(image).rectangle)((16, 16, 48, 48), colour)
    return image


def row(colour: str, style: str) -> dict:
    text = {"name": colour, "codepoints": colour, "base": colour, "group": "objects", "subgroup": ""}
    return {**text, "image": picture(colour, style), "style": style, "tags": [], "tone": "none", "gender": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = [row(colour, style) for colour in COLOURS for style in STYLES]
    unseen = [row("brown", style) for style in STYLES]
    path = tmp_path_factory.mktemp("report") / "emoji"
    splits = {"train": rows, "heldout_concept": unseen, "heldout_pair": rows[:3]}
    DatasetDict({k: Dataset.from_list(v, features=FEATURES) for k, v in splits.items()}).save_to_disk(str(path))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    red, blue = picture("red", "round"), picture("blue", "round")
    task = {"image": red, "target": blue, "split": "heldout_concept"}
    asked = {"image": red, "split": "heldout_pair"}
    questions = [{**asked, "question_type": "style", "question": "Which art style is this?", "answer": "round"}]
    boxes = [
        {
            **asked,
            "question_type": "region",
            "question": "What is in <box>?",
            "answer": "red",
            "box": [16, 16, 48, 48],
        },
        {**asked, "question_type": "grounding", "question": "Where?", "answer": "<box>", "box": [16, 16, 48, 48]},
    ]
    edits = [{**task, "prompt": "make it blue", "type": type} for type in ("colour", "style", "colour")]
    scene = {"target": red, "type": "scene", "split": "", "style": "round", "boxes": [[16, 16, 48, 48]]}
    prompts = [{"prompt": f"{c} things", "names": [c], "concepts": [c], **scene} for c in ("red", "blue")]
    path = tmp_path_factory.mktemp("tasks") / "tasks"
    DatasetDict(
        questions=Dataset.from_list(questions, features=QUESTIONS),
        boxes=Dataset.from_list(boxes, features=BOXES),
        edits=Dataset.from_list(edits, features=EDITS),
        conditions=Dataset.from_list([{**task, "prompt": "blue", "type": "canny"}], features=EDITS),
        prompts=Dataset.from_list(prompts, features=PROMPTS),
    ).save_to_disk(str(path))
    return path


def tiny_pipeline(texts: list[dict], decoding: str = "autoregressive", head: str = "regression") -> PumaPipeline:
    torch.manual_seed(0)
    encoder = build_vision(width=32, layers=1, heads=2)
    processor = build_processor(texts, encoder)
    options = LanguageModelArguments(hidden_size=64, num_layers=1, image_decoding=decoding, image_head=head)
    return PumaPipeline(
        vae=build_vae((8, 8, 8)),
        scheduler=DDIMScheduler.from_config(noise_scheduler().config),
        mllm=build_model(processor, encoder, options).eval(),
        processor=processor,
        default_num_inference_steps=1,
        **{f"unet_{scale}": build_decoder(4 ** (4 - scale), 32, 16, (32,)) for scale in range(5)},
    )


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, Path]:
    """A model and a judge that know nothing, and LPIPS with random weights."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    folder = tmp_path_factory.mktemp("trained")
    tiny_pipeline(load_pictures(str(data))["train"].texts).save_pretrained(folder / "model")
    steps = ["--max_steps", "2", "--warmup_steps", "0", "--disable_tqdm", "true", "--per_device_train_batch_size", "8"]
    train_judge.main(["--data", str(data), "--out", str(folder / "judge"), "--width", "8", *steps])
    torch.manual_seed(0)
    network = _NoTrainLpips(pretrained=False, net="alex", pnet_rand=True)
    save_file({k: v.abs().clone() for k, v in network.state_dict().items()}, folder / "lpips.safetensors")
    return {"model": folder / "model", "judge": folder / "judge", "lpips-weights": folder / "lpips.safetensors"}


def test_a_box_is_looked_at_as_the_square_around_it():
    drawn = torch.zeros(3, 64, 64)
    drawn[:, 20:30, 10:50] = 1  # 40 wide and 10 high
    seen = report_scenes.crop(drawn, [10, 20, 50, 30])
    assert seen.shape == drawn.shape
    torch.testing.assert_close(seen.mean(), torch.tensor(0.25), atol=0.02, rtol=0)
    assert report_scenes.crop(drawn, [60, 60, 64, 64]).max() == 0  # a box at the edge


def test_objects_are_found_where_the_judge_ranks_their_concepts(trained):
    judge = Judge.load(trained["judge"])
    concepts = judge.classes["concept"]
    with torch.no_grad():  # it sees the first class in everything
        judge.heads["concept"].weight.zero_()
        judge.heads["concept"].bias.copy_(-torch.arange(float(len(concepts))))
    box = [0, 0, 32, 32]
    rows = [
        {"concepts": [concepts[0], concepts[1]], "boxes": [box, box]},
        {"concepts": [concepts[2]], "boxes": [box]},
    ]
    found = report_scenes.objects_found(judge, torch.rand(2, 3, 64, 64), rows)
    assert found["object_top1"].tolist() == [0.5, 0.0]
    assert found["object_top5"].tolist() == [1.0, 1.0]  # the tiny judge knows four


def test_one_command_writes_the_report_and_computes_nothing_twice(data, tasks, trained, tmp_path, capsys):
    options = {**trained, "data": data, "tasks": tasks, "out": tmp_path / "report", "count": 3}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    report.main(arguments)
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    page = (tmp_path / "report" / "report.md").read_text()
    assert set(SECTIONS) < set(written)
    assert set(written["questions"]["types"]) == {"style", "region", "grounding"}
    table = written["reconstruction"]["table"]
    assert table["nearest training picture"]["psnr_r"]["n"] == 2 and "psnr_d" not in table["VAE round trip"]
    assert all(f"scale {scale}" in table for scale in range(5))
    assert written["text_to_image"]["table"]["true picture"]["similarity_to_picture"]["mean"] == pytest.approx(
        1, abs=1e-4
    )
    best = written["text_to_image"]["table"]["best of the scales"]["similarity_to_text"]["mean"]
    assert best >= written["text_to_image"]["table"]["scale 0"]["similarity_to_text"]["mean"]
    assert written["questions"]["types"]["style"]["most frequent answer"] == 1
    assert set(written["edits"]["types"]) == {"colour"} | {"style"} and written["edits"]["samples"] == 2
    assert "changed_as_asked" not in written["edits"]["types"]["colour"]["scale 0"]
    shown = [line.split("](")[1].rstrip(")") for line in page.splitlines() if line.startswith("![")]
    assert len(shown) == 4 + 6 and all((tmp_path / "report" / name).is_file() for name in shown)

    rows = {part: len(list(read_rows(tmp_path / "report/samples" / part))) for part in SECTIONS}
    samples = sorted((tmp_path / "report/samples").rglob("samples-*.jsonl"))
    before = [path.read_bytes() for path in samples]
    capsys.readouterr()
    report.main(arguments)
    assert [path.read_bytes() for path in samples] == before and rows["features"] == 3
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == written


@pytest.mark.parametrize("head", ["regression", "flow"])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_teacher_forcing_with_what_the_model_wrote_gives_what_it_wrote(data, decoding, head):
    pipe = tiny_pipeline(load_pictures(str(data))["train"].texts, decoding, head)
    prompts, samples = ["red in round style", "blue"], numbered([{}, {}])
    free = pipe.generate_image_features(prompts, None, 0, generators(samples, 0))
    inputs = pipe.processor.prepare_generation(prompts, None)
    noise = pipe.mllm.draw_feature_noise(len(prompts), 0, generators(samples, 0), pipe.device)
    forced = teacher_forced_features(pipe.mllm, **inputs, target_features=flatten_scales(free), noise=noise)
    for scale, written in free.items():
        torch.testing.assert_close(forced[scale], written, atol=1e-4, rtol=1e-3)
    cost = compare_decodings.measure_cost(pipe, "red", repeats=1)
    expected = {"autoregressive": (5, 341), "next_scale": (2, 5), "prefilled": (1, 1)}[decoding]
    assert (cost["passes, scale 3"], cost["passes, scale 0"]) == expected


def test_feature_errors_are_one_for_the_mean_and_nought_for_the_truth():
    true = {0: torch.randn(2, 4, 3)}
    mean = {0: torch.zeros(1, 1, 3)}
    scores = report_text_to_image.feature_errors(true, true, mean)
    assert scores["error 0"].tolist() == [0, 0]
    torch.testing.assert_close(scores["variance 0"], true[0].square().mean((1, 2)))
    means = {name: {"mean": values.mean().item()} for name, values in scores.items()}
    assert report_text_to_image.error_over_variance({"free": means}) == {"free": {0: 0.0}}


def test_nearest_and_spread(data):
    pictures = load_pictures(str(data))["train"]
    pixels = pictures[torch.tensor([5, 2])]
    assert torch.equal(nearest((pixels + 0.02).clamp(0, 1), pictures.pixels), pixels)
    assert spread(pictures, 8)[:3] == spread(pictures, 3) and len(set(spread(pictures, 8))) == 8


def test_what_stays_is_drawn_and_the_same_in_source_and_result():
    class Places(torch.nn.Module):
        def forward(self, first, second, normalize):
            return (first - second).abs().mean(1, keepdim=True)

    bench = type("Bench", (), {"lpips_of_places": Places()})
    source = torch.ones(2, 3, 8, 8)
    source[:, :, :4] = 0.5
    target = source.clone()
    target[:, :, :2] = 0.2  # two rows change, two drawn rows stay
    target[1, :, 2:4] = 0.2  # nothing stays
    drawn = source.clone()
    drawn[:, :, 2:4] += 0.1  # what should stay is off by 0.1
    drawn[:, :, 4:] = 0.0  # white does not count
    scores = report_edits.kept(bench, drawn, source, target)
    assert scores["psnr_kept"][0].item() == pytest.approx(20, abs=1e-3) and scores["psnr_kept"][1].isnan()
    assert scores["lpips_kept"][0].item() == pytest.approx(0.1, abs=1e-5) and scores["lpips_kept"][1].isnan()


def test_types_come_in_turn_and_more_only_adds():
    types = ["a", "a", "a", "b", "c", "b"]
    assert report_edits.in_turn(types, 2) == [0, 3, 4, 1, 5]
    assert report_edits.in_turn(types, 1) == report_edits.in_turn(types, 2)[:3]


def test_boxes_and_the_most_frequent_answer():
    assert report_questions.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert report_questions.overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    words = [{"answer": answer} for answer in ("yes", "no", "no")]
    assert report_questions.most_frequent(words) == pytest.approx(2 / 3)
    boxes = [{"answer": "<box>", "box": box} for box in ((0, 0, 4, 4), (0, 0, 4, 5), (50, 50, 60, 60))]
    assert report_questions.most_frequent(boxes) == pytest.approx(2 / 3)


def test_the_judge_is_saved_whole_and_skips_what_it_has_no_class_for(data, trained):
    judge = Judge.load(trained["judge"])
    pictures = load_pictures(str(data))
    texts = [*pictures["train"].texts[:2], *pictures["heldout_concept"].texts]
    labels = judge.labels(texts)
    assert (labels[2:, 0] == UNKNOWN).all() and (labels[:, 1] != UNKNOWN).all()
    pixels = pictures["train"][torch.tensor([0, 1])]
    look = judge.look(pixels)
    torch.testing.assert_close(look.embeddings.norm(dim=1), torch.ones(2))
    assert look.logits["concept"].shape == (2, len(COLOURS))
    torch.testing.assert_close(judge.look(pixels[1:]).embeddings, look.embeddings[1:])
    measured = json.loads((trained["judge"] / "training.json").read_text())["measured"]
    assert "concept_top1" not in measured["heldout_concept"] and measured["heldout_pair"]["pictures"] == 3
    logits = torch.tensor([[0.0, 3, 2], [5, 1, 4], [1, 2, 3]])
    assert hits(logits, torch.tensor([2, 0, UNKNOWN])).tolist() == [0, 1]
    assert hits(logits, torch.tensor([2, 0, UNKNOWN]), 2).tolist() == [1, 1]
    with pytest.raises(FileNotFoundError, match="train_judge.py --out nowhere"):
        Judge.load("nowhere")


def debian_package(path: Path, files: dict[str, bytes]) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(build_stamps.ROOT + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with path.open("wb") as package:
        package.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", lzma.compress(archive.getvalue()))):
            package.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode())
            package.write(content + b"\n" * (len(content) % 2))


def test_photographs_come_out_of_the_package_on_white_with_their_captions(tmp_path):
    stamp = Image.new("RGBA", (200, 100), (0, 0, 0, 0))
    stamp.paste((0, 0, 255, 255), (50, 25, 150, 75))
    png = io.BytesIO()
    stamp.save(png, "PNG")
    files = {f"{name}.png": png.getvalue() for name in ("food/fig", "food/cartoon/fig", "symbols/a", "animals/cat")}
    files["food/fig.txt"] = b"A fig.\nde.utf8=Eine Feige.\n"
    (tmp_path / "cache").mkdir()
    debian_package(tmp_path / "cache" / build_stamps.FILE, files)
    build_stamps.main(["--out", str(tmp_path / "stamps"), "--cache", str(tmp_path / "cache")])
    pictures = load_pictures(str(tmp_path / "stamps"))["heldout_concept"]
    assert [text["name"] for text in pictures.texts] == ["cat", "A fig"]
    pixels = pictures.pixels[0].permute(1, 2, 0).numpy()
    drawn = np.argwhere((pixels != 255).any(axis=2))
    assert drawn.min(0).tolist() == [17, 2] and drawn.max(0).tolist() == [46, 61]
    assert "GPL-2" in (tmp_path / "stamps" / "LICENSES.md").read_text()

    (tmp_path / "cache" / build_stamps.FILE).write_bytes(b"not a package")
    with pytest.raises(SystemExit, match="not a Debian package"):
        build_stamps.main(["--out", str(tmp_path / "stamps"), "--cache", str(tmp_path / "cache")])


def test_an_equal_budget_must_be_named():
    with pytest.raises(SystemExit):
        compare_decodings.parse([])
    arguments = compare_decodings.parse(["--steps", "7", "--", "--hidden_size", "64"])
    stage = compare_decodings.training("x", ["--image_head", "flow"], arguments, Path("out"), arguments.steps)
    command = " ".join(stage.arguments)
    assert "--max_steps 7 " in command and command.endswith("--image_head flow --hidden_size 64")
    assert len(compare_decodings.variants()) == 6


def test_variants_are_put_in_one_table(data, tasks, trained, tmp_path):
    pipe = PumaPipeline.from_pretrained(trained["model"], scales=[])
    pipe.mllm.save_pretrained(tmp_path / "variant")
    pipe.processor.save_pretrained(tmp_path / "variant")
    record = {"steps": 7, "log": [{"train_runtime": 12.0, "train_steps_per_second": 0.5}]}
    (tmp_path / "variant" / "training.json").write_text(json.dumps(record))
    assert compare_decodings.steps_per_second(tmp_path / "variant") == 0.5
    options = {**trained, "data": data, "tasks": tasks, "out": tmp_path, "count": 1, "steps": 7}
    arguments = compare_decodings.parse(
        [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    )
    results = compare_decodings.measure({"variant": tmp_path / "variant"}, arguments)
    result = results["variant"]
    assert (result["steps"], result["training seconds"], result["cost"]["passes, scale 0"]) == (7, 12.0, 341)
    assert result["text_to_image"]["samples"] == 1 and result["edits"]["samples"] == 2
    assert "pictures" not in result["features"]
    page = compare_decodings.write_page(results)
    assert page.count("| variant |") == 1 + 3 + len(compare_decodings.TEXT_TO_IMAGE) and "| variant, scale 0 |" in page


def test_models_that_read_other_scales_are_put_in_one_table(data, tasks, trained, tmp_path):
    assert compare_scales.variants()["f3"] == [3] and len(compare_scales.variants()) == 6
    options = {"data": data, "tasks": tasks, "model": trained["model"], "out": tmp_path, "count": 2, "steps": 5}
    arguments = compare_scales.parse([str(part) for name, value in options.items() for part in (f"--{name}", value)])
    command = " ".join(compare_scales.reading("f3", [3], arguments).arguments)
    assert "--max_steps 5 " in command
    assert command.endswith("--shares 0.0 0.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 --input_scales 3")
    pipe = PumaPipeline.from_pretrained(trained["model"], scales=[])
    pipe.mllm.save_pretrained(tmp_path / "f3")
    pipe.processor.save_pretrained(tmp_path / "f3")
    loaded = load_pictures(str(data)), load_from_disk(str(tasks))
    result = compare_scales.measure_variant(tmp_path / "f3", arguments, *loaded, settings={})
    assert result["samples"] == 3 and set(result["types"]) == {"style", "region", "grounding"}
    result["types"]["style"]["mean"] = 0.5
    page = compare_scales.write_page({"f3": result, "all": result})
    assert "| reads f3 | reads all |" in page and page.count("0.500 ±") == 2
