"""The length of T5's share of the text stream. Needs no PyTorch."""

import json
from pathlib import Path

from dit4sr_pl.common.files import ASSETS

TRAINED_TOKENS = 77  # T5 tokens that SD3 and DiT4SR were trained with
TOKENIZER, ENCODER = "tokenizer_3/tokenizer_config.json", "text_encoder_3/config.json"
VOCABULARY = 32000  # words that every published T5 has at least; toy models have fewer


def check_t5_tokens(t5_tokens: int, longest: int, name: str) -> None:
    """Checks that prompts are not cut to fewer tokens than a T5 and its transformer were trained with.

    Args:
        t5_tokens: tokens that prompts get.
        longest: tokens that this T5's tokenizer takes; toy models take 8.
        name: name of the model, for the message.

    Raises:
        ValueError: they are cut.
    """
    if t5_tokens < TRAINED_TOKENS <= longest:
        raise ValueError(
            f"t5_tokens={t5_tokens}: {name} has a real T5, and DiT4SR was trained with {TRAINED_TOKENS} of its tokens; "
            "give backbone=sd35_medium without a sampler (in train, model=dit4sr), or sampler=paper"
        )


def longest_prompt(name: str) -> int:
    """Returns the number of tokens that a backbone's T5 takes, from the config of its tokenizer or encoder.

    0 is returned if the backbone has no T5, has a toy T5 without tokenizer, or has no files on this machine.

    Args:
        name: name of a backbone, see `Backbone`.
    """
    for folder in (ASSETS / name, Path(name).expanduser(), ASSETS / "published" / name):
        if (folder / TOKENIZER).is_file():
            return json.loads((folder / TOKENIZER).read_text()).get("model_max_length", TRAINED_TOKENS)
        if (folder / ENCODER).is_file():
            real = json.loads((folder / ENCODER).read_text())["vocab_size"] >= VOCABULARY
            return TRAINED_TOKENS if real else 0
    return 0
