"""PyTorch pickles and safetensors that anyone may have made: tensors come out of them, and nothing else happens.

``torch.load(weights_only=True)`` runs no code, but it still builds what a pickle asks for: gigabytes of bytes, tensors
of elements that do not exist, compressed archives a thousand times their size. So a pickle is looked through first,
without building anything, for what it names; an archive's members are added up; and a tensor must have as many
elements in the file as it says.
"""

from __future__ import annotations

import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.files.text import FileError, check_file
from harness.files.writing import replacing

SAID = 300
"""Characters of an error that are passed on: it may quote the file."""
WHAT = "a .safetensors or .pt file"
MAX_HEADER_BYTES = 16 * 2**20
"""Of safetensors: a hundred thousand tensors stay below it."""
MAX_PICKLE_BYTES = 64 * 2**20
"""The pickle of an archive names tensors and holds none."""
_PICKLES = 5
"""A file of torch before 1.6 is this many pickles (magic, protocol, machine, content, keys), and then raw storages."""

_BUILDERS = {
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state"},
    "collections": {"OrderedDict"},
    "torch.serialization": {"_get_layout"},
    "torch.nn.parameter": {"Parameter"},
    "_codecs": {"encode"},
    "builtins": {"set"},
}
"""What a pickle of plain tensors names, by module; beside element types and storages of them."""


MAX_NAME = 500
"""Characters of a tensor's name."""


def check_header(path: Path) -> None:
    """Raise :class:`FileError` if a safetensors file claims a header that no checkpoint needs, or names a tensor twice.

    Of two tensors of one name the library takes the last one and says nothing. What else is wrong, it says itself.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise FileError(f"{path}: not a readable safetensors file: {name!r:.60} is given twice")
            found[name] = value
        return found

    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size) if size <= MAX_HEADER_BYTES else b""
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error}") from error
    if size > MAX_HEADER_BYTES:
        raise FileError(f"{path}: not a readable safetensors file: its header claims {size} bytes")
    try:
        json.loads(header, object_pairs_hook=once)
    except FileError:
        raise
    except (ValueError, RecursionError):
        return


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises :class:`FileError`."""
    check_file(path, WHAT)
    check_header(path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError, KeyError, MemoryError) as error:
        raise FileError(f"{path}: not a readable safetensors file: {first_line(error)}") from error
    for name, tensor in state.items():
        check_tensor(path, name, tensor)
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, all of it or nothing. Raises ``OSError`` as :func:`replacing`."""
    with replacing(path) as part:
        try:
            save_file(dict(tensors), part, dict(metadata))
        except SafetensorError as error:  # which is how it tells of a disk that is full
            raise OSError(None, str(error)) from error


def read_pickle(path: Path) -> Any:
    """What a PyTorch file holds: plain dense tensors in dicts and lists, with numbers and texts beside them.

    An archive (torch 1.6 and newer) is mapped, not read: its tensors' values come from the disk when they are used.

    Raises:
        FileError: if it is no such file, names anything that tensors do not need, is compressed, or holds a tensor
            that is sparse, quantised or nested, or has more elements than are in the file.
    """
    check_file(path, WHAT)
    try:
        archive = _is_archive(path)
        _check_archive(path) if archive else _check_stream(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        raise _refused(path, "it holds other objects than tensors") from error
    except RecursionError as error:
        raise FileError(f"{path}: nested too deeply for a checkpoint") from error
    except _UNREADABLE as error:
        raise FileError(f"{path}: not a readable PyTorch file, is it cut off? ({first_line(error)})") from error
    for name, tensor in _tensors(path, content):
        check_tensor(path, name, tensor)
    return content


_UNREADABLE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(MemoryError, OverflowError, NotImplementedError, zipfile.BadZipFile),
)
"""What torch and zipfile raise for files that are damaged, or made to damage."""


def _refused(path: Path, why: str) -> FileError:
    return FileError(
        f"{path}: refused: it is not a plain file of tensors, and loading it could run code ({why}). "
        "Save a state dict of tensors with torch.save, or convert it to .safetensors"
    )


def first_line(error: BaseException) -> str:
    """An error's own first line, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:SAID]


def _is_archive(path: Path) -> bool:
    """Whether torch will take the file for a zip archive: by its first bytes, as torch decides."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        size = path.stat().st_size
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise FileError(f"{path}: {packed[0]!r:.80} is compressed, as torch.save never does; save the file again")
        if (total := sum(member.file_size for member in members)) > size:
            raise FileError(f"{path}: its members claim {total} bytes in a file of {size}")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise FileError(f"{path}: not a readable PyTorch file: it has {len(pickles)} data.pkl, or too large a one")
        with archive.open(pickles[0]) as file:
            _check_names(path, file.read())  # type: ignore[arg-type]  # pickletools reads bytes too


def _check_stream(path: Path) -> None:
    with path.open("rb") as file:
        try:
            for _ in range(_PICKLES):
                _check_names(path, file)
        except FileError:
            raise
        except ValueError:
            return  # it ends within a pickle, or holds other things: torch says so, and builds no more than it names


def _check_names(path: Path, source: BinaryIO) -> None:
    """Refuse a pickle that names anything that plain tensors do not need; nothing is built or imported.

    Names that are put together on the stack (protocol 4) are left to torch, which knows no such instruction.
    """
    for opcode, argument, _ in pickletools.genops(source):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            if not _is_plain(module, name):
                raise _refused(path, f"it asks for {module}.{name}"[:200])
        elif opcode.name.startswith("EXT"):
            raise _refused(path, "it asks for a registered extension")


def _is_plain(module: str, name: str) -> bool:
    if name in _BUILDERS.get(module, ()):
        return True
    if module == "torch" and "." not in name:
        # Element types (torch.float32), and storages by them (torch.FloatStorage); torch.Size is a tuple.
        known = getattr(torch, name, None)
        return isinstance(known, torch.dtype) or name.endswith("Storage") or name in ("Size", "device")
    return module == "torch.storage" and name in ("UntypedStorage", "TypedStorage")


def _tensors(path: Path, content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif depth > 16:
        raise FileError(f"{path}: {name[:80]}: nested too deeply for a checkpoint")
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(path, value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(path, value, f"{name}[{number}]", depth + 1)


def check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raise :class:`FileError` if ``tensor`` is not dense, on the CPU, with every element of it in the file.

    Or if its name is none to be shown: messages list names, and a terminal would do what is in them.
    """
    if len(name) > MAX_NAME or not name.isprintable():
        raise FileError(f"{path}: {name!r:.80} is no name of a tensor: at most {MAX_NAME} printable characters")
    kind = None
    if type(tensor) not in (Tensor, nn.Parameter):
        kind = f"a {type(tensor).__name__}"
    elif tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
    elif tensor.is_quantized:
        kind = f"quantised ({tensor.dtype})"
    elif tensor.device.type != "cpu":
        kind = f"on {tensor.device}"
    if kind is not None:
        raise FileError(f"{path}: {name[:120]} is {kind}; a checkpoint holds plain dense tensors")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileError(
            f"{path}: {name[:120]} says {tensor.numel()} elements of {tensor.dtype}, but the file holds "
            f"{tensor.untyped_storage().nbytes()} bytes of it"
        )
