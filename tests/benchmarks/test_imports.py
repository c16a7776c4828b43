"""Benchmarks are not run in the suite, but what they import must exist."""

import subprocess
import sys
from pathlib import Path


def test_what_benchmarks_import_exists():
    folder = Path(__file__).parent
    names = [file.stem for file in folder.glob("*.py") if not file.stem.startswith("test_")]
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); import {', '.join(sorted(names))}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
