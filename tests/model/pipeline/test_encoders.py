"""Text is encoded by the real UMT5 architecture and a real tokenizer, images by CLIP, both tiny and random."""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from model import InputError
from model.pipeline.encoders import clean_prompt, empty_text, encode_image, encode_prompt, load_text_embedding
from tests.support.tolerances import PARITY, relative_error


def save_text_encoder(path, text_dim=16):
    """Saves a UMT5 encoder and a word tokenizer with an end token, in the layout of diffusers, and returns both."""
    words = ["<pad>", "</s>", "<unk>", "a", "wave", "rolls", "in"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path / "tokenizer")
    config = UMT5Config(vocab_size=7, d_model=text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    model = UMT5EncoderModel(config).eval()
    model.save_pretrained(path / "text_encoder")
    return fast, model


def test_prompt_equals_the_padded_and_masked_encoding_of_wan(tmp_path):
    tokenizer, model = save_text_encoder(tmp_path)
    actual = encode_prompt("a  wave rolls&amp;amp;  in", tmp_path)
    tokens = tokenizer("a wave rolls& in", padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        expected = model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    expected = expected * tokens.attention_mask.unsqueeze(-1)
    assert actual.shape == (1, 512, 16)
    assert relative_error(actual, expected) < PARITY
    assert tokens.attention_mask.sum() == 6
    assert not actual[:, 6:].any()


def test_empty_and_overlong_prompts(tmp_path):
    save_text_encoder(tmp_path)
    assert encode_prompt("", tmp_path)[0].any(dim=-1).sum() == 1  # the end token alone
    assert encode_prompt("wave " * 700, tmp_path)[0].any(dim=-1).sum() == 512


def test_prompt_is_cleaned():
    assert clean_prompt("  caf\u00c3\u00a9 &amp;quot;now&amp;quot;\n\t ok ") == 'caf\u00e9 "now" ok'


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 16), torch.float32), ((1, 5, 16), torch.bfloat16), ((5, 16), torch.float16)]
)
def test_precomputed_embeddings_are_padded(tmp_path, shape, dtype):
    states = torch.randn(shape).to(dtype)
    save_file({"prompt_embeds": states}, tmp_path / "text.safetensors")
    text = load_text_embedding(tmp_path / "text.safetensors", 16)
    assert text.shape == empty_text(16).shape == (1, 512, 16)
    assert torch.equal(text[0, :5], states.view(5, 16).float())
    assert not text[:, 5:].any()


def test_unfit_embeddings_are_explained(tmp_path):
    file = tmp_path / "text.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        load_text_embedding(file, 16)
    file.write_text("no")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_text_embedding(file, 16)
    shapes = ((600, 16), (0, 16), (5, 15), (2, 5, 16), ())
    bad = torch.zeros(2, 5, 16)
    bad[0, 3, 2], bad[1, 3, 2] = torch.nan, -torch.inf
    for tensors, told in (
        ({"a": torch.zeros(5, 16), "b": torch.zeros(1)}, r"expected one tensor in .*, got a, b"),
        *(
            ({"a": torch.zeros(shape)}, rf"\[1 <= L <= 512, 16\] in .*, got {re.escape(str(shape))}")
            for shape in shapes
        ),
        ({"a": torch.zeros(5, 16, dtype=torch.int64)}, r"expected floating numbers in .*text.s.*, got a in int64"),
        ({"a": bad[0].clone()}, r"text-embeddings: a in .*text.safetensors: NaN$"),
        ({"a": bad[1].half()}, r"text-embeddings: a in .*text.safetensors: infinity$"),
    ):
        save_file(tensors, file)
        with pytest.raises(InputError, match=told):
            load_text_embedding(file, 16)


def test_encoders_that_are_missing_or_have_damaged_weights_are_named(tmp_path):
    with pytest.raises(InputError, match="no UMT5 encoder in"):
        encode_prompt("a", tmp_path)
    with pytest.raises(InputError, match="needs a CLIP encoder in"):
        encode_image(None, tmp_path)
    _, model = save_text_encoder(tmp_path)
    with torch.no_grad():
        model.shared.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(InputError, match="text_encoder in float32, whose weights may be damaged: NaN"):
        encode_prompt("a wave", tmp_path)


def test_image_tokens_are_clips_last_but_one_hidden_state(tmp_path):
    config = CLIPVisionConfig(
        hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, patch_size=14
    )
    model = CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path / "image_encoder")
    processor = CLIPImageProcessor()
    processor.save_pretrained(tmp_path / "image_processor")
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    with torch.no_grad():
        pixels = processor(images=image, return_tensors="pt").pixel_values
        expected = model(pixels, output_hidden_states=True).hidden_states[2]
    actual = encode_image(image, tmp_path)
    assert actual.shape == (1, 257, 20)
    assert relative_error(actual, expected) < PARITY
