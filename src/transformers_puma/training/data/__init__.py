"""Training data, streamed through `datasets`.

```python
data = build_training_data(
    sources=[
        {"name": "laion_2b", "path": "/data/laion2b/*.tar", "weight": 6},
        {"name": "the_pile", "path": "/data/pile/train/*.jsonl.zst", "weight": 1},
    ],
    stage="pretraining",
    seed=0,
    image_size=224,
)
data = split_dataset_by_node(data, rank, world_size)  # of datasets.distributed; DataLoader workers share what is left
```

The sources: `laion_2b`, `laion_aesthetics`, `journeydb`, `grit`, `the_pile`, `ocr_vqa`, `llavar`, `seed_data_edit`,
`multigen`, `llava_onevision`, `cambrian`, `folder`, `parquet`.
"""

from .pipeline import STAGES, build_training_data

__all__ = ["STAGES", "build_training_data"]
