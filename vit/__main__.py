"""`python -m vit` is the command line, so that `torchrun -m vit` is too."""

import os
import sys

from .cli import main

code = main()
if "RANK" in os.environ:  # a process of torchrun
    # Everything is written and closed. While an interpreter ends, a thread of gloo that drops its last tensor only now
    # asks for Python's lock and aborts the process (pytorch/pytorch#179291): torchrun would call the run a failure.
    os._exit(code)
sys.exit(code)
