"""Print the table of layouts in weights/README.md: python tests/reports/layout_table.py (one to two minutes)"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from layout_cases import CASES, WRITTEN_ONLY, case_config, read_theirs, written_to_them

from vit.weights.layouts import LAYOUTS

Row = tuple[str, str, str, str, str]


def rows(depth: int, img_size: int) -> list[Row]:
    """Layout, whose it is, the largest difference read and written, and the models that proved it."""
    read: dict[str, float] = {}
    written: dict[str, float] = {}
    peers: dict[str, list[str]] = {}
    for case in (case_config(case, depth, img_size) for case in CASES):
        read[case.layout] = max(read.get(case.layout, 0.0), read_theirs(case)[0])
        written[case.layout] = max(written.get(case.layout, 0.0), written_to_them(case.layout, case.config))
        peers.setdefault(case.layout, []).append(case.peer.partition(" ")[2] if case.peer[:4] == "tran" else case.peer)
    for layout, peer, config in WRITTEN_ONLY:
        difference = written_to_them(layout, config.override(depth=depth, img_size=img_size))
        written[layout] = max(written.get(layout, 0.0), difference)
        peers.setdefault(layout, []).append(peer)
    return [
        (name, layout.about, f"{read[name]:.1e}" if name in read else "to the bit", f"{written[name]:.1e}",
         ", ".join(peers[name]))
        for name, layout in LAYOUTS.items() if name != "vit"
    ]  # fmt: skip


def as_markdown(table: list[Row]) -> str:
    """The table as in weights/README.md."""
    lines = ["| layout | whose | read | written | proved by |", "|---|---|---|---|---|"]
    lines += [f"| `{layout}` | {about} | {read} | {written} | {peer} |" for layout, about, read, written, peer in table]
    return "\n".join(lines)


if __name__ == "__main__":
    print(as_markdown(rows(depth=12, img_size=224)))
