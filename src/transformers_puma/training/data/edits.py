"""SEED-Data-Edit (arXiv 2405.04007): pictures, instructions, and the edited pictures.

Layout, from the cards of huggingface.co/datasets/AILab-CVC/SEED-Data-Edit-Part1-Openimages, -Part1-Unsplash and
-Part2-3, and from the authors' loader (github.com/AILab-CVC/SEED-X, `src/data/sft_clm.py`,
`configs/data/sft_edit.yaml`):

- part 1 (automated): `auto_editing/{openimages,unsplash}/`, part 2 (real-world): `real_editing/`, part 3 (multi-turn):
  `multi_turn_editing/`; each with `annotations/*.jsonl` and `images/`, unpacked.
- parts 1 and 2: `source_image`, `target_image`, `instruction`; part 1 also has `annotations_GPT4V/`, where
  `instruction_new` is the instruction rewritten.
- part 3: `source_image`, then `instruction_1`, `edit_image_1`, `instruction_2`, ..., at most five turns; its archive
  of pictures has them in a folder `data`. This is taken from code that reads them, not from the data themselves, and
  so is `target_image` in part 2.
"""

import functools
import os
from pathlib import Path

from .readers import Reader, line_place
from .samples import BrokenSampleError, Sample, field, image_file, make_sample, text_field
from .streams import find_files, line_stream, parse_record


def seed_data_edit(
    path: str, *, num_shards: int = 1, seed: int | None = None, annotations: str = "annotations"
) -> Reader:
    """All parts under a folder; a turn of part 3 is a sample of its own, from the picture before it (**choice**).

    Args:
        annotations: the name of the folders that are read, beside `images`; "annotations_GPT4V" for part 1 rewritten.
    """
    found = []
    for folder, subfolders, _ in os.walk(path):
        # Those of the pictures have millions of files, and nothing else below them.
        subfolders[:] = [name for name in subfolders if name != "images"]
        if os.path.basename(folder) == annotations:
            found.append(f"{folder}/*.jsonl")
    if not found:
        raise FileNotFoundError(f"no folder named {annotations} in {path}")
    return Reader(line_stream(find_files(sorted(found), [], seed), num_shards), _parse_edit, line_place)


def _parse_edit(raw: dict[str, str]) -> list[Sample]:
    record = parse_record(raw)
    images = Path(raw["place"].rpartition(":")[0]).parent.parent / "images"
    picture = functools.partial(image_file, images)
    source = field(record, "source_image")
    if "target_image" in record:
        instruction = text_field(record, "instruction_new" if record.get("instruction_new") else "instruction")
        pictures = [picture(source), picture(field(record, "target_image"))]
        return [make_sample(raw["key"], {"instruction": instruction}, pictures)]

    if (images / "data").is_dir():
        picture = functools.partial(image_file, images / "data")
    samples, turn = [], 1
    while record.get(f"edit_image_{turn}"):
        edited, instruction = field(record, f"edit_image_{turn}"), text_field(record, f"instruction_{turn}")
        pictures = [picture(source), picture(edited)]
        samples.append(make_sample(f"{raw['key']}#{turn}", {"instruction": instruction}, pictures))
        source, turn = edited, turn + 1
    if not samples:
        raise BrokenSampleError(f"neither target_image nor edit_image_1 among the fields {', '.join(record)}")
    return samples
