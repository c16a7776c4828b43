"""The notebook `examples/tour.ipynb` runs, finds the right label at both sizes, and its stored outputs are its own.

    python tests/examples/test_tour.py

runs the notebook and stores its outputs: do so after every change of it.
"""

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"
DECIMAL = re.compile(r"-?\d+\.\d+")  # a rounded number; whole ones (shapes, labels) are compared as text


def load() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook: NotebookNode) -> NotebookNode:
    """The same cells with new outputs, without anything that depends on the machine; an error in a cell is raised."""
    import matplotlib.font_manager  # noqa: F401  builds its cache of fonts, which a cell would be warned of

    executed = copy.deepcopy(notebook)
    NotebookClient(executed, timeout=300, kernel_name="python3", record_timing=False).execute()
    executed.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in executed.cells:
        cell.metadata = {}
    return executed


def printed(notebook: NotebookNode) -> list[str]:
    """What each cell prints, as one text; pictures count by what stands for them in text (their size)."""
    texts = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        texts.append("".join(out.text if "text" in out else out.data["text/plain"] + "\n" for out in outputs))
    return texts


def differences(stored: str, fresh: str) -> list[str]:
    """Lines that differ by more than one unit in the last place of a rounded number, as "stored -> fresh"."""
    lines, others = stored.splitlines(), fresh.splitlines()
    if len(lines) != len(others):
        return [f"{len(lines)} lines -> {len(others)} lines"]
    return [f"{line} -> {other}" for line, other in zip(lines, others) if not close(line, other)]


def close(line: str, other: str) -> bool:
    if DECIMAL.sub("#", line) != DECIMAL.sub("#", other):
        return False
    pairs = zip(DECIMAL.findall(line), DECIMAL.findall(other))
    return all(abs(float(a) - float(b)) <= 1.01 * 10 ** -len(a.partition(".")[2]) for a, b in pairs)


def test_it_runs_and_prints_what_is_stored():
    """A step that differs from the model's own result is an error in its cell, which `execute` raises."""
    stored = load()
    executed = execute(stored)
    for cell in executed.cells:
        for output in cell.get("outputs", []):  # no warnings, and no values that a last line left behind
            assert output.get("name") == "stdout" or output.output_type == "display_data", output
    for i, (old, new) in enumerate(zip(printed(stored), printed(executed)), start=1):
        assert not differences(old, new), f"cell {i}: run `python tests/examples/test_tour.py`"
    answers = re.findall(r"^label: (\d) with probability \S+; true label: (\d)$", "\n".join(printed(executed)), re.M)
    assert answers == [("3", "3")] * 2  # one for each size


def test_a_difference_is_noticed():
    assert not differences("label: 8 with 0.24\n", "label: 8 with 0.25\n")
    assert differences("label: 8 with 0.24\n", "label: 8 with 0.26\n")
    assert differences("label: 8 with 0.24\n", "label: 3 with 0.24\n")
    assert differences("z_0 [1, 65, 96]\n", "z_0 [1, 64, 96]\n")
    assert differences("one line\n", "one line\nand another\n")


def test_a_wrong_step_is_an_error():
    """Without the scale of the scores, the comparison with the model's own fails."""
    notebook = load()
    scaled = [cell for cell in notebook.cells if "/ d**0.5" in cell.source]
    assert len(scaled) == 2
    scaled[0].source = scaled[0].source.replace(" / d**0.5", "")
    with pytest.raises(CellExecutionError, match="not close"):
        execute(notebook)


def test_it_is_short_and_says_nothing_of_a_machine():
    notebook = load()
    assert len(notebook.cells) == 20  # as its title says
    assert NOTEBOOK.stat().st_size < 600_000
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 12, cell.source
            assert cell.outputs or "import torch" in cell.source  # they are stored, to be read without running it
    assert not re.search(r"/(home|tmp|root|usr|work)/", "".join(printed(notebook)))


if __name__ == "__main__":
    nbformat.write(execute(load()), NOTEBOOK)
