"""The judges: real classes with random weights, and the Fréchet distance against its formula."""

import open_clip
import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from diffusers_puma.evaluation import AlexNetEncoder, frechet_distance, load_clip, load_dino, load_inception
from diffusers_puma.evaluation.encoders import cosine


@pytest.fixture
def dino_folder(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def test_clip_is_open_clips(clip_name, pictures):
    clip, texts = load_clip(clip_name), ["a cat", "two dogs on a lawn"]
    arch, _, file = clip_name.partition("/")
    model, _, preprocess = open_clip.create_model_and_transforms(arch, pretrained=file)
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([preprocess(picture) for picture in pictures[:2]]))
        words = model.encode_text(open_clip.get_tokenizer(arch)(texts))
    expected = cosine_similarity(images, words).tolist()
    assert cosine(clip.pictures(pictures[:2]), clip.texts(texts)) == pytest.approx(expected, abs=1e-5)
    assert cosine(clip.pictures(pictures), clip.pictures(pictures)) == pytest.approx([1, 1, 1], abs=1e-5)


def test_clip_that_is_not_there():
    with pytest.raises(ValueError, match="no architecture 'ViT-B-33'"):
        load_clip("ViT-B-33/openai")
    with pytest.raises(ValueError, match="no weights 'opena' for ViT-B-32: expected one of .* or a weight file"):
        load_clip("ViT-B-32/opena")
    with pytest.raises(ValueError, match="no weights '' for ViT-B-32"):
        load_clip("ViT-B-32")


def test_clip_without_a_network(clip_name, tmp_path):
    (tmp_path / "bad.pt").write_text("none")
    with pytest.raises(OSError, match="could not be loaded.*give a file as `name`"):
        load_clip(f"{clip_name.partition('/')[0]}/{tmp_path / 'bad.pt'}")


def test_dino_is_the_class_token(dino_folder, pictures):
    dino, model = load_dino(str(dino_folder)), ViTModel.from_pretrained(dino_folder, add_pooling_layer=False)
    pixels = ViTImageProcessor.from_pretrained(dino_folder)(pictures[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        first, second = model(pixels).last_hidden_state[:, 0]
    expected = cosine_similarity(first, second, dim=0).item()
    vectors = dino.pictures(pictures[:2])
    assert cosine(vectors[:1], vectors[1:]) == pytest.approx([expected], abs=1e-5)
    with pytest.raises(OSError, match="could not be loaded.*give its folder as `name`"):
        load_dino(str(dino_folder / "none"))


class RandomInception(FeatureExtractorInceptionV3):
    """The real network before weights are read into it."""

    def load_state_dict(self, state_dict, **kwargs):
        assert state_dict == {}


def test_inception_is_torch_fidelitys(tmp_path, pictures):
    torch.save({}, tmp_path / "empty.pth")
    torch.manual_seed(0)
    network = RandomInception("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    squares = [picture.resize((40, 40)) for picture in pictures[:2]]
    features = load_inception(tmp_path / "weights.pth").pictures(squares)
    pixels = torch.stack([torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8) for square in squares])
    expected = network(pixels.view(2, 40, 40, 3).permute(0, 3, 1, 2))[0]
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)

    with pytest.raises(FileNotFoundError, match="no such file with Inception weights"):
        load_inception(tmp_path / "none.pth")
    torch.save({"evil": RandomInception}, tmp_path / "code.pth")
    for file in ("empty.pth", "code.pth"):
        with pytest.raises(OSError, match="could not be loaded.*as `weights`"):
            load_inception(tmp_path / file)


def test_alexnet_features_are_those_of_lpips(lpips, pictures):
    squares = [picture.resize((40, 40)) for picture in pictures]
    features = AlexNetEncoder(lpips).pictures(squares)
    assert features.shape == (3, 256)
    torch.testing.assert_close(AlexNetEncoder(lpips).pictures(squares[:1]), features[:1])
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_frechet_distance_by_hand():
    # Means 0 and 3, variances 2 and 8: 3 ** 2 + 2 + 8 - 2 * sqrt(16).
    assert frechet_distance(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])) == pytest.approx(11, abs=1e-6)


def test_frechet_distance_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    real = (
        torch.randn(40, 5, generator=generator, dtype=torch.float64) @ torch.randn(5, 5, generator=generator).double()
    )
    drawn = torch.randn(30, 5, generator=generator, dtype=torch.float64) + 0.5
    values, vectors = torch.linalg.eigh(real.T.cov())
    root = vectors @ values.sqrt().diag() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ drawn.T.cov() @ root).clamp(min=0).sqrt().sum()
    means = (real.mean(0) - drawn.mean(0)).square().sum()
    expected = means + real.T.cov().trace() + drawn.T.cov().trace() - 2 * mixed
    assert frechet_distance(real, drawn) == pytest.approx(expected.item(), abs=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-4)
