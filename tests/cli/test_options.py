"""Values of options: what they become, and what is refused."""

from argparse import ArgumentTypeError

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
