"""Names for type annotations."""

import os
from typing import Any, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]
# A dense array or tensor of the backend of Keras. The backends have no common base
# class, and naming the class of one would import that backend.
Tensor: TypeAlias = Any
# The shape of a tensor; unknown dimensions are `None`.
Shape: TypeAlias = tuple[int | None, ...]
