"""What a pickle of PyTorch says that it holds, told from its opcodes alone: nothing is imported, called or allocated.

PyTorch's own reader of weights (``torch.load(weights_only=True)``) runs no code of a file, but takes its word for much: it
makes a ``bytearray`` of any length, lets a tensor repeat one number without end, hashes any key, and where an old file lists no
values for a tensor leaves there what the memory held. So what a file says is worked out first, as plain Python data of no more
items than it has opcodes, and only what plain tensors, numbers, text, and containers of them need is let through.
"""

from pickletools import genops
from typing import Any, BinaryIO, NamedTuple

from timm_jem.errors import InputError, one_line, quoted

__all__ = ["ClaimedStorage", "ClaimedTensor", "read_claims"]

_MOST_OPCODES = 1_000_000  # a checkpoint of WRN-28-10 with its optimiser has 20,000
_MOST_DIMENSIONS = 8
_ITEM_BYTES = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2},
    **{"LongStorage": 8, "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1},
}
_STORAGES = {f"torch {name}": bytes_ for name, bytes_ in _ITEM_BYTES.items()}
_MAPPING, _TENSOR, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_REMEDY = (
    "if you trust its author, load it yourself and save weights and chains alone: torch.save({'model_state_dict': ..., "
    "'replay_buffer': ...}, FILE)"
)


class _Name(NamedTuple):
    """Something importable, which is not imported."""

    text: str


class ClaimedStorage(NamedTuple):
    """Memory that tensors are views of: its name in the file, bytes an item, items."""

    key: str
    item_bytes: int
    items: int


class ClaimedTensor(NamedTuple):
    """A dense tensor within its storage."""

    storage: ClaimedStorage
    shape: tuple[int, ...]


def read_claims(stream: BinaryIO) -> tuple[Any, list[ClaimedStorage]]:
    """The object that one pickle describes, with a :class:`ClaimedTensor` for each tensor, and the storages it names.

    Args:
        stream: at the pickle's begin; afterwards at its end.

    Raises:
        InputError: a pickle that is broken, or that holds more than plain tensors, numbers, text, and containers of them.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(genops(stream)):
            if number == _MOST_OPCODES:
                raise InputError(f"its pickle has more than {_MOST_OPCODES:,} opcodes: that is no checkpoint's")
            machine.step(opcode.name, argument)
        return machine.stack.pop(), list(machine.storages.values())
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise InputError(f"it is broken or cut off ({one_line(error)}): get it again") from error


class _Machine:
    """Pickle's stack machine over descriptions of objects. What a broken pickle makes it raise, its caller catches."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, ClaimedStorage] = {}

    def step(self, opcode: str, argument: Any) -> None:
        stack = self.stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _CONTAINERS:
            stack.append(_CONTAINERS[opcode]())
        elif opcode in _SHORT_TUPLES:
            n = _SHORT_TUPLES[opcode]
            stack[-n:] = [tuple(stack[-n:])]
        elif opcode == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif opcode == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        elif opcode in ("APPEND", "APPENDS"):
            items = self._since_mark() if opcode == "APPENDS" else [stack.pop()]
            _only(list, self.stack[-1]).extend(items)
        elif opcode in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if opcode == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            target = _only(dict, self.stack[-1])
            for key, value in zip(items[::2], items[1::2], strict=True):
                if not isinstance(key, (str, int)):
                    raise InputError(f"a key in it is a {type(key).__name__}: checkpoints name things by text or numbers")
                target[key] = value
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode == "GLOBAL":
            if argument not in (_MAPPING, _TENSOR, _PARAMETER, *_STORAGES):
                raise InputError(f"it holds a {quoted(argument.replace(' ', '.'))}, which is not read; {_REMEDY}")
            stack.append(_Name(argument))
        elif opcode == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif opcode == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif opcode == "BUILD":
            attributes = stack.pop()
            if not isinstance(stack[-1], dict) or not isinstance(attributes, dict) or attributes.keys() - {"_metadata"}:
                raise InputError(f"it holds objects with attributes of their own, which are not read; {_REMEDY}")
        elif opcode not in ("PROTO", "STOP"):
            raise InputError(f"its pickle has the opcode {opcode}, which PyTorch writes into no checkpoint: {_REMEDY}")

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _storage(self, claim: Any) -> ClaimedStorage:
        kind, name, key, _, items, *view = _only(tuple, claim)
        if kind != "storage" or not isinstance(name, _Name) or name.text not in _STORAGES or any(view):
            raise InputError("it holds tensors of another kind than numbers, or of a PyTorch before 0.4, which are not read")
        storage = ClaimedStorage(_only(str, key), _STORAGES[name.text], _count(items))
        if self.storages.setdefault(key, storage) != storage:
            raise InputError(f"it says different things of the same memory {quoted(key)}: it is broken")
        return storage


def _made(function: Any, arguments: Any) -> Any:
    """What a call would return; only the three calls that plain tensors and their mappings need are known."""
    if function == _Name(_MAPPING):
        if arguments != ():
            raise InputError(f"it holds mappings as Python 2 wrote them, which are not read; {_REMEDY}")
        return {}
    if function == _Name(_PARAMETER):
        tensor, *_ = _only(tuple, arguments)
        return _only(ClaimedTensor, tensor)
    if function != _Name(_TENSOR):
        raise InputError(f"it calls a {type(function).__name__}: it is broken")
    storage, offset, shape, strides, _, _, *extras = _only(tuple, arguments)
    _only(ClaimedStorage, storage)
    shape, strides = (tuple(map(_count, _only(tuple, sizes))) for sizes in (shape, strides))
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS or any(extras):
        raise InputError(f"it holds a tensor of shape {quoted(shape)} and strides {quoted(strides)}: it is broken")
    items, last = 1, _count(offset)
    for side, stride in zip(shape, strides, strict=True):
        items, last = items * side, last + max(side - 1, 0) * stride
    if items and (items > storage.items or last >= storage.items):
        raise InputError(
            f"it holds a tensor of shape {quoted(shape)} in memory of {storage.items:,} numbers: save it contiguous"
        )
    return ClaimedTensor(storage, shape)


def _only(kind: type, value: Any) -> Any:
    """``value``, of exactly this type: a named tuple is none of the file's own tuples."""
    if type(value) is not kind:
        raise InputError(f"it has a {type(value).__name__} where a checkpoint has a {kind.__name__}: it is broken")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:  # a tuple of tuples of tuples may be endless to write
        raise InputError(
            f"it has {quoted(value) if type(value) is int else f'a {type(value).__name__}'} for a size: it is broken"
        )
    return value
