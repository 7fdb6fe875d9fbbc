"""Write what ``accuracy.py`` measured into a model's card.

python benchmarks/write_card_metrics.py accuracy.json resources/models/brain-tissue-lesion
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from napari_brainmvp.io import write_text_atomic
from napari_brainmvp.models import Metric
from napari_brainmvp.models.registry import CARD_FILE, read_card

SCRIPT = "benchmarks/accuracy.py"


def metrics(table: dict) -> list[Metric]:
    """Turn the measured table into the card's list."""
    first, last = table["seeds"]
    rows = []
    for keys, scores in table.get("synthetic", {}).items():
        data = f"held-out synthetic studies, seeds {first} to {last - 1}, from {keys}"
        rows += [(data, name, value, last - first) for name, value in scores.items()]
    for name, value in table["MNI152 T1"].items():
        rows.append(("MNI152 T1 alone, against its own tissue maps", name, value, 1))
    if "real gliomas" in table:
        cases = len(table["real gliomas"]) - 1
        for name, value in table["real gliomas"]["mean"].items():
            rows.append(
                (f"{cases} real glioma studies (BraTS 2018 training set), never trained on", name, value, cases)
            )
    for name, value in table.get("real MS", {}).items():
        rows.append(("one real MS study (Lesjak et al. 2017), never trained on", name, value, 1))
    return [Metric(data=d, name=f"Dice, {n}", value=round(v, 3), n=k, script=SCRIPT) for d, n, v, k in rows]


def main() -> None:
    """Check that the numbers belong to these weights, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    table, card = json.loads(arguments.table.read_text()), read_card(arguments.model)
    if table["sha256"] != card.sha256:
        parser.error("these numbers were measured with other weights")
    measured = card.model_copy(update={"metrics": tuple(metrics(table))})
    write_text_atomic(arguments.model / CARD_FILE, measured.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    main()
