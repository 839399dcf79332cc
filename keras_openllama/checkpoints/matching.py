"""Every tensor of a file finds its weight and every weight its tensor, or it raises."""

FLOATS = ("float32", "bfloat16", "float16", "float64")
_MAX_LISTED = 20


def match(tensors, expected, where):
    """Assigns the tensors of a checkpoint to the weights of a network.

    Args:
        tensors: dict of `tensors.StoredTensor`s by their names in the checkpoint.
        expected: dict by variable path of `(name, shape)`, both as in the checkpoint.
        where: what holds the tensors, for the message.

    Returns:
        Dict of the tensors by variable path, in the order of `expected`.

    Raises:
        ValueError: if tensors are missing, unexpected, of the wrong shape or no floats;
            the message lists them.
    """
    left = dict(tensors)
    matched, missing, misshapen, other = {}, [], [], []
    for path, (name, shape) in expected.items():
        stored = left.pop(name, None)
        if stored is None:
            missing.append(name)
        elif tuple(stored.shape) != shape:
            misshapen.append(f"{name} has {stored.shape} where {shape} is expected")
        elif stored.dtype not in FLOATS:
            other.append(f"{name} has {stored.dtype}")
        else:
            matched[path] = stored
    problems = {
        "missing": missing,
        "unexpected": left,
        "misshapen": misshapen,
        "no floating-point numbers": other,
    }
    found = [f"{what}: {listed(names)}" for what, names in problems.items() if names]
    if found:
        cut_off = missing and matched and len(found) == 1
        whole = ", and that the file is whole" if cut_off else ""
        raise ValueError(
            f"The weights in {where} are not those of this model. {'; '.join(found)}. "
            "Check that config.json (or the preset, and any argument that overrides "
            f"it) belongs to the weights{whole}."
        )
    return matched


def listed(names):
    """Names in a row; where there are very many, the first of them."""
    names = list(names)
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")
