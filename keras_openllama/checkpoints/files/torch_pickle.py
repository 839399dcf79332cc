"""Reads the pickle in a PyTorch file without unpickling it.

A pickle is a program for a small stack machine, and `pickle.Unpickler` calls whatever
functions the program names. The interpreter in this module implements only the
instructions that `torch.save` writes for a dict of tensors. It imports nothing and
calls nothing: names stay strings, and a call of `torch._utils._rebuild_tensor_v2`
results in a description of a tensor. It rejects every other program.

Source: the Python documentation of `pickletools`, and `torch/serialization.py` and
`torch/_utils.py` of PyTorch.
"""

import dataclasses
import pickletools
from typing import Any

# torch's storage classes and the dtype of their elements.
STORAGE_DTYPES = {
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.BoolStorage": "bool",
}
_CALLABLE = {
    "collections.OrderedDict",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
}
_KNOWN_NAMES = _CALLABLE | set(STORAGE_DTYPES)


class UnsafePickleError(ValueError):
    """The pickle uses something that a file of tensors does not need."""


@dataclasses.dataclass(frozen=True)
class GlobalName:
    """The name of a class or function in the pickle. It is never imported.

    Attributes:
        name: Its qualified name, such as `"torch._utils._rebuild_tensor_v2"`.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class TensorStorage:
    """The buffer of one or more tensors.

    Attributes:
        key: Name of the entry of the zip file that holds the elements.
        dtype: Name of their dtype.
        count: Number of elements.
    """

    key: str
    dtype: str
    count: int


@dataclasses.dataclass(frozen=True)
class TensorView:
    """A tensor, as a view of a storage.

    Attributes:
        storage: The storage.
        offset: Index of its first element.
        shape: Its shape.
        strides: Its strides, in elements.
    """

    storage: TensorStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()
_CONSTANTS = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
}


def interpret_pickle(program: bytes) -> Any:
    """Interprets a pickle, without importing or calling anything that it names.

    Args:
        program: The pickle.

    Returns:
        The unpickled object. It consists of dicts, lists, tuples, strings, numbers, and
        a `TensorView` for each tensor.

    Raises:
        UnsafePickleError: If the pickle names anything but tensors and their parts, or
            uses an instruction that files of tensors do not need.
        ValueError: If the pickle is damaged.

    Example:
        >>> import pickle
        >>> interpret_pickle(pickle.dumps({"step": 3}))
        {'step': 3}
        >>> interpret_pickle(pickle.dumps(print))
        Traceback (most recent call last):
        keras_openllama...UnsafePickleError: `builtins.print`
    """
    machine = _StackMachine()
    for opcode, argument, position in pickletools.genops(program):
        name = opcode.name
        if name in _CONSTANTS:
            machine.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            machine.stack.append(argument)
        elif handler := getattr(machine, f"on_{name.lower()}", None):
            handler(argument)
        elif name == "STOP":
            return machine.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UnsafePickleError(f"the instruction {name} at byte {position}")
    raise ValueError("the pickle is not terminated")


class _StackMachine:
    """The stack, the memo, and one method for each instruction that uses them."""

    def __init__(self):
        self.stack = []
        self.memo = {}

    def pop(self, kind=object):
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the stack is empty")
        value = self.stack.pop()
        if not isinstance(value, kind):
            raise ValueError(f"an operand has the wrong type, {type(value).__name__}")
        return value

    def pop_to_mark(self):
        values = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise ValueError("the stack has no mark")

    def top(self, kind):
        self.stack.append(self.pop(kind))
        return self.stack[-1]

    # The memo.

    def on_binput(self, index):
        self.memo[index] = self.top(object)

    on_long_binput = on_binput

    def on_memoize(self, _):
        self.memo[len(self.memo)] = self.top(object)

    def on_binget(self, index):
        if index not in self.memo:
            raise ValueError(f"the memo has no entry {index}")
        self.stack.append(self.memo[index])

    on_long_binget = on_binget

    # Containers.

    def on_tuple(self, _):
        self.stack.append(tuple(self.pop_to_mark()))

    def on_tuple1(self, _):
        self.stack.append((self.pop(),))

    def on_tuple2(self, _):
        last = self.pop()
        self.stack.append((self.pop(), last))

    def on_tuple3(self, _):
        last, middle = self.pop(), self.pop()
        self.stack.append((self.pop(), middle, last))

    def on_append(self, _):
        value = self.pop()
        self.top(list).append(value)

    def on_appends(self, _):
        values = self.pop_to_mark()
        self.top(list).extend(values)

    def on_setitem(self, _):
        value, key = self.pop(), self.pop()
        self._set(self.top(dict), key, value)

    def on_setitems(self, _):
        values = self.pop_to_mark()
        target = self.top(dict)
        if len(values) % 2:
            raise ValueError("a dict has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            self._set(target, key, value)

    @staticmethod
    def _set(target, key, value):
        # No other keys are hashed: nested tuples can be built whose hash takes forever.
        if not isinstance(key, (str, int)):
            raise UnsafePickleError(f"a dict key of type {type(key).__name__}")
        target[key] = value

    # Names, calls and persistent ids.

    def on_global(self, module_and_name):
        self._name(module_and_name.replace(" ", ".", 1))

    def on_stack_global(self, _):
        name, module = self.pop(str), self.pop(str)
        self._name(f"{module}.{name}")

    def _name(self, name):
        if name not in _KNOWN_NAMES:
            raise UnsafePickleError(f"`{name}`")
        self.stack.append(GlobalName(name))

    def on_binpersid(self, _):
        kind, storage, key, _device, count = self.pop(tuple)
        dtype = STORAGE_DTYPES.get(getattr(storage, "name", None))
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise ValueError("a persistent id is not that of a storage")
        self.stack.append(TensorStorage(key, dtype, _size(count)))

    def on_reduce(self, _):
        arguments, function = self.pop(tuple), self.pop(GlobalName)
        if function.name == "collections.OrderedDict":
            value = dict(arguments[0]) if arguments and arguments[0] else {}
        elif function.name == "torch._utils._rebuild_parameter":
            value = arguments[0]
            if not isinstance(value, TensorView):
                raise ValueError("a parameter is not a tensor")
        elif function.name in _CALLABLE:
            value = _tensor_view(*arguments[:4])
        else:
            raise UnsafePickleError(f"a call of `{function.name}`")
        self.stack.append(value)

    def on_build(self, _):
        # `state_dict()` returns an OrderedDict with an attribute `_metadata`, the
        # versions of modules, which is ignored. No other object has attributes.
        self.pop(dict)
        self.top(dict)


def _tensor_view(storage, offset, shape, strides):
    if not isinstance(storage, TensorStorage):
        raise ValueError("a tensor has no storage")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor has shape {shape} and strides {strides}")
    shape = tuple(_size(size) for size in shape)
    strides = tuple(_size(stride) for stride in strides)
    return TensorView(storage, _size(offset), shape, strides)


def _size(value):
    if not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"a size, stride or offset is {value!r}")
    return value
