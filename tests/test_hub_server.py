"""The Hub server of the tests, driven by the stock clients and stock models.

Each test runs `python -m tests.test_hub_server CHECK`, which calls the function of that name below.
"""

import copy
import sys
import tempfile
from pathlib import Path

import pytest

from tests.hub_server import HubServer


def check_files():
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    assert api.whoami()["name"] == "tester"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/files")
    repo = api.create_repo("files").repo_id
    assert repo == "tester/files"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token="hf_somebody_else").create_repo("other")

    contents = {"README.md": b"---\nlicense: mit\n---\n", "a/b/c.txt": b"text", "a/w.bin": bytes(range(256)), "e": b""}
    additions = [CommitOperationAdd(path, data) for path, data in contents.items()]
    first = api.create_commit(repo, additions, commit_message="first").oid
    assert api.model_info(repo).sha == first
    assert sorted(api.list_repo_files(repo)) == sorted(contents)
    assert [entry.path for entry in api.list_repo_tree(repo)] == ["README.md", "a", "e"]
    assert [entry.path for entry in api.list_repo_tree(repo, "a")] == ["a/b", "a/w.bin"]
    below = {entry.path: entry for entry in api.list_repo_tree(repo, "a", recursive=True)}
    assert list(below) == ["a/b", "a/b/c.txt", "a/w.bin"]
    assert below["a/b/c.txt"].lfs is None and below["a/w.bin"].lfs.size == 256

    api.create_branch(repo, branch="feature/x")
    second = api.create_commit(
        repo,
        [CommitOperationAdd("a/w.bin", b"new"), CommitOperationDelete("a/b/")],
        commit_message="second",
        revision="feature/x",
        parent_commit=first,
    ).oid
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(repo, [CommitOperationDelete("e")], commit_message="late", parent_commit=second)
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit(repo, [CommitOperationAdd("README.md", b"---\na: [\n---\n")], commit_message="bad")
    assert api.upload_file(path_or_fileobj=b"text", path_in_repo="a/b/c.txt", repo_id=repo).oid == first  # no change

    def read(path: str, revision: str | None = None) -> bytes:
        return Path(hf_hub_download(repo, path, revision=revision)).read_bytes()

    assert {path: read(path) for path in contents} == contents
    assert read("a/w.bin", "feature/x") == read("a/w.bin", second) == b"new"
    assert read("a/w.bin", first) == contents["a/w.bin"]
    with pytest.raises(EntryNotFoundError):
        read("a/b/c.txt", second)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    with pytest.raises(RevisionNotFoundError):
        read("e", "nowhere")
    with tempfile.TemporaryDirectory() as cache:
        snapshot = Path(snapshot_download(repo, allow_patterns="a/*", cache_dir=cache))
        assert sorted(path.name for path in snapshot.rglob("*") if path.is_file()) == ["c.txt", "w.bin"]


def check_libraries():
    import torch
    from diffusers import AutoencoderKL, DDIMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.push_to_hub("tester/llama")
    model.push_to_hub("tester/llama-shards", max_shard_size="40KB")
    half = copy.deepcopy(model).half()
    half.push_to_hub("tester/llama", revision="half")

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.push_to_hub("tester/llama")

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipeline = DDIMPipeline(unet, DDPMScheduler())
    pipeline.push_to_hub("tester/ddim")
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.push_to_hub("tester/ddim", subfolder="vae")

    def assert_equal(pulled: torch.nn.Module, pushed: torch.nn.Module) -> None:
        expected, found = pushed.state_dict(), pulled.state_dict()
        assert expected.keys() == found.keys()
        assert all(found[name].dtype == value.dtype for name, value in expected.items())
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    assert_equal(AutoModelForCausalLM.from_pretrained("tester/llama"), model)
    assert_equal(AutoModelForCausalLM.from_pretrained("tester/llama-shards"), model)
    assert_equal(AutoModelForCausalLM.from_pretrained("tester/llama", revision="half"), half)
    assert AutoTokenizer.from_pretrained("tester/llama")("a cat")["input_ids"] == [1, 2]
    pulled = DiffusionPipeline.from_pretrained("tester/ddim")
    assert type(pulled) is DDIMPipeline
    assert_equal(pulled.unet, unet)
    assert_equal(AutoencoderKL.from_pretrained("tester/ddim", subfolder="vae"), vae)
    noise = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "np"}
    images = pipeline(**noise).images
    again = pulled(**noise | {"generator": torch.Generator().manual_seed(0)}).images
    assert abs(again - images).max() < 1e-4


@pytest.mark.parametrize("check", [check_files, check_libraries], ids=lambda check: check.__name__)
def test_hub_server(check, tmp_path):
    with HubServer(tmp_path) as hub:
        hub.run("tests.test_hub_server", check.__name__)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
