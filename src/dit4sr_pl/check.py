"""python -m dit4sr_pl.check FOLDER...: verifies runs, evaluations, embeddings and manifests, and changes nothing"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from dit4sr_pl.cli.command import mistakes_in_one_line
from dit4sr_pl.common.hub import PROMPTS
from dit4sr_pl.common.progress import signs_of_life

Problems = Iterator[str]


def main() -> None:
    """Checks folders and prints what is wrong; exits with 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m dit4sr_pl.check", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run, an evaluation, embeddings, or a manifest")
    arguments = parser.parse_args()
    with mistakes_in_one_line(), signs_of_life("check"):
        sys.exit(1 if sum(report(Path(folder)) for folder in arguments.folders) else None)


def report(folder: Path) -> int:
    """Prints the problems of a folder and returns their number.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds nothing that this project writes.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder")
    kinds = kinds_of(folder)
    if not kinds:
        raise ValueError(f"{folder}: neither a run nor an evaluation, embeddings or a manifest; give such a folder")
    problems = [problem for check in kinds.values() for problem in check(folder)]
    problems += [] if folder.is_file() else leftovers(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{folder}: {' and '.join(kinds)}, {f'{len(problems)} problems' if problems else 'whole'}")
    return len(problems)


def kinds_of(folder: Path) -> dict[str, Callable[[Path], Problems]]:
    """Returns what a folder holds, with the function that checks it."""
    from dit4sr_pl.data.manifest import MANIFEST
    from dit4sr_pl.training.former_run import holds_run

    if folder.is_file():
        return {"a manifest": check_manifest} if folder.suffix == ".parquet" else {}
    kinds = {}
    if holds_run(folder):
        kinds["a run"] = check_run
    elif (folder / "settings.json").is_file() or (folder / "results.parquet").is_file():
        kinds["an evaluation"] = check_evaluation
    if (folder / "index.json").is_file() and not (folder / "config.json").is_file():
        kinds["embeddings"] = check_embeddings
    if (folder / PROMPTS).is_file():
        kinds["prompt embeddings"] = check_shipped
    if (folder / MANIFEST).is_file():
        kinds["a manifest"] = lambda folder: check_manifest(folder / MANIFEST)
    return kinds


def message(error: Exception, path: Path) -> str:
    """Returns an error as one line that names the file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if str(path) in text else f"{path}: {text}"


def check_run(folder: Path) -> Problems:
    """Yields what is wrong with a run: checkpoints, trained weights, scores, pictures."""
    from dit4sr_pl.common.hashing import weights_hash
    from dit4sr_pl.model import load_part
    from dit4sr_pl.model.training_state import read_checkpoint
    from dit4sr_pl.training.run_folder import CONFIG, FINISHED, checkpoints_in, finished_steps, read_config

    yield from tried(lambda: read_config(folder / CONFIG), folder / CONFIG)
    for path in checkpoints_in(folder):
        try:
            if (step := read_checkpoint(path)["global_step"]) != int(path.stem):
                yield f"{path}: is of step {step}"
        except (ValueError, OSError) as error:
            yield message(error, path)
    hashes = set()
    for path in [folder / f"{name}.safetensors" for name in ("lr_stream", "controlnet")]:
        if path.exists():
            try:
                hashes.add(weights_hash(load_part(path).state))
            except (ValueError, OSError) as error:
                yield message(error, path)
    if (folder / FINISHED).is_file():
        if not finished_steps(folder, 1):
            yield f"{folder / FINISHED}: empty or damaged; the run counts as unfinished"
        elif not hashes:
            yield f"{folder}: finished, but its trained weights are missing or damaged; train its last step again"
    if (folder / "results.parquet").is_file():
        yield from check_result(folder, hashes)


def check_evaluation(folder: Path) -> Problems:
    """Yields what is wrong with an evaluation: its identity, scores and pictures."""
    from dit4sr_pl.common.hashing import values_hash
    from dit4sr_pl.common.run_identity import hashed_part
    from dit4sr_pl.evaluation.scoring import SETTINGS, read_pieces
    from dit4sr_pl.scores.results import read_result

    path = folder / SETTINGS
    identity = None
    if path.is_file():
        try:
            identity = json.loads(path.read_text(encoding="utf-8"))
            identity_hash = values_hash(hashed_part(identity))
        except (ValueError, AttributeError, OSError) as error:
            yield message(error, path)
            identity = None
    if not (folder / "results.parquet").is_file():
        yield from tried(lambda: read_pieces(folder), folder / "parts")
        yield f"{folder}: not finished; the same command resumes"
        return
    yield from check_result(folder, set())
    if identity is not None:
        try:
            if read_result(folder).identity_hash != identity_hash:
                yield f"{path}: not of the evaluation whose results are next to it"
        except (ValueError, OSError):
            pass  # told above


