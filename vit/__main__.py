"""`python -m vit` is the command line, so that `torchrun -m vit` is too."""

import sys

from .cli import main

sys.exit(main())
