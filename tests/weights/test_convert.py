"""From one layout to another, in memory; tests/weights/test_layouts.py has every pair of layouts."""

from checkpoints import CONFIG, SMALL, same
from helpers import images, ours_from, timm_twin

import vit


def test_timm_to_ours_and_back_is_the_same_state_dict():
    theirs = timm_twin(CONFIG).state_dict()
    ours = vit.weights.convert(theirs, config=CONFIG)
    back = vit.weights.convert(ours.state_dict, target="timm", config=CONFIG)
    assert ours.report.source == "timm" and back.report.source == "vit"
    assert back.state_dict.keys() == theirs.keys()
    assert all(back.state_dict[name] is theirs[name] for name in theirs)  # renamed, neither copied nor changed
    steps = {step.ours: step for step in ours.report.steps}
    assert steps["blocks.1.attention.qkv.weight"].source == ["blocks.1.attn.qkv.weight"]
    assert not any(step.transforms for step in ours.report.steps)


def test_converting_keeps_gradients_possible(timm_file):
    model = vit.load_pretrained(timm_file).train()
    model(images(1, 3, 32, 48)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert same(ours_from(timm_twin(SMALL), SMALL), model)
