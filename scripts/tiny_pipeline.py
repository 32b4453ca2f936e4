"""tiny-sd3 but for its transformer: the trained autoencoder, random text encoders, their tokenizers, the scheduler.

    python scripts/tiny_pipeline.py --vae outputs/tiny/vae --output src/dit4sr_pl/assets/tiny-sd3

Two CLIP text encoders and one T5 have SD3's classes and interfaces and no knowledge: tiny-sd3 is trained on empty
prompts. Vocabularies are single characters, and 8 tokens per encoder keep the text stream short beside 64 image tokens.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENS, CLIP_WIDTH, T5_WIDTH = 8, 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="trained autoencoder (tiny_vae.py)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    args = parser.parse_args()

    vae = AutoencoderDC.from_pretrained(args.vae).half()
    vae.register_to_config(_name_or_path="tiny-sd3")  # not the folder it was trained in
    vae.save_pretrained(args.output / "vae")

    for seed, suffix in ((1, ""), (2, "_2")):
        tokenizer = clip_tokenizer()
        tokenizer.save_pretrained(args.output / f"tokenizer{suffix}")
        clip_encoder(tokenizer, seed).half().save_pretrained(args.output / f"text_encoder{suffix}")
    tokenizer = t5_tokenizer()
    tokenizer.save_pretrained(args.output / "tokenizer_3")
    t5_encoder(tokenizer, seed=3).half().save_pretrained(args.output / "text_encoder_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(args.output / "scheduler")
    (args.output / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")


MODEL_INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderDC"],
}


def clip_tokenizer() -> CLIPTokenizer:
    characters = sorted(ByteLevel.alphabet())
    words = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS)


def clip_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def t5_tokenizer() -> T5Tokenizer:
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in characters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


def t5_encoder(tokenizer: T5Tokenizer, seed: int) -> T5EncoderModel:
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    )


if __name__ == "__main__":
    main()