def check_result(folder: Path, hashes: set[str]) -> Problems:
    """Yields what is wrong with scores and pictures.

    Args:
        folder: folder of a run or an evaluation.
        hashes: hashes of the trained weights next to the result; empty: there are none.
    """
    from dit4sr_pl.images.files import check_image
    from dit4sr_pl.scores.results import read_result

    try:
        result = read_result(folder)
    except (ValueError, OSError) as error:
        yield message(error, folder)
        return
    if hashes and result.weights_hash not in hashes:
        yield f"{folder}: the scores are of other weights than the trained ones next to them"
    if result.pictures == "images":
        for name in result.scores:
            path = folder / result.pictures / f"{name}.png"
            yield from tried(lambda path=path: check_image(path), path)


def check_embeddings(folder: Path) -> Problems:
    """Yields what is wrong with a cache of embeddings: its index, and every prompt's embeddings."""
    from dit4sr_pl.backbone.prompt_cache import INDEX, Origin, embeddings_hash, open_file, prompt_key, read_index
    from dit4sr_pl.preparation.embeddings import list_cache_files

    found, origins = {}, set()
    for path in list_cache_files(folder):
        try:
            file, header = open_file(path)
            origins.add((header["backbone"], header["t5_tokens"]))
            for key, prompt in header["prompts"].items():
                found[key] = path.name
                read = file.get_tensor(f"{key}.embeds"), file.get_tensor(f"{key}.pooled")
                if prompt_key(prompt) != key or header.get("hashes", {}).get(key) not in (None, embeddings_hash(*read)):
                    yield f"{path}: {prompt!r} is damaged; delete it and run prepare stage=embeddings"
        except Exception as error:  # safetensors has errors of its own
            yield message(error, path)
    if len(origins) > 1:
        yield f"{folder}: embeddings of several backbones: {sorted(origins)}"
    try:
        indexed, _ = read_index(folder / INDEX, Origin(*origins.pop())) if origins else ({}, {})
        if absent := sorted(key for key in indexed.keys() | found.keys() if indexed.get(key) != found.get(key)):
            yield f"{folder / INDEX}: not of the files next to it ({len(absent)} prompts); run prepare stage=embeddings"
    except (ValueError, OSError) as error:
        yield message(error, folder / INDEX)


def check_shipped(folder: Path) -> Problems:
    """Yields what is wrong with the prompt embeddings next to weights."""
    from dit4sr_pl.backbone.shipped_prompts import ShippedPrompts

    yield from tried(lambda: ShippedPrompts.read(folder / PROMPTS), folder / PROMPTS)


def check_manifest(path: Path) -> Problems:
    """Yields what is wrong with the photos that a manifest lists: missing ones, and those of other bytes."""
    import pyarrow.parquet

    from dit4sr_pl.data.manifest import list_photos, read_manifest

    try:
        read_manifest(path)
        rows = pyarrow.parquet.read_table(path, columns=["path", "size", "hash", "error"]).to_pylist()
    except (ValueError, OSError) as error:
        yield message(error, path)
        return
    for row in rows:
        photo = path.parent / row["path"]
        if row["error"] is not None:
            yield f"{photo}: damaged when the manifest was made ({row['error']})"
            continue
        try:
            with photo.open("rb") as file:
                if hashlib.file_digest(file, "blake2b").hexdigest() != row["hash"]:
                    yield f"{photo}: has changed since the manifest was made; run prepare stage=manifest again"
        except OSError as error:
            yield f"{photo}: cannot be read ({error.strerror})"
    if new := sorted(set(list_photos(path.parent)) - {row["path"] for row in rows}):
        yield f"{path}: {len(new)} photos are not in it, such as {new[0]}; run prepare stage=manifest again"


def tried(read: Callable[[], object], path: Path) -> Problems:
    """Yields the error of reading a file, if there is one."""
    try:
        read()
    except (ValueError, OSError, KeyError, AttributeError) as error:
        yield message(error, path)


def leftovers(folder: Path) -> list[str]:
    """Returns what stopped processes have left."""
    left = [f"{path}: left by a process that was killed, or being written now" for path in folder.glob(".*.partial")]
    return left + [f"{path}: of a run that is being replaced" for path in folder.glob(".former_run")]


if __name__ == "__main__":
    main()
