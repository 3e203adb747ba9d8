import pytest
import torch
from PIL import Image

from diffusers_puma.training import PumaDecoderCollator
from tests.killing import losses
from transformers_puma import PumaImageProcessor

from ..conftest import make_unet
from .tiny import trainer

SCALE = 3


def squares(pictures: list[Image.Image]) -> list[Image.Image]:
    """The largest square in the middle, written out."""
    boxes = {(40, 30): (5, 0, 35, 30), (32, 32): (0, 0, 32, 32), (20, 50): (0, 15, 20, 35)}
    return [picture.crop(boxes[picture.size]) for picture in pictures]


def components(pipe) -> dict:
    return {"image_encoder": pipe.image_encoder, "vae": pipe.vae}


@torch.no_grad()
def test_rows_of_pictures_train_as_their_cached_latents_and_features(tmp_path, decoder_pipeline, pictures):
    features = decoder_pipeline.encode_image(squares(pictures))[0]
    pixels = decoder_pipeline.image_processor.preprocess(squares(pictures), 16, 16)
    latents = decoder_pipeline.vae.encode(pixels).latent_dist.mean * decoder_pipeline.vae.config.scaling_factor
    cached_rows = [{"latents": z, "features": f} for z, f in zip(latents, features, strict=True)]
    null_features = decoder_pipeline.black_image_features()[0]

    options = {"max_steps": 4, "image_dropout": 0.5}
    with torch.enable_grad():
        rows = [{"image": picture} for picture in pictures]
        encoded = trainer(
            tmp_path, make_unet(SCALE), train_dataset=rows, components=components(decoder_pipeline), **options
        )
        encoded.train()
        cached = trainer(
            tmp_path,
            make_unet(SCALE),
            train_dataset=cached_rows,
            components={"null_features": null_features},
            **options,
        )
        cached.train()
    assert losses(encoded) == pytest.approx(losses(cached), rel=1e-4)
    torch.testing.assert_close(encoded.null_features, cached.null_features)
    assert encoded.evaluate()["eval_loss"] == pytest.approx(cached.evaluate()["eval_loss"], rel=1e-4)
    assert not any(p.requires_grad for part in components(decoder_pipeline).values() for p in part.parameters())


def test_resolution_is_the_decoders_or_what_is_asked_for(tmp_path, decoder_pipeline, pictures):
    rows = [{"image": picture} for picture in pictures]
    for resolution, expected in ((None, 16), (32, 32)):
        run = trainer(
            tmp_path,
            make_unet(SCALE),
            train_dataset=rows,
            components=components(decoder_pipeline),
            resolution=resolution,
        )
        batch = next(iter(run.get_train_dataloader()))
        assert batch["pictures"].shape == (3, 3, expected, expected) and batch["pixel_values"].shape == (3, 3, 32, 32)
        assert batch["pictures"].min() >= -1 and batch["pictures"].max() <= 1


@torch.no_grad()
def test_pictures_are_normalised_as_the_encoder_wants(tmp_path, decoder_pipeline, pictures):
    size = {"height": 32, "width": 32}
    image_processor = PumaImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.4, 0.5, 0.6])
    parts = components(decoder_pipeline) | {"image_processor": image_processor}
    rows = [{"image": picture} for picture in pictures]
    run = trainer(tmp_path, make_unet(0), train_dataset=rows, components=parts)
    _, features = run.encode(run.data_collator(rows))
    shown = [*squares(pictures), Image.new("RGB", (32, 32))]
    pixels = image_processor(shown, return_tensors="pt")["pixel_values"]
    expected = decoder_pipeline.image_encoder(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features, expected[:-1])
    torch.testing.assert_close(run.null_features, expected[-1:])


def test_scale_is_told_by_the_encoder(tmp_path, decoder_pipeline, pictures):
    pooled = decoder_pipeline.black_image_features()[SCALE]
    parts = components(decoder_pipeline) | {"null_features": pooled}
    run = trainer(tmp_path, make_unet(SCALE), train_dataset=[{"image": pictures[0]}], components=parts)
    assert run.scale == SCALE


def test_rows_that_hold_no_picture_are_refused():
    collate = PumaDecoderCollator(32, 16)
    with pytest.raises(ValueError, match="a row's image must be a PIL image, got str"):
        collate([{"image": "cat.png"}])
    with pytest.raises(ValueError, match=r"a row must hold latents and features, or an image.*got \['picture'\]"):
        collate([{"picture": Image.new("RGB", (8, 8))}])


def test_transparent_and_grey_pictures_become_rgb():
    """What is transparent becomes white, as where a model reads pictures."""
    batch = PumaDecoderCollator(32, 16)([{"image": Image.new(mode, (20, 20))} for mode in ("RGBA", "L", "P")])
    assert batch["pictures"].shape == (3, 3, 16, 16)
    assert batch["pictures"].mean((1, 2, 3)).tolist() == [1, -1, -1]


def test_components_that_do_not_suffice_are_refused(tmp_path, decoder_pipeline):
    with pytest.raises(ValueError, match="need both image_encoder and vae"):
        trainer(tmp_path, make_unet(SCALE), components={"vae": decoder_pipeline.vae})
    with pytest.raises(ValueError, match="null_features is needed"):
        trainer(tmp_path, make_unet(SCALE), components={"image_encoder": None})
    with pytest.raises(ValueError, match="resolution must be a multiple of the VAE's 2, got 7"):
        trainer(tmp_path, make_unet(SCALE), components=components(decoder_pipeline), resolution=7)
    decoder_pipeline.vae.to(torch.float16)
    with pytest.raises(ValueError, match="leaves the range of float16"):
        trainer(tmp_path, make_unet(SCALE), components=components(decoder_pipeline))
