"""Marks of tests that TensorFlow runs in part."""

import pytest


def first_on_tensorflow(names, values, **options):
    """As `pytest.mark.parametrize`, but TensorFlow runs the first value only.

    The other values are marked `slow_on_tensorflow`.

    Args:
        names: string, names of arguments with commas between them, or a sequence.
        values: iterable of values, tuples of values or `pytest.param`.
        **options: further arguments of `parametrize`.
    """
    several = len(names.split(",") if isinstance(names, str) else names) > 1
    slow = pytest.mark.slow_on_tensorflow

    def marked(value):
        if hasattr(value, "marks"):
            marks = (*value.marks, slow)
            return pytest.param(*value.values, id=value.id, marks=marks)
        return pytest.param(*(value if several else (value,)), marks=slow)

    first, *others = values
    return pytest.mark.parametrize(names, [first, *map(marked, others)], **options)
