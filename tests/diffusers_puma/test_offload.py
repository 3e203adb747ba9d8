"""Which components are on the accelerator when, with what they compute unchanged."""

import pytest
import torch
from accelerate.hooks import CpuOffload

from diffusers_puma import PumaPipeline

from .conftest import draw


class RecordsMoves:
    """Mixed into a component's class: notes which device it is sent to."""

    def to(self, *args, **kwargs):
        if args and isinstance(args[0], (str, torch.device)):
            self.place = str(args[0])
        return super().to(*args, **kwargs)


class TestOffload:
    """Accelerate's hooks with `cpu:0`, told apart from `cpu` by name only, in the accelerator's place."""

    names = ("mllm", "unet_2", "unet_4", "vae")

    def watch(self, pipe: PumaPipeline) -> list[tuple[str, dict[str, str]]]:
        """Grows by (component, where each component is) whenever a component's weights are used."""
        used = {
            "mllm": [pipe.mllm.model.vision_tower, pipe.mllm.model.language_model],
            "unet_2": [pipe.unet_2.encoder_hid_proj, pipe.unet_2.conv_in],
            "unet_4": [pipe.unet_4.encoder_hid_proj, pipe.unet_4.conv_in],
            "vae": [pipe.vae.decoder],
        }
        events = []
        for name in self.names:
            component = getattr(pipe, name)
            component.__class__ = type(type(component).__name__, (RecordsMoves, type(component)), {})
            for module in used[name]:
                module.register_forward_pre_hook(lambda *args, name=name: events.append((name, self.places(pipe))))
        return events

    def places(self, pipe: PumaPipeline) -> dict[str, str]:
        return {name: getattr(pipe, name).place for name in self.names}

    def test_each_component_comes_in_alone(self, full_pipeline, pictures):
        expected = draw(full_pipeline, "a", pictures[0], scale=[4, 2])
        events = self.watch(full_pipeline)
        full_pipeline._black_features = None
        full_pipeline.enable_model_cpu_offload(device="cpu")
        assert isinstance(full_pipeline.mllm._hf_hook, CpuOffload)
        result = draw(full_pipeline, "a", pictures[0], scale=[4, 2])
        torch.testing.assert_close(result, expected, atol=0, rtol=0)
        assert list(dict.fromkeys(name for name, _ in events)) == ["mllm", "unet_4", "vae", "unet_2"]
        for name, places in events:
            assert places == {other: "cpu:0" if other == name else "cpu" for other in self.names}
        assert set(self.places(full_pipeline).values()) == {"cpu"}

    def test_a_schedule_has_one_decoder_in_at_a_time(self, full_pipeline, pictures):
        options = {"scale": [(0.4, 4), (1.0, 2)]}
        expected = draw(full_pipeline, "a", pictures[0], **options)
        events = self.watch(full_pipeline)
        full_pipeline.enable_model_cpu_offload(device="cpu")
        torch.testing.assert_close(draw(full_pipeline, "a", pictures[0], **options), expected, atol=0, rtol=0)
        for name in ("unet_4", "unet_2"):
            running = [places for used, places in events if used == name]
            # The first event is the projection of the features; both are projected before the first step.
            assert running and all(place == "cpu" for other, place in running[-1].items() if other != name)

    @pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
    def test_group_offload(self, full_pipeline, pictures, kind, tmp_path):
        """With weights on disk: what a hook has not brought in is empty."""
        expected = draw(full_pipeline, "a", pictures[0], scale=0)
        where = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        full_pipeline.unet_0.enable_group_offload(
            **where, offload_type=kind, offload_to_disk_path=str(tmp_path), **blocks
        )
        result = draw(full_pipeline, "a", pictures[0], scale=0)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    def test_question(self, full_pipeline, pictures):
        expected = full_pipeline.ask(pictures[0], "What?", max_new_tokens=3)
        events = self.watch(full_pipeline)
        full_pipeline.enable_model_cpu_offload(device="cpu")
        assert full_pipeline.ask(pictures[0], "What?", max_new_tokens=3) == expected
        assert events and all(name == "mllm" and places["mllm"] == "cpu:0" for name, places in events)
