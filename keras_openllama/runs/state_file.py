"""Variables in a file of NumPy's, from which training goes on to the same bits."""

import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.utils import files

_PLACE = "place"


def save(path, variables, place):
    """Writes variables; the file takes its place when it is whole.

    Args:
        path: string.
        variables: dict of `keras.Variable` by name; NumPy knows their dtypes.
        place: tuple of ints, how far training is.

    Raises:
        OSError: if it cannot be written.
    """
    arrays = {name: as_numpy(variable.value) for name, variable in variables.items()}
    with files.appearing(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **{_PLACE: np.array(place, "int64")}, **arrays)


def restore(path, variables):
    """Gives variables the values of a file.

    Args:
        path, variables: as for `save`.

    Returns:
        Tuple of ints, the place that was saved.

    Raises:
        ValueError: if the file is damaged, or has other variables.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        place = tuple(int(number) for number in arrays.pop(_PLACE))
    except Exception as error:  # NumPy and zipfile raise several kinds.
        raise ValueError(
            f"{path} is damaged: {error}. Remove it to begin anew."
        ) from error
    if variables.keys() != arrays.keys():
        raise ValueError(f"{path} is of another model. Name another directory.")
    for name, variable in variables.items():
        variable.assign(arrays[name])
    return place
