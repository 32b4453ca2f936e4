"""Uploads an LR stream with its model card to the Hugging Face hub."""

import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from dit4sr_pl.common.hub import LR_STREAM, PROMPTS, hub_errors
from dit4sr_pl.model import save_part
from dit4sr_pl.publishing.model_card import Publication, model_card


def push(publication: Publication, private: bool | None) -> str:
    """Uploads `lr_stream.safetensors`, `README.md` and `images/` in one commit, and returns the commit's page.

    Args:
        publication: the LR stream and what its card says.
        private: whether a new repository is private; None: as its owner's settings say. One that exists stays as it is.

    Raises:
        HubError: the token may not write there, or the hub is out of reach.
    """
    address, api = publication.address, HfApi()
    top = f"{address.subfolder}/" if address.subfolder else ""
    with tempfile.TemporaryDirectory() as folder:
        weights, card = Path(folder) / LR_STREAM, Path(folder) / "README.md"
        save_part(publication.part, weights)
        card.write_text(str(model_card(publication)))
        files = {LR_STREAM: weights, "README.md": card}
        files |= {PROMPTS: publication.prompts} if publication.prompts else {}
        files |= {f"images/{picture.name}": picture for picture in publication.pictures}
        with hub_errors(address.word, address.repo, address.revision, writes=True):
            api.create_repo(address.repo, private=private, exist_ok=True)
            commit = api.create_commit(
                address.repo,
                [CommitOperationAdd(top + name, str(file)) for name, file in files.items()],
                commit_message=f"Upload the LR stream {publication.word}",
                revision=address.revision,
            )
    return commit.commit_url
