"""What a run has written to TensorBoard, read back from its event files."""

import io
from pathlib import Path

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.transforms.functional import pil_to_tensor


def read_events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file), size_guidance={"tensors": 0, "images": 0, "scalars": 0})
    return events.Reload()


def pictures(events: EventAccumulator, tag: str) -> dict[int, torch.Tensor]:
    """`{step: (3, height, width) uint8}`"""
    images = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(tag)}
    return {step: pil_to_tensor(image) for step, image in images.items()}


def texts(events: EventAccumulator, tag: str) -> dict[int, str]:
    return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(f"{tag}/text_summary")}
