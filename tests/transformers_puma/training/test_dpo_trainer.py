import shutil

import pytest
import torch
from datasets import IterableDataset
from peft import get_peft_model, get_peft_model_state_dict
from torch.nn import functional as F
from trl import DPOConfig, SFTConfig

from transformers_puma.training import PumaDPOConfig, PumaDPOTrainer, puma_lora_config, puma_token_ids

from ..conftest import make_model, make_picture

BETA = 0.3


def make_rows() -> list[dict]:
    answers = [("a cat", "no"), ("red", "something else"), ("two", "2"), ("hello", "bye")]
    rows = [
        {"prompt": "<image>what?", "chosen": chosen, "rejected": rejected, "images": [make_picture(i)]}
        for i, (chosen, rejected) in enumerate(answers[:2])
    ]
    for chosen, rejected in answers[2:]:
        said = {name: [{"role": "assistant", "content": text}] for name, text in (("c", chosen), ("r", rejected))}
        question = [{"role": "user", "content": "say it"}]
        rows.append({"prompt": question, "chosen": said["c"], "rejected": said["r"]})
    return rows


def make_trainer(processor, folder, model, ref_model=None, peft_config=None, **kwargs) -> PumaDPOTrainer:
    options = dict(
        max_steps=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        beta=BETA,
    )
    return PumaDPOTrainer(
        model,
        ref_model,
        PumaDPOConfig(str(folder), **{**options, **kwargs}),
        train_dataset=IterableDataset.from_generator(lambda: iter(make_rows())),
        processing_class=processor,
        peft_config=peft_config,
    )


def log_probability(model, processor, row, answer) -> torch.Tensor:
    """Of one answer, without padding, token by token."""
    if isinstance(row["prompt"], str):
        prompt = processor.bos_ids + processor.image_ids + processor.encode_plain("what?")
        written = [*processor.encode_plain(row[answer]), processor.tokenizer.eos_token_id]
    else:
        chat = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        prompt = processor.tokenizer.encode(chat, add_special_tokens=False)
        written = [*processor.encode_plain(f" {row[answer][0]['content']}"), processor.tokenizer.eos_token_id]
    pixels = {}
    if "images" in row:
        pixels = {"pixel_values": processor.image_processor(row["images"], return_tensors="pt")["pixel_values"]}
    logits = model(input_ids=torch.tensor([prompt + written]), **pixels).logits[0]
    scores = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return sum(scores[i, token] for i, token in enumerate(written))


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("accumulation", [1, 4])
@torch.no_grad()
def test_the_loss_is_that_of_the_paper(processor, tmp_path, accumulation):
    """-log sigmoid(beta (log pi(w) / ref(w) - log pi(l) / ref(l))), averaged over pairs: equation 7."""
    model, ref_model = make_model(processor), make_model(processor)
    for parameter in ref_model.model.language_model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    losses = []
    for row in make_rows():
        ratios = [
            log_probability(model, processor, row, answer) - log_probability(ref_model, processor, row, answer)
            for answer in ("chosen", "rejected")
        ]
        losses.append(-F.logsigmoid(BETA * (ratios[0] - ratios[1])))
    assert max(abs(loss - torch.log(torch.tensor(2.0))) for loss in losses) > 0.05

    head, reference = model.image_head.weight.clone(), [parameter.clone() for parameter in ref_model.parameters()]
    options = dict(per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = make_trainer(processor, tmp_path, model, ref_model, projector_learning_rate=0.5, **options)
    with torch.enable_grad():
        trainer.train()
    assert history(trainer, "loss") == pytest.approx([torch.stack(losses).mean().item()], rel=1e-4)
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2, 0.5}
    assert torch.equal(model.image_head.weight, head)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ref_model.parameters(), reference, strict=True))


@pytest.mark.parametrize("peft", [False, True])
def test_answers_that_are_preferred_become_likelier(processor, tmp_path, peft):
    """The reference is the model as it was: the first loss is log 2, and margins grow from zero."""
    model = make_model(processor)
    adapter = puma_lora_config(model, [], r=4, modules_to_save=["projector"]) if peft else None
    trainer = make_trainer(processor, tmp_path, model, peft_config=adapter, max_steps=6)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(0.6931, abs=1e-4)
    margins = history(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.2


def test_a_model_with_an_adapter_resumes_to_the_same_numbers(processor, tmp_path):
    def trainer(folder):
        model = make_model(processor)
        adapted = get_peft_model(model, puma_lora_config(model, [], r=4))
        return make_trainer(processor, folder, adapted, max_steps=4, save_strategy="steps", save_steps=2)

    whole, killed = trainer(tmp_path / "whole"), trainer(tmp_path / "killed")
    whole.train()
    killed.train()
    shutil.rmtree(tmp_path / "killed/checkpoint-4")
    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss") == history(whole, "loss") and len(history(whole, "loss")) == 4
    states = [get_peft_model_state_dict(each.model) for each in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_encoder_runs_for_text_alone_too(processor, tmp_path):
    """As many times as for pictures: sharded, another process may have such."""
    runs = []
    for rows in (make_rows()[:2], make_rows()[2:]):
        trainer = make_trainer(processor, tmp_path, make_model(processor), per_device_train_batch_size=2)
        trainer.train_dataset = rows
        calls = [0, 0]
        for i, model in enumerate((trainer.model, trainer.ref_model)):
            model.model.vision_tower.register_forward_hook(
                lambda *_, i=i, calls=calls: calls.__setitem__(i, calls[i] + 1)
            )
        trainer.train()
        runs.append(calls)
    assert runs[0] == runs[1] == [1, 1]


def test_stock_arguments_are_taken_over(processor, tmp_path):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", beta=0.3, max_steps=1)
    dataset = IterableDataset.from_generator(lambda: iter(make_rows()))
    trainer = PumaDPOTrainer(make_model(processor), args=args, processing_class=processor, train_dataset=dataset)
    assert isinstance(trainer.args, PumaDPOConfig) and trainer.args.beta == 0.3
    assert trainer.args.max_length is None and not trainer.args.remove_unused_columns


def test_what_is_refused(processor, tmp_path):
    for option in ({"precompute_ref_log_probs": True}, {"precompute_ref_batch_size": 2}, {"dataset_num_proc": 2}):
        with pytest.raises(ValueError, match=f"does not support {next(iter(option))}="):
            PumaDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **option)
    for args in (object(), SFTConfig(str(tmp_path), use_cpu=True, bf16=False)):
        with pytest.raises(ValueError, match=f"args must be a PumaDPOConfig, got a {type(args).__name__}"):
            PumaDPOTrainer(make_model(processor), args=args, processing_class=processor)
    model = make_model(processor)
    with pytest.raises(ValueError, match="merge that adapter into the model, or make one with .*token_ids="):
        make_trainer(processor, tmp_path, model, peft_config=puma_lora_config(model, puma_token_ids(processor), r=4))
    with pytest.raises(ValueError, match="model_init_kwargs=.* has no part in a model that is given"):
        make_trainer(processor, tmp_path, make_model(processor), model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="does not support pad_token='</s>'"):
        PumaDPOConfig(str(tmp_path), use_cpu=True, bf16=False, pad_token="</s>")


def test_the_collator_knows_the_scales(processor, model, tmp_path):
    trainer = make_trainer(processor, tmp_path, model)
    batch = trainer.data_collator([{**make_rows()[0], "finest_given_scale": 2}])
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [1, 1]
