"""`load` opens a packed checkpoint, chooses a backend and returns an Engine."""

import contextlib
import ctypes
import errno
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bitnet_numba.backends.protocol import Backend
from bitnet_numba.checkpoint.packed import PackedCheckpoint, open_packed, read_packed
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import as_integer, read_folder
from bitnet_numba.errors import BackendError, CheckpointError, RequestError, one_line, printable, shown
from bitnet_numba.hub.fetch import find_model
from bitnet_numba.kernels.runtime import disk_cache
from bitnet_numba.model_folder import ModelFolder
from bitnet_numba.sampling import read_sampling
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer

BACKENDS = ("auto", "cuda", "cpu", "reference")
# What keys and values may be held as, by backend; the first is the default (on the CPU, float32 of embedding models).
KV_DTYPES = {
    "cuda": ("float16", "bfloat16", "float8", "float32"),
    "cpu": ("bfloat16", "float32"),
    "reference": ("float32",),
}
ALL_KV_DTYPES = tuple(dict.fromkeys(dtype for dtypes in KV_DTYPES.values() for dtype in dtypes))
# Inputs of linears with group scales, and their number of int8 planes; the first is the default.
ACTIVATIONS = {"int8": 1, "int8x2": 2}
MAX_THREADS = 1024
DEMO = Path(__file__).parent.parent / "demo"  # the built-in model

_log = logging.getLogger("bitnet_numba")


def load(
    path: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    context: int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    kv_dtype: str | None = None,
    activations: str | None = None,
) -> Engine:
    """Opens a model.

    path: a folder that `bitnet-numba convert` wrote; or the name of a model of the Hugging Face hub ("owner/name", or a
        short name such as "2b4t"), which is downloaded and converted when it is first used, and kept; or a GGUF file,
        here or on the hub (owner/name/FILE.gguf); None opens the built-in model. What is here comes first.
    backend: "cuda", "cpu", "reference" (plain NumPy, slow) or "auto": CUDA if it is usable, otherwise the CPU.
    context: maximum number of tokens, prompt and answer together; None: the model's own maximum.
    threads: of the CPU backend, one for each physical core that this process may use if None; and of the matrix
        products of the reference, of which BLAS decides if None, within the CPU time that a container has.
    revision: branch, tag or commit of a model of the hub; None: its main branch.
    kv_dtype: what keys and values are held as: on CUDA "float16" (the default; a number beyond 65504 ends an answer
        with an error), "bfloat16" (any number, with 8 bits instead of 11), "float8" (4 bits and a scale: half the
        memory) or "float32" (slow, for checking); on the CPU "bfloat16" (the
        default) or "float32"; on the reference "float32". None: the backend's default. An embedding model has float32
        by default; on CUDA it holds none, and None is all that it takes.
    activations: of models with group scales, what their linears read: "int8" (the default), or "int8x2", two planes
        that make 15 bits: as accurate as floats, but slower. Models that were trained with int8 take "int8" only.

    Raises BitNetError, with a message of one line, if the folder, a file or an argument is invalid.
    """
    if not isinstance(backend, str):
        raise RequestError(f"backend must be one of {', '.join(BACKENDS)}, not {shown(backend)}")
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {shown(backend)}: choose one of {', '.join(BACKENDS)}")
    if kv_dtype is not None and (not isinstance(kv_dtype, str) or kv_dtype not in ALL_KV_DTYPES):
        raise RequestError(f"kv_dtype must be one of {', '.join(ALL_KV_DTYPES)}, not {shown(kv_dtype)}")
    if activations is not None and (not isinstance(activations, str) or activations not in ACTIVATIONS):
        raise RequestError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {shown(activations)}")
    if path is None and not DEMO.is_dir():
        raise CheckpointError("this version has no built-in model: name a folder, or a model of the Hugging Face hub")
    if path is None and revision is not None:
        raise RequestError("the built-in model has no revisions")
    folder = DEMO
    if path is not None:
        given = read_folder(path)
        folder = find_model(path if isinstance(path, str) else given, revision)

    def read(opened: ModelFolder) -> tuple[PackedCheckpoint, Tokenizer, SamplingParams | None]:
        checkpoint = open_packed(opened)
        vocab_size, passed = checkpoint.config.vocab_size, disk_cache.folder() / "tokenizers"
        return checkpoint, Tokenizer.open(opened, vocab_size, folder != DEMO, passed), read_sampling(opened)

    with _load_errors(folder):
        checkpoint, tokenizer, sampling = read_packed(folder, read)
        if ACTIVATIONS[activations or "int8"] > 1:
            checkpoint = _with_two_planes(checkpoint)
        config = checkpoint.config
        if context is None:
            context = config.max_context
        else:
            tokens = as_integer(context)
            if tokens is None or not 1 <= tokens <= config.max_context:
                raise RequestError(
                    f"context must be between 1 and the model's {config.max_context}, not {shown(context)}"
                )
            context = tokens
        if threads is not None:
            if backend == "cuda":
                raise RequestError("threads are an option of the backends cpu and reference, not of cuda")
            number = as_integer(threads)
            if number is None or not 1 <= number <= MAX_THREADS:
                raise RequestError(f"threads must be between 1 and {MAX_THREADS}, not {shown(threads)}")
            threads = number
        return Engine(_open_backend(backend, checkpoint, threads, kv_dtype), tokenizer, config, context, sampling)


