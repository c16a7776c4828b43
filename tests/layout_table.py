"""Print the README's table of layouts: python tests/layout_table.py"""

from layout_cases import CASES, WRITTEN_ONLY, case_config, read_theirs, written_to_them

from vit.weights.layouts import LAYOUTS


def rows(depth: int = 12) -> list[tuple[str, str, str, str, str]]:
    """Layout, whose it is, read, written, proved by: the largest difference of an output over the largest output."""
    table = []
    for case in (case_config(case, depth) for case in CASES):
        read, _ = read_theirs(case)
        written = written_to_them(case.layout, case.config)
        what = "logits" if case.config.num_classes else "tokens"
        table.append((case.layout, what, f"{read:.1e}", f"{written:.1e}", case.peer))
    for layout, (peer, config) in WRITTEN_ONLY.items():
        written = written_to_them(layout, config.override(depth=depth))
        table.append((layout, "logits", "round trip", f"{written:.1e}", peer))
    return table


def main() -> None:
    """Print them as markdown."""
    print("| layout | whose | compared | read | written | proved by |\n|---|---|---|---|---|---|")
    for layout, what, read, written, peer in rows():
        print(f"| `{layout}` | {LAYOUTS[layout].about} | {what} | {read} | {written} | {peer} |")


if __name__ == "__main__":
    main()
