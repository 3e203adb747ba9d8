import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests.killing import losses
from tests.tracking import pictures, read_events, texts
from transformers_puma.training import PumaSampleCallback, PumaTrainer, PumaTrainingArguments

from ..conftest import make_model, make_picture

PICTURE = make_picture(0)
ROWS = [
    {"prompt": "<image>", "completion": "some words", "images": [PICTURE]},
    {"prompt": "draw it", "completion": "<image>", "images": [PICTURE]},
    {"prompt": "<image>in red", "completion": "<image>", "images": [PICTURE, make_picture(1)]},
]


def make_trainer(processor, folder, report_to="tensorboard", **kwargs) -> PumaTrainer:
    arguments = PumaTrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to=report_to,
        use_cpu=True,
        disable_tqdm=True,
        feature_noise=0.5,
    )
    data = {"train_dataset": ROWS, "eval_dataset": ROWS, "processing_class": processor, **kwargs}
    return PumaTrainer(make_model(processor), arguments, **data)


def paint(features: dict[int, torch.Tensor]) -> Image.Image:
    """A picture whose width tells the scales, and whose colour tells the features."""
    level = int(features[2].sigmoid().mean() * 255)
    return Image.new("RGB", (len(features), 30), (level, 0, 255 - level))


def test_answers_and_drawings_are_in_the_event_file(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path)
    trainer.add_callback(PumaSampleCallback(trainer, ROWS, decode=paint, scale=1, max_new_tokens=5))
    trainer.train()
    events = read_events(tmp_path)

    answers = texts(events, "samples/0")
    assert answers.keys() == {2, 4} and answers[2] != answers[4]
    inputs = {"input_ids": torch.tensor([processor.bos_ids + processor.image_ids])}
    pixels = processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"]
    special = [processor.image_start_token_id, processor.image_token_id, processor.image_end_token_id]
    written = trainer.model.generate(
        **inputs, pixel_values=pixels, max_new_tokens=5, do_sample=False, suppress_tokens=special
    )[0, inputs["input_ids"].shape[1] :]
    assert f"**wrote** {processor.tokenizer.decode(written)}\n" in answers[4]
    assert answers[4].endswith("**expected** some words</s>")
    torch.testing.assert_close(pictures(events, "samples/0")[4], pil_to_tensor(PICTURE), rtol=0, atol=0)

    assert texts(events, "samples/1")[4] == "**given** <s>draw it[IMG]\n\n**drew** scales [1, 2]"
    for row, given in ((1, [PICTURE]), (2, [PICTURE, ROWS[2]["images"][1]])):
        prompt = processor.prepare_generation([ROWS[row]["prompt"].replace("<image>", "")], [given[: row - 1]])
        features = trainer.model.generate_image_features(**prompt, scale=1)
        logged = pictures(events, f"samples/{row}")[4]
        assert logged.shape == (3, 30, 40 * row + 2)
        torch.testing.assert_close(logged[:, :, -2:], pil_to_tensor(paint(features)), rtol=0, atol=0)

    errors = []
    for row in (1, 2):
        prompt = processor.prepare_generation([ROWS[row]["prompt"].replace("<image>", "")], [ROWS[row]["images"][:-1]])
        pixels = processor.image_processor(ROWS[row]["images"][-1:], return_tensors="pt")["pixel_values"]
        drawn = trainer.model.generate_image_features(**prompt, scale=1)[1]
        errors.append((drawn - trainer.model.encode_image(pixels)[1]).square().mean().item())
    (first, last) = events.Scalars("eval/drawn_mse_scale_1")
    assert (first.step, last.step) == (2, 4) and last.value == pytest.approx(sum(errors) / 2, rel=1e-4)


def test_a_picture_said_in_a_conversation_is_drawn(processor, tmp_path):
    """The template has a space before it, which is supervised too."""
    said = [{"role": "user", "content": "draw it"}, {"role": "assistant", "content": [{"type": "image"}]}]
    rows = [{"messages": said, "images": [PICTURE]}]
    trainer = make_trainer(processor, tmp_path, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(PumaSampleCallback(trainer, rows, scale=1))
    trainer.evaluate()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_drawn_mse_scale_1" in entry]
    ids = trainer.data_collator(rows)["input_ids"]
    start = ids[0].tolist().index(processor.image_start_token_id)
    drawn = trainer.model.generate_image_features(ids[:, : start + 1], scale=1)[1]
    true = trainer.model.encode_image(processor.image_processor([PICTURE], return_tensors="pt")["pixel_values"])[1]
    assert entry["eval_drawn_mse_scale_1"] == pytest.approx((drawn - true).square().mean().item(), rel=1e-4)


def test_samples_do_not_disturb_the_training(processor, tmp_path):
    plain = make_trainer(processor, tmp_path / "plain", report_to="none")
    plain.train()
    sampled = make_trainer(processor, tmp_path / "sampled")
    sampled.add_callback(PumaSampleCallback(sampled, ROWS, scale=2, max_new_tokens=2))
    sampled.train()
    assert losses(sampled) == losses(plain)


def test_cached_features_are_read_and_compared(processor, tmp_path):
    features = torch.randn(21, 32, generator=torch.Generator().manual_seed(0))
    rows = [{"prompt": "draw it", "completion": "<image>", "image_features": [features]}]
    trainer = make_trainer(processor, tmp_path, train_dataset=rows, eval_dataset=rows)
    trainer.add_callback(PumaSampleCallback(trainer, rows, scale=1))
    trainer.evaluate()
    (entry,) = [entry for entry in trainer.state.log_history if "eval_drawn_mse_scale_1" in entry]
    drawn = trainer.model.generate_image_features(**processor.prepare_generation(["draw it"]), scale=1)[1][0]
    assert entry["eval_drawn_mse_scale_1"] == pytest.approx((drawn - features[1:5]).square().mean().item(), rel=1e-4)


def test_pictures_are_shown_as_the_model_reads_them(processor, tmp_path):
    """From their files, transparent parts on white."""
    file = tmp_path / "clear.png"
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(file)
    trainer = make_trainer(processor, tmp_path / "out")
    trainer.add_callback(PumaSampleCallback(trainer, [{**ROWS[0], "images": [str(file)]}], max_new_tokens=2))
    trainer.train()
    shown = pictures(read_events(tmp_path / "out"), "samples/0")[4]
    assert shown.shape == (3, 30, 40) and (shown == 255).all()


def test_wandb_offline(processor, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(processor, tmp_path, report_to="wandb")
    trainer.add_callback(PumaSampleCallback(trainer, ROWS[:2], decode=paint, scale=2, max_new_tokens=2))
    trainer.train()
    media = list(tmp_path.glob("wandb/offline-run-*/files/media/**/*"))
    assert sum(path.suffix == ".png" for path in media) == 4  # two samples at two evaluations
    assert sum(path.name.endswith(".table.json") for path in media) == 2


def test_rows_and_trackers_that_will_not_do_are_refused(processor, tmp_path):
    with pytest.raises(ValueError, match="report_to 'tensorboard' or 'wandb'"):
        PumaSampleCallback(make_trainer(processor, tmp_path, report_to="none"), ROWS)
    trainer = make_trainer(processor, tmp_path)
    with pytest.raises(ValueError, match="rows is empty"):
        PumaSampleCallback(trainer, [])
    with pytest.raises(ValueError, match="a row to sample must have something supervised"):
        PumaSampleCallback(trainer, [{"messages": [{"role": "user", "content": "alone"}]}])
    trainer.processing_class = None
    with pytest.raises(ValueError, match="no processing_class"):
        PumaSampleCallback(trainer, ROWS)
