"""What PUMA's trainers can be told beyond the arguments of their base classes."""

from dataclasses import MISSING, dataclass, field, fields
from typing import TypeVar

from transformers import TrainingArguments

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def adopt_arguments(kind: type[Arguments], args: TrainingArguments | None) -> Arguments:
    """Arguments of the class `kind`: `args` if they are, or those of the stock class that `kind` extends, where what
    is at the stock default takes the default of `kind`; None for all defaults.

    Raises:
        ValueError: arguments of another trainer.
    """
    if args is None:
        return kind("trainer_output")
    if isinstance(args, kind):
        return args
    if not (isinstance(args, TrainingArguments) and issubclass(kind, type(args))):
        raise ValueError(f"args must be a {kind.__name__}, got a {type(args).__name__}")
    settings = {setting.name: getattr(args, setting.name) for setting in fields(args) if setting.init}
    defaults = {
        setting.name: setting.default if setting.default_factory is MISSING else setting.default_factory()
        for setting in fields(args)
    }
    return kind(**{name: value for name, value in settings.items() if value != defaults[name]})


@dataclass
class StreamArguments:
    """Stands before the stock arguments, of transformers or TRL, among the bases of those of every trainer of PUMA:
    rows keep their columns, and each process reads its own share of a stream, none for the others (`dispatch_batches`
    is off).

    Raises:
        ValueError: `remove_unused_columns`, or a setting of `accelerator_config` that cannot work.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Rows hold what the collator reads, not arguments of the model's forward."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: it would remove what rows hold")
        sharing = self.accelerator_config
        if sharing.dispatch_batches:
            raise ValueError("dispatch_batches=True slices batches row by row, but rows differ in their pictures")
        sharing.dispatch_batches = False
        if sharing.split_batches:
            raise ValueError("split_batches=True slices batches row by row: lower the batch size of a process instead")
        if not sharing.even_batches:
            raise ValueError("even_batches=False lets a process that has a batch more wait for the others for ever")


@dataclass
class ProjectorArguments(StreamArguments):
    """Arguments of every trainer of the language model: a learning rate for the projector and the image head.

    Raises:
        ValueError: `use_liger_kernel`, which has no kernels for PUMA.
    """

    projector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the projector and the image head (report: 1e-4 against 3e-5); None: the same."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel=True would do nothing, Liger knows no PUMA: expected False")


@dataclass
class ModelLossArguments(ProjectorArguments):
    """Arguments of the trainers that minimise the model's own loss."""

    feature_noise: float = field(
        default=0.0,
        metadata={
            "help": "Noise on the image features that are read while training, up to this many standard deviations of "
            "each channel. Targets stay clean, so the model learns to write on after its own errors."
        },
    )
    own_feature_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the steps in which the images to be written are read as the model writes them, not as "
            "they are (scheduled sampling, arXiv 1506.03099), so that it learns to write on after its own errors. "
            "Costs a pass without gradient for each finer scale; feature_noise comes on top. For "
            "image_decoding='next_scale' with regression."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "The rows of a batch form one sequence without padding, in which no row sees another; to "
            "compute_metrics and in predict each such sequence is one row. Reaches the default data collator only."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longer rows are cut; None keeps them whole. Reaches the default data collator only."},
    )


@dataclass
class PumaTrainingArguments(ModelLossArguments, TrainingArguments):
    """`transformers.TrainingArguments` and what `PumaTrainer` adds."""
