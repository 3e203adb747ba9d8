"""How lmms-eval finds PUMA: the entry point `puma = transformers_puma.evaluation.lmms_eval_manifest:manifest` in its
group `lmms_eval.models`. Apart from the model, so that listing models loads none."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    model = f"{__package__}.lmms_eval_model.PumaLmms"
    return ModelManifest(model_id="puma", simple_class_path=model)
