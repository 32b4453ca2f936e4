"""LLaVA of two layers with random weights, saved as the real one is, so that real loading code reads it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", "What", "is", "it", ":", "?"]
UNSPOKEN = [0, 1, 3, 4]
TEMPLATE = (
    "{% for message in messages %}USER : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT :{% endif %}"
)


def save_toy_llava(folder: Path) -> None:
    """Its answers are of words that the images decide on; see `UNSPOKEN` for those it never says."""
    words = WORDS + [f"word{i}" for i in range(52)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    image_token = {"extra_special_tokens": {"image_token": "<image>"}}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **image_token, **special)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    parts = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(LlavaImageProcessorPil(**size), fast, chat_template=TEMPLATE, **parts).save_pretrained(folder)

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **sizes),
        image_token_index=words.index("<image>"),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data.mul_(8)  # at their small start all images would look alike to it
    model.generation_config.suppress_tokens = UNSPOKEN
    model.save_pretrained(folder)
