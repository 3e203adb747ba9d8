"""Every metric of the report's tables against a reference implementation, to 1e-4."""

import importlib.util
from pathlib import Path

import pytest

from tests.diffusers_puma.evaluation.conftest import clip_name, distribution  # noqa: F401

SCRIPT = Path(__file__).parents[2] / "examples/evaluation/metric_agreement.py"


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("metric_agreement", SCRIPT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_all_metrics_agree(module, clip_name, distribution):  # noqa: F811
    found = list(module.cases(3, distribution, clip_name.partition("/")[0], dino_depth=2))
    assert [case[0] for case in found] == ["PSNR", "LPIPS", "CLIP-I", "CLIP-T", "DINO", "FID"]
    for metric, _, ours, expected in found:
        assert ours == pytest.approx(expected, abs=1e-4), metric
        # Neither nothing nor the same for every pair, with which a constant would agree.
        assert min(map(abs, expected)) > 1e-2 and len(set(expected)) == len(expected), metric
