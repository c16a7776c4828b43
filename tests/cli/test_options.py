"""Values of options: what they become, and what is refused."""

from argparse import ArgumentParser, ArgumentTypeError

import pytest

from vit.cli import options


def test_sizes():
    assert [options.image_size(text) for text in ("384", "224x448", "native")] == [384, (224, 448), "native"]


def test_lists_have_no_repetitions():
    assert options.listed(options.image_size)("64,24x32,native,64") == [64, (24, 32), "native"]


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (options.image_size, "3x", "expected 384, 224x448 .height x width. or native, got '3x'"),
        (options.listed(options.positive), "1,-2", "expected a whole number above 0, got '-2'"),
        (options.listed(options.positive), "1,", "expected a whole number above 0, got ''"),
        (options.listed(options.one_of("a", "b")), "a,c", "expected one of a, b, got 'c'"),
        (options.setting, "num_heads", "expected FIELD=VALUE such as num_heads=12, got 'num_heads'"),
        (options.device, "abacus", "'abacus' cannot be used here"),
    ],
)
def test_refused_values(parse, text, message):
    with pytest.raises(ArgumentTypeError, match=message):
        parse(text)


@pytest.mark.parametrize("default", [None, "native"])
def test_the_help_on_sizes_names_the_default_of_each(default):
    parser = ArgumentParser()
    options.add_size(parser, default)
    text = " ".join(parser.format_help().split())
    assert f"default: {default or 'the size the model was trained at'}" in text
    assert "default: native if SIZE is native, else the model's own" in text
    assert options.sizing(parser.parse_args(["--img-size", "native"]))["mode"] == "native"
    assert options.sizing(parser.parse_args(["--img-size", "64"]))["mode"] is None  # the model's own
    assert "the cost of attention grows with the square of their number" in text
