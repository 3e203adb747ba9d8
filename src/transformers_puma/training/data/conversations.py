"""Questions about pictures, and their answers.

- OCR-VQA-200K (ocr-vqa.github.io): `dataset.json`, an object of `{"imageURL", "questions", "answers", "title",
  "authorName", "genre", "split"}` by picture id, split 1 being for training; `images/{id}.jpg` as its download script
  names them (the extension is that of `imageURL`).
- LLaVAR (github.com/SALT-NLP/LLaVAR), LLaVA-OneVision (huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data) and
  Cambrian (huggingface.co/datasets/nyu-visionx/Cambrian-10M, `jsons/Cambrian7M_withsystemprompt.jsonl`) have LLaVA's
  form: `id`, `image` and `conversations`, a list of `{"from": "human" | "gpt" | "system", "value": text with
  <image>}`. OneVision is parquet, a folder for each subset, with the picture in the row and `data_source`; Cambrian
  names in `source` the file that an entry came from, and the first folder of its `image` is the data set.

Report section 3.4: of OneVision and Cambrian, "data about math/reasoning and cross-duplicated data in the two datasets
are removed", without saying which. **Choice**: the subsets listed here, by name. What both have is read from
OneVision. Cambrian's names are taken from public code that splits it by them, not from the data themselves.
"""

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Features, Image, Value

from .readers import Reader, line_place
from .samples import BrokenSampleError, Sample, field, image_file, make_sample, plain, stored_image
from .streams import Paths, entry_stream, find_files, parquet_stream, parse_record, record_stream

IMAGE = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# Folders of LLaVA-OneVision-Data on mathematics, geometry and abstract reasoning, with all of MathV360K.
ONEVISION_MATH_REASONING = frozenset(
    {
        "CLEVR-Math(MathV360K)",
        "FigureQA(MathV360K)",
        "GEOS(MathV360K)",
        "GeoQA+(MathV360K)",
        "Geometry3K(MathV360K)",
        "IconQA(MathV360K)",
        "MapQA(MathV360K)",
        "PMC-VQA(MathV360K)",
        "Super-CLEVR(MathV360K)",
        "TabMWP(MathV360K)",
        "UniGeo(MathV360K)",
        "VisualWebInstruct(filtered)",
        "VizWiz(MathV360K)",
        "geo170k(align)",
        "geo170k(qa)",
        "geo3k",
        "geomverse(cauldron)",
        "intergps(cauldron,llava_format)",
        "mathqa",
        "mavis_math_metagen",
        "mavis_math_rule_geo",
        "raven(cauldron)",
        "tabmwp(cauldron)",
        "tqa(cauldron,llava_format)",
    }
)

# Cambrian's `source` files, and first folders of `image` (two for `hfdata`), on mathematics and reasoning.
CAMBRIAN_MATH_REASONING = frozenset(
    {
        "geo170k.json",
        "mathinstruct_262k.json",
        "mathvision_3k.json",
        "orca_math_200k.json",
        "geo170k",
        "mathvision",
        "hfdata/geomverse",
        "hfdata/intergps",
        "hfdata/raven",
        "hfdata/tabmwp",
        "hfdata/tqa",
    }
)

# Cambrian's `source` files and folders that LLaVA-OneVision has as well.
CAMBRIAN_IN_ONEVISION = frozenset(
    {
        "ai2d_15k.json",
        "allava-laion-500k.json",
        "allava-vflan-200k.json",
        "chartqa_28k.json",
        "clean_llava_instruct_150k_llavar_20k.json",
        "clevr_700k.json",
        "dvqa_2325k.json",
        "random_3rd_dvqa_2325k.json",
        "scienceqa_12k.json",
        "tallyqa_250k.json",
        "vizwiz_20k.json",
        "websight_800k.json",
        "hfdata/chart2text",
        "hfdata/hateful_memes",
        "hfdata/hitab",
        "hfdata/iconqa",
        "hfdata/infographic_vqa",
        "hfdata/rendered_text",
        "hfdata/robut_wtq",
        "hfdata/st_vqa",
        "hfdata/vistext",
        "hfdata/visual7w",
        "hfdata/visualmrc",
    }
)
# Subsets of text alone have an empty column of pictures, without their type.
ONEVISION_FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "conversations": [{"from": Value("string"), "value": Value("string")}],
        "data_source": Value("string"),
    }
)
CAMBRIAN_EXCLUDED = CAMBRIAN_MATH_REASONING | CAMBRIAN_IN_ONEVISION


def ocr_vqa(path: str, *, num_shards: int = 1, split: int = 1) -> Reader:
    """The folder that holds `dataset.json` and `images`; all questions about a picture are one conversation.

    Args:
        split: 1 training, 2 validation, 3 test.
    """
    stream = entry_stream(find_files(Path(path) / "dataset.json", []), num_shards)
    return Reader(stream, functools.partial(_parse_ocr_vqa, images=Path(path) / "images", split=split), line_place)


def llavar(path: Paths, *, images: str, num_shards: int = 1, seed: int | None = None) -> Reader:
    """Files in LLaVA's form: a JSON list, or JSON lines.

    Args:
        images: the folder that `image` is relative to.
    """
    stream = record_stream(find_files(path, ["*.json", "*.jsonl"], seed), num_shards)
    return Reader(stream, functools.partial(_parse_llava_file, images=Path(images), exclude=frozenset()), line_place)


