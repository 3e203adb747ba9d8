"""How long rows may be is told to the collator of every trainer."""

import pytest
from datasets import Dataset

from transformers_puma.training import (
    PumaDPOConfig,
    PumaDPOTrainer,
    PumaSFTConfig,
    PumaSFTTrainer,
    PumaTrainer,
    PumaTrainingArguments,
)

from ..conftest import make_picture


@pytest.mark.parametrize(
    ("trainer", "arguments"),
    [(PumaTrainer, PumaTrainingArguments), (PumaSFTTrainer, PumaSFTConfig), (PumaDPOTrainer, PumaDPOConfig)],
)
def test_a_length_reaches_the_collator(processor, model, tmp_path, trainer, arguments):
    options = {"report_to": "none", "use_cpu": True, "bf16": False}
    answers = {"completion": "a cat", "chosen": "a cat", "rejected": "no"}
    row = {"prompt": "<image>what?", **answers, "images": [make_picture(0)]}
    for max_length, width in ((30, 30), (None, 35)):
        settings = arguments(str(tmp_path), max_length=max_length, **options)
        made = trainer(model=model, args=settings, processing_class=processor, train_dataset=Dataset.from_list([row]))
        assert made.data_collator([row])["input_ids"].shape[1] == width
