"""What the tests of models that are optimized for a CPU share."""

from helpers import randomize

import vit

SMALL = {"img_size": 64, "embed_dim": 64, "num_heads": 2, "depth": 3, "num_classes": 10}


def model(**changes: object) -> vit.ViT:
    """A small one, with weights that matter."""
    return randomize(vit.create_model("vit_small_patch16_224", **(SMALL | changes))).eval()
