"""Writes the prompt embeddings that come with a set of weights; see `backbone/shipped_prompts.py`."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from dit4sr_pl.backbone.prompt_cache import embeddings_hash, prompt_key
from dit4sr_pl.backbone.sd3 import Backbone
from dit4sr_pl.backbone.shipped_prompts import encoder_fingerprints
from dit4sr_pl.common.files import atomic_write
from dit4sr_pl.common.hub import pipeline_folder
from dit4sr_pl.model.trained_part import check_base


def write_prompt_embeddings(
    path: Path, backbone: Backbone, base: dict[str, str], prompts: Iterable[str], source: str | Path
) -> None:
    """Encodes prompts, one by one as restoring a single image does, and writes their embeddings atomically.

    Args:
        path: the file.
        backbone: the frozen pipeline with its text encoders, on the device that encodes.
        base: name and fingerprint of the base that the weights were trained over.
        prompts: the prompts.
        source: where the weights come from, for messages.

    Raises:
        FileNotFoundError: a component of the pipeline cannot be read.
        ValueError: the pipeline is not that of the weights, or a text encoder or tokenizer of it cannot be read.
    """
    check_base(backbone.transformer, base, source)
    tensors, texts, hashes = {}, {}, {}
    for prompt in sorted(set(prompts)):
        key, pair = prompt_key(prompt), backbone.encoder.encode(prompt, backbone.device)
        embeds, pooled = (tensor[0].contiguous() for tensor in pair)
        tensors |= {f"{key}.embeds": embeds, f"{key}.pooled": pooled}
        texts[key], hashes[key] = prompt, embeddings_hash(embeds, pooled)
    folder = pipeline_folder(backbone.location)  # after the text encoders were read, all files are there
    encoders = {name: found for name, found in encoder_fingerprints(folder).items() if found is not None}
    if not encoders or not all(encoders.values()):
        raise ValueError(
            f"{folder}: its text encoders or tokenizers cannot be read, by which embeddings name them; download the "
            "folder again"
        )
    header = {"backbone": base["name"], "fingerprint": base["fingerprint"], "text_encoders": encoders}
    header |= {"t5_tokens": backbone.t5_tokens, "prompts": texts, "hashes": hashes}
    with atomic_write(path) as partial:  # the metadata has one entry, since safetensors writes several in random order
        save_file(tensors, partial, {"embeddings": json.dumps(header)})
