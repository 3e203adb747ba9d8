"""Pictures where the benchmarks' own scorers look for them, from files as they are published."""

import json

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from diffusers_puma.evaluation import BENCHMARKS, BenchmarkPictures, Drawer, evaluate, open_benchmark


@pytest.fixture
def draw(full_pipeline, tmp_path):
    """`draw(name, path)` -> files below the folder that the scorer is given."""

    def call(name: str, path) -> dict[str, Image.Image | str]:
        drawer = Drawer(full_pipeline, [3], seeds=list(range(BENCHMARKS[name].num_seeds)))
        out = tmp_path / "out"
        evaluate(BenchmarkPictures(name, drawer, out), open_benchmark(name, path), out, model="tiny", batch_size=2)
        folder = out / "scale_3"
        files = [file for file in folder.rglob("*") if file.is_file()]
        return {
            file.relative_to(folder).as_posix(): Image.open(file) if file.suffix == ".png" else file.read_text()
            for file in files
        }

    return call


def test_geneval(draw, tmp_path):
    lines = [
        '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
        '{"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "a photo of two clocks"}',
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    files = draw("geneval", tmp_path / "evaluation_metadata.jsonl")
    samples = {f"0000{i}/samples/0000{j}.png" for i in range(2) for j in range(4)}
    assert files.keys() == {*samples, "00000/metadata.jsonl", "00001/metadata.jsonl"}
    assert json.loads(files["00001/metadata.jsonl"]) == json.loads(lines[1])
    assert len({files[name].tobytes() for name in samples}) == 8
    assert files["00000/samples/00003.png"].size == (16, 16)
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines).replace("two clocks", "a clock"))
    with pytest.raises(ValueError, match="samples"):
        draw("geneval", tmp_path / "evaluation_metadata.jsonl")


def test_dpg(draw, full_pipeline, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "partiprompts36.txt").write_text("A red cube on a blue ball.\n")
    (tmp_path / "prompts" / "0.txt").write_text("Two cats.")
    files = draw("dpg", tmp_path / "prompts")
    assert files.keys() == {"0.png", "partiprompts36.png"}
    sheet = files["0.png"]
    assert sheet.size == (32, 32)
    quarters = [sheet.crop((x, y, x + 16, y + 16)).tobytes() for y in (0, 16) for x in (0, 16)]
    drawer = Drawer(full_pipeline, [3], seeds=[0, 1, 2, 3])
    alone = drawer.draw(["0"], resize=False, prompt=["Two cats."])[3][0]
    assert [picture.size for picture in alone] == [(16, 16)] * 4 and len(set(quarters)) == 4
    difference = max(abs(a - b) for a, b in zip(quarters[2], alone[2].tobytes(), strict=True))
    assert difference <= 2  # grey levels, by the batch's rounding


def test_imgedit(draw, tmp_path):
    (tmp_path / "animal").mkdir()
    Image.new("RGB", (30, 20), "green").save(tmp_path / "animal" / "000342021.jpg")
    edit = {"id": "animal/000342021.jpg", "prompt": "Smooth the shell.", "edit_type": "adjust"}
    (tmp_path / "basic_edit.json").write_text(json.dumps({"1082": edit, "673": {**edit, "edit_type": "style"}}))
    files = draw("imgedit", tmp_path)
    assert files.keys() == {"1082.png", "673.png"} and files["1082.png"].size == (30, 20)


def test_gedit(draw, tmp_path):
    rows = {
        "task_type": ["background_change", "ps_human"],
        "key": ["6a7e3c", "b1c2d3"],
        "instruction": ["Change the background to a street.", "把头发染成红色"],
        "instruction_language": ["en", "cn"],
        "input_image": [Image.new("RGB", (24, 16), "red")] * 2,
        "input_image_raw": [Image.new("RGB", (240, 160), "red")] * 2,
        "Intersection_exist": [True, False],
    }
    table = Dataset.from_dict(rows)
    for name in ("input_image", "input_image_raw"):
        table = table.cast_column(name, ImageFeature())
    table.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    files = draw("gedit", tmp_path)
    first, second = "fullset/background_change/en/6a7e3c", "fullset/ps_human/cn/b1c2d3"
    assert files.keys() == {f"{name}{end}.png" for name in (first, second) for end in ("", "_SRCIMG")}
    assert files[f"{first}.png"].size == (24, 16)
    assert files[f"{first}_SRCIMG.png"].getpixel((0, 0)) == (255, 0, 0)


def test_other_files_and_seeds(full_pipeline, tmp_path):
    (tmp_path / "x.json").write_text('{"1": {"id": "a.jpg"}}')
    for name, path in (("geneval", tmp_path), ("imgedit", tmp_path), ("geneval", tmp_path / "x.json")):
        with pytest.raises(ValueError, match=f"is not what {name} publishes"):
            open_benchmark(name, path)
    with pytest.raises(ValueError, match="holds no prompts"):
        open_benchmark("dpg", tmp_path)
    with pytest.raises(ValueError, match=r"geneval takes 4 pictures of a prompt, got seeds \[0\]"):
        BenchmarkPictures("geneval", Drawer(full_pipeline, [3], seeds=[0]), tmp_path)
