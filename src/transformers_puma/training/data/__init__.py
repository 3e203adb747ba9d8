"""Training data: the report's sources, streamed through `datasets`, as the rows that the trainers take.

```python
from datasets.distributed import split_dataset_by_node
from transformers_puma.training.data import build_training_data

data = build_training_data(
    sources=[
        {"name": "laion_2b", "path": "/data/laion2b/*.tar", "weight": 6},
        {"name": "grit", "path": "/data/grit", "weight": 2},
        {"name": "the_pile", "path": "/data/pile/train", "weight": 1},
    ],
    stage="pretraining",
    seed=0,
    image_size=224,
    num_shards=world_size * num_workers,
)
data = split_dataset_by_node(data, rank, world_size, strategy="shards")  # the trainers share a stream by themselves
```

Rows, by stage: `{"prompt", "completion", "images"}` (pairs, edits, conditions; with `boxes` for GRIT), `{"messages",
"images"}` (conversations), `{"text"}`, and `{"image"}` for decoders. DataLoader workers share what the process has.

| source | options | what it is |
|---|---|---|
| `laion_2b`, `laion_aesthetics` | `caption` | pairs, in tars or parquet of img2dataset |
| `journeydb` | `caption` | pairs |
| `grit` | `phrases` | pairs with boxes |
| `the_pile` | | texts |
| `ocr_vqa` | `split` | conversations |
| `llavar` | `images` | conversations |
| `llava_onevision` | `exclude` | conversations |
| `cambrian` | `images`, `exclude` | conversations |
| `seed_data_edit` | `annotations` | edits |
| `multigen` | `task`, `conditions` | conditions |
| `folder` | `caption` | pairs of one's own |
| `parquet` | `image`, `caption` | pairs of one's own |

The modules that read them (`pairs`, `conversations`, `edits`, `conditions`) say what each looks like on disk. A sample
that is broken is skipped, counted and named in the log; too many of them stop the run.
"""

from .conversations import CAMBRIAN_IN_ONEVISION, CAMBRIAN_MATH_REASONING, ONEVISION_MATH_REASONING
from .pipeline import SOURCES, build_training_data, load_source
from .rows import STAGES
from .samples import BrokenSampleError, SampleCounter, TooManyBrokenSamplesError

__all__ = [
    "CAMBRIAN_IN_ONEVISION",
    "CAMBRIAN_MATH_REASONING",
    "ONEVISION_MATH_REASONING",
    "SOURCES",
    "STAGES",
    "BrokenSampleError",
    "SampleCounter",
    "TooManyBrokenSamplesError",
    "build_training_data",
    "load_source",
]
