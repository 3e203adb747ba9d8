"""What `PumaTrainer` can be told beyond `transformers.TrainingArguments`."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class PumaTrainingArguments(TrainingArguments):
    projector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the projector and the image head (report: 1e-4 against 3e-5); None: the same."
        },
    )
    feature_noise: float = field(
        default=0.0,
        metadata={
            "help": "Noise on the image features that are read while training, up to this many standard deviations of "
            "each channel. Targets stay clean, so the model learns to write on after its own errors."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Rows hold texts and pictures, not arguments of the model's forward."}
    )
