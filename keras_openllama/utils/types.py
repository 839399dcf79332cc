"""Names for type annotations."""

import os
from typing import Any, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]
# A dense array or tensor of whichever backend Keras runs on. There is no common base
# class, and naming one backend's class would import that backend.
Tensor: TypeAlias = Any