def llava_onevision(
    path: str,
    *,
    num_shards: int = 1,
    seed: int | None = None,
    exclude: Collection[str] = ONEVISION_MATH_REASONING,
) -> Reader:
    """The folder with a folder of parquet files for each subset.

    Args:
        exclude: names of subsets that are not read; default: `ONEVISION_MATH_REASONING`.
    """
    exclude = frozenset(exclude)
    files = [file for file in find_files(path, ["*.parquet"], seed) if Path(file).parent.name not in exclude]
    if not files:
        raise ValueError(f"every subset in {path} is excluded")
    parse = functools.partial(_parse_onevision, exclude=exclude)
    return Reader(parquet_stream(files, num_shards, ONEVISION_FEATURES), parse, _onevision_place)


def cambrian(
    path: Paths,
    *,
    images: str,
    num_shards: int = 1,
    seed: int | None = None,
    exclude: Collection[str] = CAMBRIAN_EXCLUDED,
) -> Reader:
    """`Cambrian7M_withsystemprompt.jsonl`, or another of Cambrian's files.

    Args:
        images: the folder that `image` is relative to.
        exclude: `source` names and first folders of `image` that are left out; default: `CAMBRIAN_MATH_REASONING` and,
            since it stands beside OneVision, `CAMBRIAN_IN_ONEVISION`.
    """
    stream = record_stream(find_files(path, ["*.jsonl"], seed), num_shards)
    parse = functools.partial(_parse_llava_file, images=Path(images), exclude=frozenset(exclude))
    return Reader(stream, parse, line_place)


def to_messages(conversation: list[dict[str, str]], num_images: int) -> list[dict[str, Any]]:
    """LLaVA's turns as messages whose content is a list of text and image parts.

    Each `<image>` becomes an image part; pictures that no turn names stand before the first question.

    Raises:
        BrokenSampleError: another number of `<image>` than of pictures; a turn without text; turns that do not
            alternate, or that do not end with an answer; a system message that is not the first.
    """
    messages = []
    for turn in conversation:
        value = field(turn, "value")
        speaker = field(turn, "from")
        role = ROLES.get(speaker)
        if role is None:
            raise BrokenSampleError(f"a turn is from {speaker!r}; known are {', '.join(ROLES)}")
        pieces = [{"type": "text", "text": piece} for piece in map(plain, value.split(IMAGE))]
        parts = pieces[:1]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, piece]
        parts = [part for part in parts if part["type"] == "image" or part["text"]]
        if not parts:
            raise BrokenSampleError(f"a turn without text: {value!r}")
        messages.append({"role": role, "content": parts})

    turns = messages[messages[0]["role"] == "system" :] if messages else []
    if [message["role"] for message in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise BrokenSampleError(f"turns must alternate and end with an answer: {[turn['role'] for turn in turns]}")
    named = sum(part["type"] == "image" for message in messages for part in message["content"])
    if named == 0:
        turns[0]["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif named != num_images:
        raise BrokenSampleError(f"the text holds {named} {IMAGE} but there are {num_images} pictures")
    return messages


def _parse_ocr_vqa(raw: dict[str, str], images: Path, split: int) -> list[Sample]:
    record = parse_record(raw)
    if record.get("split") != split:
        return []
    key = record["__key__"]
    questions, answers = field(record, "questions", list), field(record, "answers", list)
    if len(questions) != len(answers):
        raise BrokenSampleError(f"{len(questions)} questions but {len(answers)} answers")
    turns = [
        {"from": role, "value": text}
        for pair in zip(questions, answers, strict=True)
        for role, text in zip(("human", "gpt"), pair, strict=True)
    ]
    extension = Path(field(record, "imageURL")).suffix
    return [make_sample(key, {"messages": to_messages(turns, 1)}, [image_file(images, key + extension)])]


def _parse_llava_file(raw: dict[str, str], images: Path, exclude: frozenset[str]) -> list[Sample]:
    record = parse_record(raw)
    paths = record.get("image") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BrokenSampleError(f"the field 'image' must be a path or a list of paths, got {paths!r}")
    if record.get("source") in exclude or any(_data_set(path) in exclude for path in paths):
        return []
    messages = to_messages(field(record, "conversations", list), len(paths))
    return [make_sample(raw["key"], {"messages": messages}, [image_file(images, path) for path in paths])]


def _data_set(image_path: str) -> str:
    """The first folder of a path in Cambrian, or the first two where that is `hfdata`."""
    folders = image_path.split("/")
    return "/".join(folders[: 2 if folders[0] == "hfdata" else 1])


def _parse_onevision(raw: dict[str, Any], exclude: frozenset[str]) -> list[Sample]:
    if raw.get("data_source") in exclude:
        return []
    pictures = [] if raw["image"] is None else [stored_image(raw["image"], "image")]
    messages = to_messages(field(raw, "conversations", list), len(pictures))
    return [make_sample(_onevision_place(raw), {"messages": messages}, pictures)]


def _onevision_place(raw: dict[str, Any]) -> str:
    return f"{raw.get('data_source')}:{raw.get('id')}"
