"""The floors of the house: imports go down only, and some rooms have one door."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "dit4sr_pl"
FLOORS = [
    {"model.variant", "model.controlnet", "randomness", "files", "config", "bands", "tiling"}
    | {"degradation", "captions", "paper", "intervals", "metric_weights"},
    {"images", "color", "model.checkpoints", "results", "metrics", "provenance"},
    {"model.lr_stream", "latents", "text", "manifest", "embeddings", "captioner", "runs", "run_folder", "picture"},
    {"model.block", "model.released", "backbone", "flow", "photo_sets", "blocks", "jobs"},
    {"model.transformer", "orders", "strips", "picture_restorer"},
    {"model", "model.attention_maps", "tables"},
    {"sampling", "skeleton", "cost", "charts"},
    {"data", "restorer", "budget"},
    {"demo_photos", "latent_pairs", "module", "callbacks", "pipeline"},
    {"sharded"},
    {"benchmark_sets"},
    {"methods"},
    {"scoring"},
    {"train", "restore", "evaluate", "demo", "convert", "plan", "prepare", "compare", "app"},
]


def imports(path: Path) -> set[str]:
    """Modules that a file names in import statements, wherever in the file they stand."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def room(module: str) -> str:
    """`model.block` for the network's files, else the first name: `degradation.ops` is in `degradation`."""
    return module if module.startswith("model") else module.split(".")[0]


FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_only(name):
    for imported in imports(FILES[name]):
        if imported.startswith("dit4sr_pl."):
            below = room(imported.removeprefix("dit4sr_pl."))
            assert below == room(name) or FLOOR_OF[below] < FLOOR_OF[room(name)], f"{name} imports {imported}"


@pytest.mark.parametrize(
    "library, allowed",
    [
        ("lightning", {"module", "data", "callbacks", "train"}),
        ("hydra", {"config", "train", "restore", "evaluate", "demo", "convert", "plan", "prepare", "app"}),
        ("pyiqa", {"metrics"}),
        ("gradio", {"app"}),
        ("spandrel", {"methods"}),
    ],
)
def test_libraries_have_their_rooms(library, allowed):
    users = {room(name) for name, path in FILES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users <= allowed


def test_model_files_stay_short():
    assert all(len(path.read_text().splitlines()) <= 400 for path in FILES.values())
