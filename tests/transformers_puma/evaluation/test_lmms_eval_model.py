"""With the real lmms-eval, where it is installed."""

import json

import pytest
import torch

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from tests.transformers_puma.conftest import make_model, make_picture
from transformers_puma.evaluation.lmms_eval_manifest import manifest
from transformers_puma.evaluation.lmms_eval_model import PumaLmms, cut_at, generation_options

DOCUMENTS = [{"question": "What is it" + "?" * i, "pictures": list(range(i))} for i in range(4)]


@pytest.fixture(scope="module")
def lmm(processor, tmp_path_factory) -> PumaLmms:
    """Found, made and given its documents as lmms-eval does."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = make_model(processor)
    for name, weight in model.model.language_model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    cls = registry.get_model_class("puma")
    lmm = cls.create_from_arg_string(f"pretrained={folder}", {"batch_size": 2, "device": "cpu"})
    lmm.task_dict = {"task": {"test": DOCUMENTS}}
    return lmm


def find_pictures(document):
    return [make_picture(seed) for seed in document["pictures"]]


def make_request(kind, *arguments, document):
    metadata = {"task": "task", "doc_id": document, "repeats": 1}
    return Instance(kind, (*arguments, find_pictures, document, "task", "test"), idx=0, metadata=metadata)


def single_answer(lmm, document, **options):
    content = DOCUMENTS[document]
    inputs = lmm.processor.prepare_question([content["question"]], [find_pictures(content)])
    with torch.no_grad():
        ids = lmm.model.generate(**inputs, do_sample=False, **options)
    return lmm.processor.decode_answers(ids, inputs["input_ids"].shape[1])[0]


def test_generate_until(lmm):
    options = [{"max_new_tokens": 5}, {"max_new_tokens": 3}, {"max_new_tokens": 5}, {"max_new_tokens": 5}]
    requests = [
        make_request("generate_until", DOCUMENTS[i]["question"], option, document=i)
        for i, option in enumerate(options)
    ]
    answers = lmm.generate_until(requests)
    assert answers == [single_answer(lmm, i, **option).strip() for i, option in enumerate(options)]
    assert len(set(answers)) > 1


def test_loglikelihood(lmm):
    """The mean loss of a continuation, token by token."""
    question, target = DOCUMENTS[2]["question"], " it"
    request = make_request("loglikelihood", question, target, document=2)
    inputs = lmm.processor.prepare_question([question], [find_pictures(DOCUMENTS[2])])
    losses, greedy = [], []
    for token in lmm.processor.encode_plain(target):
        with torch.no_grad():
            logits = lmm.model(**inputs).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[token].item())
        greedy.append(logits.argmax().item() == token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    ((loss, is_greedy),) = lmm.loglikelihood([request])
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-4) and is_greedy == all(greedy)
    by_function = make_request("loglikelihood", question, lambda document: target.strip(), document=2)
    assert lmm.loglikelihood([by_function]) == [(loss, is_greedy)]


def test_a_video_is_refused(lmm):
    request = make_request("generate_until", "What happens?", {"max_new_tokens": 2}, document=0)
    request.arguments = (*request.arguments[:2], lambda document: ["video.mp4"], *request.arguments[3:])
    with pytest.raises(ValueError, match="task task brings a str, and PUMA reads pictures"):
        lmm.generate_until([request])


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ({}, {"max_new_tokens": 128, "do_sample": False}),
        (
            {
                "until": ["\n"],
                "max_new_tokens": 16,
                "temperature": 0,
                "top_p": 1.0,
                "num_beams": 1,
                "do_sample": False,
            },
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        ),
        (
            {"temperature": 0.7, "top_p": None, "image_aspect_ratio": "x"},
            {"max_new_tokens": 128, "temperature": 0.7, "do_sample": True},
        ),
        ({"temperature": 0.7, "do_sample": False}, {"max_new_tokens": 128, "do_sample": False}),
    ],
)
def test_generation_options(task, expected):
    assert generation_options(json.loads(json.dumps(task))) == expected


def test_cutting():
    assert cut_at("a dog\nUSER: b", ["USER:", "\n"]) == "a dog"
    assert cut_at(" a dog ", None) == "a dog"
    assert cut_at("a\n\nb", "\n\n") == "a"
