"""Models on the Hub, as the commands find them."""

import json
import subprocess
import sys

from tests.hub_server import HubServer

PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo("tester/decoders")
HfApi().upload_folder(repo_id="tester/decoders", folder_path=sys.argv[1])
"""
FIND = """
from puma_cli.model_source import find_model
from transformers_puma.evaluation.runner import model_settings
print(find_model("tester/decoders").decoders, len(model_settings("tester/decoders")["weights"]))
"""


def test_a_model_that_was_found_is_found_without_network(tmp_path):
    """Also where it has no configuration of a language model, which only the Hub can say; and its commit is known."""
    index = {"_class_name": "PumaPipeline", "unet_3": ["diffusers_puma", "PumaUNet2DConditionModel"]}
    (tmp_path / "decoders").mkdir()
    (tmp_path / "decoders/model_index.json").write_text(json.dumps(index))
    with HubServer(tmp_path / "hub") as hub:
        environment = hub.environment()
        subprocess.run([sys.executable, "-c", PUSH, str(tmp_path / "decoders")], env=environment, check=True)
        for offline in ("0", "1"):
            settings = environment | {"HF_HUB_OFFLINE": offline}
            found = subprocess.run([sys.executable, "-c", FIND], env=settings, capture_output=True, text=True)
            assert found.stdout == "[3] 40\n", found.stderr  # the commit, which a run's settings hold, has 40 digits
