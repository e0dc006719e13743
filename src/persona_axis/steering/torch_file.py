"""PyTorch files of other people: read as plain data, never as code, and checked value by value.

Contract:

1. A file is loaded as tensors, numbers, strings and containers only. One that needs more is refused, and nothing in it
   runs.
2. A damaged file, a missing key or a number that is not finite is a StorageError that names the file.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_axis.errors import StorageError
from persona_axis.files.atomic import storage_errors, write_atomic


def read_torch_file(path: Path) -> Any:
    """The content of a ``.pt`` file: tensors on the CPU, numbers, strings and containers; never code.

    Raises StorageError when it is missing, damaged, or would need code to run.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing.")
    with storage_errors(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of odd pickle protocols, for a damaged file
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        except pickle.UnpicklingError as e:
            raise StorageError(
                f"{path} is refused: it is damaged, or loading it would run code that comes with it ({_reason(e)}). "
                "Nothing of it was run. Save it again with tensors, numbers and strings only."
            ) from e
        except OSError:
            raise
        except Exception as e:  # a damaged file makes torch.load fail in a dozen ways, none of them documented
            raise StorageError(f"{path} is damaged or no PyTorch file ({_reason(e)}). Get it again.") from e


def _reason(e: Exception) -> str:
    """The line of PyTorch's message that tells; never its advice to load the file all the same."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Weights only", "Please file", "Check the doc"))]
    return (telling or [type(e).__name__])[0][:160].rstrip(".")


def write_torch_file(path: Path, content: Any) -> Path:
    """Write tensors, numbers, strings and containers, atomically."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getvalue())
    return path


def finite_tensor(value: Any, what: str, ndim: int) -> Tensor:
    """A finite float32 copy with that many dimensions."""
    if not isinstance(value, Tensor) or value.ndim != ndim or not value.is_floating_point() or not value.numel():
        shape = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise StorageError(f"{what} is {shape}, where {ndim} dimensions of floats were expected.")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise StorageError(f"{what} is a {value.layout} tensor on {value.device}; save it dense and with its values.")
    tensor = value.detach().float().clone()
    if not bool(tensor.isfinite().all()):
        raise StorageError(f"{what} holds NaN or infinity.")
    return tensor


def keys_of(content: Mapping[Any, Any]) -> str:
    """The keys, for a message."""
    return ", ".join(map(str, content)) or "nothing"


def source_of(file: Path) -> dict[str, Any]:
    """Name and digest of a file, for provenance."""
    with storage_errors(file), file.open("rb") as f:
        return {"file": file.name, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