@contextlib.contextmanager
def _load_errors(folder: Path) -> Iterator[None]:
    """Turns what the operating system refuses while a model is loaded into one BitNetError."""
    name = printable(str(folder))
    try:
        yield
    except (MemoryError, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            size = (folder / "model.safetensors").stat().st_size / 1e9
            raise BackendError(f"memory ran out while {name} was loaded, whose weights take {size:.2f} GB") from None
        raise CheckpointError(f"{name} cannot be opened: {one_line(error)}") from None


def _with_two_planes(checkpoint: PackedCheckpoint) -> PackedCheckpoint:
    """Raises RequestError if the model has no group scales."""
    if not checkpoint.config.group_scales:
        raise RequestError("activations int8x2 are for models with group scales; this one was trained with int8")
    return replace(checkpoint, config=replace(checkpoint.config, activation_planes=2))


def _check_kv_dtype(backend: str, kv_dtype: str | None) -> None:
    """Raises RequestError unless a backend holds keys and values as this."""
    dtypes = KV_DTYPES[backend]
    if kv_dtype is not None and kv_dtype not in dtypes:
        raise RequestError(f"the backend {backend} holds keys and values as {' or '.join(dtypes)}, not as {kv_dtype}")


def _open_backend(name: str, checkpoint: PackedCheckpoint, threads: int | None, kv_dtype: str | None) -> Backend:
    if name != "auto":
        _check_kv_dtype(name, kv_dtype)
    if name == "reference":
        from bitnet_numba.backends.reference import reference_backend

        return reference_backend(checkpoint, threads)
    if name == "cuda" or (name == "auto" and _has_nvidia_driver()):
        try:
            with _numba_errors("CUDA cannot be used"):
                return _open_cuda(checkpoint, kv_dtype)
        except BackendError as error:
            if name == "cuda":
                raise
            _log.warning("%s; running on the CPU instead", error)
    _check_kv_dtype("cpu", kv_dtype)
    with _numba_errors("the CPU backend cannot start"):
        from bitnet_numba.backends.cpu.backend import cpu_backend

        return cpu_backend(checkpoint, threads, kv_dtype)  # type: ignore[arg-type]  # which has been checked


@contextlib.contextmanager
def _numba_errors(what: str) -> Iterator[None]:
    """Turns what Numba raises where it cannot be imported, or where memory is too short for it, into a BackendError."""
    try:
        yield
    except ImportError as error:  # a package is missing, or two versions do not go together
        raise BackendError(f"{what}: {one_line(error)}") from error
    except (OSError, SystemError) as error:
        if getattr(error, "errno", None) is not None:  # of a file, and not of a shared library
            raise
        # llvmlite has a long text of its own for what the dynamic linker says.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise BackendError(f"{what}: {one_line(reason)}; memory may be too short") from error


def _has_nvidia_driver() -> bool:
    """Whether there is an NVIDIA driver or device. False means a CPU-only machine, not a broken install."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/nvidiactl")
    return True


def _open_cuda(checkpoint: PackedCheckpoint, kv_dtype: str | None) -> Backend:
    """The CUDA backend. Raises BackendError if there is no usable device, or too little memory on it."""
    if importlib.util.find_spec("numba_cuda") is None:
        # Numba has a numba.cuda of its own, but the kernels need numba-cuda's.
        raise BackendError("CUDA cannot be used: its packages are not installed (install the extra cuda13 or cuda12)")
    from bitnet_numba.backends.cuda.backend import CudaBackend, why_unusable
    from bitnet_numba.backends.cuda.embedder import CudaEmbedder

    reason = why_unusable()
    if reason is not None:
        raise BackendError(f"CUDA cannot be used: {reason}")
    _check_kv_dtype("cuda", kv_dtype)
    if checkpoint.config.embeds:
        if kv_dtype is not None:
            raise RequestError("on CUDA an embedding model holds no keys and values: leave out kv_dtype")
        return CudaEmbedder(checkpoint)
    return CudaBackend(checkpoint, kv_dtype or KV_DTYPES["cuda"][0])  # type: ignore[arg-type]
