import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from diffusers_puma.training import PumaDecoderSampleCallback
from tests.killing import losses
from tests.tracking import pictures as read_pictures
from tests.tracking import read_events, texts

from ..conftest import make_unet
from .test_pictures import squares
from .tiny import rows as latent_rows
from .tiny import trainer

SCALE = 3


def picture_trainer(folder, pipe, pictures, **arguments):
    rows = [{"image": picture} for picture in pictures]
    components = {"image_encoder": pipe.image_encoder, "vae": pipe.vae}
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-2, **arguments}
    return trainer(folder, make_unet(SCALE), train_dataset=rows, components=components, **options)


def test_reconstructions_under_the_averaged_weights_are_in_the_event_file(tmp_path, decoder_pipeline, pictures):
    run = picture_trainer(tmp_path, decoder_pipeline, pictures, report_to="tensorboard", ema_decay=0.9)
    run.add_callback(PumaDecoderSampleCallback(run, run.train_dataset[:2], num_inference_steps=3))
    run.train()

    events = read_events(tmp_path)
    assert [event.step for event in events.Scalars("eval/loss")] == [2, 4]
    assert "num_tokens" in texts(events, "model_config")[0]
    for i in range(2):
        assert texts(events, f"samples/{i}") == {2: "original and scale 3", 4: "original and scale 3"}
        logged = read_pictures(events, f"samples/{i}")
        assert logged.keys() == {2, 4} and not torch.equal(logged[2], logged[4])

        decoder_pipeline.unet_3 = run.model.eval()
        decoder_pipeline.scheduler = run.noise_scheduler
        with run.averaged_weights():
            features = decoder_pipeline.encode_image(squares(pictures[i : i + 1]))
            generator = torch.Generator().manual_seed(run.args.seed + i)
            expected = decoder_pipeline(image_features=features, scale=SCALE, generator=generator).images[0]
        torch.testing.assert_close(logged[4][:, :, 16:], pil_to_tensor(expected), rtol=0, atol=1)


def test_samples_do_not_disturb_the_training(tmp_path, decoder_pipeline, pictures):
    plain = picture_trainer(tmp_path / "plain", decoder_pipeline, pictures)
    plain.train()
    sampled = picture_trainer(tmp_path / "sampled", decoder_pipeline, pictures, report_to="tensorboard")
    sampled.add_callback(PumaDecoderSampleCallback(sampled, sampled.train_dataset[:1], num_inference_steps=2))
    sampled.train()
    assert losses(sampled) == losses(plain)


def test_what_cannot_be_shown_is_refused(tmp_path):
    silent = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"report_to 'tensorboard' or 'wandb', got \[\]"):
        PumaDecoderSampleCallback(silent, latent_rows(1))
    run = trainer(tmp_path, report_to="tensorboard")
    with pytest.raises(ValueError, match="rows is empty"):
        PumaDecoderSampleCallback(run, [])
    with pytest.raises(ValueError, match="vae is needed"):
        PumaDecoderSampleCallback(run, latent_rows(1))
