"""The model card of an LR stream: the page that the Hugging Face hub shows, and the metadata that it searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dit4sr_pl.common.files import is_shipped
from dit4sr_pl.common.hub import PROMPTS, RELEASED_BASE, HubAddress
from dit4sr_pl.common.markdown import markdown_table
from dit4sr_pl.model import Student, TrainedPart, Variant
from dit4sr_pl.model.trained_part import flat_config
from dit4sr_pl.scores.results import Result

TASK = "image-to-image"  # the hub's name of it
PAPER = "https://arxiv.org/abs/2503.23580"


@dataclass(frozen=True)
class Publication:
    """An LR stream and what its card says.

    Args:
        part: the LR stream.
        address: where it goes.
        training: settings of its training by their name, as text; may be empty.
        results: its scores, one result per set of images.
        pictures: pictures that it restored.
        license: the card's `license`, `license_name` and `license_link`; empty: those of the base.
        prompts: file of prompt embeddings that go with it; None: none do.
    """

    part: TrainedPart
    address: HubAddress
    training: Mapping[str, str]
    results: Sequence[Result]
    pictures: Sequence[Path]
    license: Mapping[str, str]
    prompts: Path | None = None

    @property
    def word(self) -> str:
        """The word that commands take as `checkpoint`."""
        place = "/".join(filter(None, [f"hub:{self.address.repo}", self.address.subfolder]))
        return place if self.address.revision == "main" else f"{place}@{self.address.revision}"

    @property
    def base(self) -> str:
        """Name of the base."""
        return self.part.base["name"]

    @property
    def base_is_on_hub(self) -> bool:
        """Whether the base's name is a hub id, and not a model in this package, which has no slash, or a folder."""
        is_folder = self.base.startswith((".", "/", "~")) or Path(self.base).exists()
        return "/" in self.base and not is_folder


def model_card(publication: Publication) -> ModelCard:
    """Returns the card, with the hub's metadata at its top."""
    sections = [
        introduction(publication),
        f"## Use\n\n{use(publication.word)}",
        f"## Network\n\n{table(network(publication.part))}",
    ]
    if publication.training:
        sections.append(f"## Training\n\n{table(publication.training)}")
    if publication.results:
        how = "Means over images; of FID and KID the score of the whole set."
        sections.append(f"## Scores\n\n{how}\n\n{scores(publication.results)}")
    if publication.pictures:
        shown = "\n".join(f"![{picture.stem}](images/{picture.name})" for picture in publication.pictures)
        sections.append(f"## Restored pictures\n\n{shown}")
    text = "\n\n".join(sections)
    return ModelCard(f"---\n{metadata(publication).to_yaml()}\n---\n\n{text}\n")


def metadata(publication: Publication) -> ModelCardData:
    """Returns what the hub reads of a card."""
    variant = Variant(**publication.part.network_config["variant"]).name
    student = ["distilled"] if "student" in publication.part.network_config else []
    base = {"base_model": publication.base, "base_model_relation": "adapter"} if publication.base_is_on_hub else {}
    results = [
        EvalResult(TASK, result.dataset, result.dataset, metric, round(mean, 4))
        for result in publication.results
        for metric, mean in result.means.items()
        if mean == mean
    ]
    return ModelCardData(
        **base,
        **(publication.license or license_of(publication.base)),
        library_name="dit4sr_pl",
        pipeline_tag=TASK,
        tags=[
            *("dit4sr", "super-resolution", "image-restoration", "diffusion-transformer", f"variant:{variant}"),
            *student,
        ],
        model_name=publication.address.repo.partition("/")[2],
        eval_results=results or None,
    )


def license_of(base: str) -> dict[str, str]:
    """Returns the licence of an LR stream, which starts from projections of its base, as the hub names it."""
    if is_shipped(base):
        return {"license": "apache-2.0"}  # that of this package
    link = f"https://huggingface.co/{RELEASED_BASE}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": "stabilityai-ai-community", "license_link": link}


def introduction(publication: Publication) -> str:
    """Returns the title and what the model is."""
    weights = sum(weight.numel() for weight in publication.part.state.values())
    base = f"[{publication.base}](https://huggingface.co/{publication.base})"
    base = base if publication.base_is_on_hub else f"`{publication.base}`"
    text = f" With `{PROMPTS}` next to it, restoring without captions reads no text encoder." * bool(
        publication.prompts
    )
    return (
        f"# {publication.address.repo.partition('/')[2]}\n\n"
        f"An LR stream of [DiT4SR]({PAPER}) (Duan et al., ICCV 2025), which restores low-resolution photos: "
        f"{weights:,} weights that were trained over {base}. `lr_stream.safetensors` holds the LR stream alone.{text}"
        f"{sampling(Student.of(publication.part.network_config))}"
    )


def sampling(student: Student | None) -> str:
    """Returns how a student restores, as sentences after others; empty for a teacher."""
    if student is None:
        return ""
    steps = "as many steps as its sampler has" if student.sigmas is None else f"{len(student.sigmas)} steps"
    scale = "takes the scale of guidance as an input" if student.guidance == "input" else "has guidance built in"
    return (
        " It is a student, distilled from a teacher over the same base: it restores in "
        f"{'1 step' if steps == '1 steps' else steps}, with one evaluation of the network each, {scale}, and runs no "
        "negative prompt. Commands and the pipeline read this from the file."
    )


def network(part: TrainedPart) -> dict[str, object]:
    """Returns what a card's table says of the network, by name."""
    return {name: value for name, value in flat_config(part.network_config).items() if name != "network"}


def use(word: str) -> str:
    """Returns how the model is used, in a shell and in Python."""
    return (
        f"```\npython -m dit4sr_pl.restore input=photo.jpg checkpoint={word}\n```\n\n"
        "```python\nfrom PIL import Image\nfrom dit4sr_pl.pipeline import DiT4SRPipeline\n\n"
        f'pipe = DiT4SRPipeline.from_pretrained("{word}")\n'
        'pipe(Image.open("photo.jpg")).images[0].save("restored.png")\n```'
    )


def table(values: Mapping[str, object]) -> str:
    """Returns values by name as a table."""
    return markdown_table(["setting", "value"], [[name, str(value)] for name, value in values.items()])


def scores(results: Sequence[Result]) -> str:
    """Returns the means of all results as a table; a metric that a set was not measured with has a dash."""
    metrics = list(dict.fromkeys(metric for result in results for metric in result.metrics))
    rows = []
    for result in results:
        means = [result.means.get(metric, float("nan")) for metric in metrics]
        cells = [f"{mean:.4f}" if mean == mean else "-" for mean in means]
        rows.append([result.dataset, str(len(result.scores)), *cells])
    return markdown_table(["set", "images", *metrics], rows)
