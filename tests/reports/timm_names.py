"""Print what becomes of timm's ViT-like models by name: python tests/reports/timm_names.py [WORD ...]

Each is built with random weights and one or two blocks, written as timm writes it, loaded here and compared with timm.
With words, only names that hold one of them. About ten minutes on two cores and 12 GB; exit code 1 if a folder with
its config.json gives other logits than timm's.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from timm_names import Outcome, names, outcomes

_REASONS = r"(architecture '|missing keys|unexpected keys|wrong shapes|unknown layout|belongs to).*"


def cell(outcome: Outcome) -> str:
    """An outcome as the table shows it: the difference, or how the refusal begins."""
    if outcome.result != "refused":
        return f"{outcome.result} {outcome.why}"
    reason = re.search(_REASONS, outcome.why)
    return f"refused: {(reason[0] if reason else outcome.why)[:60]}"


def main(words: list[str]) -> int:
    """Print a line for each model, then how many came out how."""
    counts: dict[str, Counter[str]] = {}
    for name in names():
        if words and not any(word in name for word in words):
            continue
        found = outcomes(name)
        if not counts:
            print("| model |", " | ".join(found), "|\n|---|" + "---|" * len(found))
        print("|", name, "|", " | ".join(map(cell, found.values())), "|", flush=True)
        for way, outcome in found.items():
            counts.setdefault(way, Counter())[outcome.result] += 1
    print()
    for way, results in counts.items():
        print(f"{way}: {', '.join(f'{count} {result}' for result, count in results.most_common())}")
    return int(any(results["WRONG"] for way, results in counts.items() if way.startswith("folder")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
