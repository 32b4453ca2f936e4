"""Compares the sentence filter with the prompts that the release makes of captions.

    python benchmarks/prompt_filter.py FILE.jsonl

Every row of the file has the set of an image, its caption (`prompt`) and what the release makes of it (`filtered`).
"""

import json
import sys
from collections import Counter
from pathlib import Path

from dit4sr_pl.cli.command import read_conf
from dit4sr_pl.images.captions import drop_sentences


def main() -> None:
    words = read_conf("restore").captions.dropped_words
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    prompts, changed, different = Counter(), Counter(), Counter()
    for row in rows:
        ours = drop_sentences(row["prompt"], words)
        prompts[row["set"]] += 1
        changed[row["set"]] += ours != row["prompt"].strip()
        different[row["set"]] += ours != row["filtered"]
    for name in prompts:
        print(f"{name:20s} {prompts[name]:4d} prompts, {changed[name]:4d} changed, {different[name]:4d} differences")
    print(f"{'all':20s} {len(rows):4d} prompts, {changed.total():4d} changed, {different.total():4d} differences")


if __name__ == "__main__":
    main()
