"""Arguments of the decoders' training, with the report's values as defaults (section A.1.2)."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from transformers_puma.training.arguments import StreamArguments


@dataclass
class PumaDecoderTrainingArguments(StreamArguments, TrainingArguments):
    """`transformers.TrainingArguments` plus what the denoising objective needs.

    The defaults are the report's: AdamW at 8e-5 with linear decay, gradient norms clipped at 1, noise offset 0.1, one
    picture in ten dropped. It trains at a global batch of 1024 for 40k, 30k, 20k, 15k and 10k steps at scales 0 to 4.
    The averaged weights are not the report's.
    """

    learning_rate: float = field(default=8e-5, metadata={"help": "The initial learning rate."})
    noise_offset: float = field(
        default=0.1, metadata={"help": "Share of noise that is constant over each channel of a picture."}
    )
    image_dropout: float = field(
        default=0.1, metadata={"help": "Probability that a picture's features become the black image's."}
    )
    ema_decay: float = field(
        default=0.999,
        metadata={"help": "Decay of the averaged weights, which are the ones saved and evaluated; 0 keeps none."},
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Pixels of the square that a row's picture becomes; by default what the decoder is made for."
        },
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every step uses every parameter of a decoder: there is none to look for."}
    )
    min_snr_gamma: float | None = field(
        default=None, metadata={"help": "Weigh the loss by min(SNR, gamma); 5.0 is usual. Not by default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neftune_noise_alpha is not None:
            raise ValueError(f"neftune_noise_alpha={self.neftune_noise_alpha} is for texts: expected None")
        if self.noise_offset < 0:
            raise ValueError(f"noise_offset must be at least 0, got {self.noise_offset}")
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {self.resolution}")
        if not 0 <= self.image_dropout <= 1:
            raise ValueError(f"image_dropout must be between 0 and 1, got {self.image_dropout}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {self.ema_decay}")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma must be positive, got {self.min_snr_gamma}")
