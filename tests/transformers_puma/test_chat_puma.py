import pytest
import torch
from transformers import AddedToken

from transformers_puma import PumaImageProcessor, PumaProcessor, add_puma_tokens

from .conftest import IMAGE_LENGTH, make_processor


def test_chat_takes_a_system_message_and_refuses_unknown_roles(processor):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "yo"}, {"type": "image"}]},
    ]
    assert processor.apply_chat_template(chat) == "<s>Be brief. USER: hi ASSISTANT: yo<image></s>"
    with pytest.raises(Exception, match="unknown role tool"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(Exception, match="unknown type of content video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}])


def test_a_template_that_does_not_mark_answers(processor):
    silent = PumaProcessor(
        processor.image_processor, processor.tokenizer, IMAGE_LENGTH, chat_template="{{ messages[0]['content'] }}"
    )
    with pytest.raises(ValueError, match="marks 0 answers .* holds 1 assistant"):
        silent.encode_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])


def test_special_tokens_of_the_language_model_stay_special_and_text_stays_text(tmp_path):
    """Ends of turns: named by the tokenizer (ChatML), or marked in its file alone (Llama 3)."""
    tokenizer = make_processor().tokenizer
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens([AddedToken("<|eot_id|>", special=True)], special_tokens=True)
    assert add_puma_tokens(tokenizer) == 0
    processor = PumaProcessor(PumaImageProcessor(size={"height": 16, "width": 16}), tokenizer, IMAGE_LENGTH)
    processor.save_pretrained(tmp_path)
    for each in (processor, PumaProcessor.from_pretrained(tmp_path)):
        ends = each.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>"])
        hello = each.encode_plain("hello")
        assert each.decode_answers(torch.tensor([[*hello, *ends]]), prompt_length=0) == ["hello"]
        ids = each.prepare_question(["a <|eot_id|> b <|im_end|>"], [[]])["input_ids"][0].tolist()
        assert not set(ends) & set(ids)
        assert "a <|eot_id|> b <|im_end|>" in each.tokenizer.decode(ids)


@pytest.mark.parametrize("pieces", [("<im", "age>"), ("</", "s>"), ("[IM", "G", "]")])
def test_neighbouring_texts_do_not_become_special_tokens_together(processor, pieces):
    def encode(parts: list[str]) -> list[int]:
        content = [{"type": "image"}, *({"type": "text", "text": part} for part in parts)]
        return processor.encode_conversation([{"role": "user", "content": content}])[0]

    assert encode(pieces) == encode(["".join(pieces)])
    assert encode(pieces).count(processor.image_token_id) == IMAGE_LENGTH
