"""Stock llama.cpp as an oracle, called through ctypes in its own process: a crash of native code is then an answer.

The library is that of the `xllamacpp` wheel, or else of llama-cpp-python, which declares llama.cpp's structs itself.
Run as a module, this file is the child: `python -m quantkit.evaluation.oracles.llama REQUEST.json`, the request as
described at `_serve`.

llama.cpp's parameter structs change between builds. For xllamacpp only their beginnings are declared here, and the
defaults that the library fills in are compared with the known ones first: another layout is an error, not a wrong
answer.
"""

import ctypes
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.evaluation.oracles.child import UNAVAILABLE, NotRun, OracleError, run_module

WHEEL = "xllamacpp==2026.10.11549"
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
TIMEOUT = 3600  # R1 from a slow disk


def available() -> bool:
    """Whether a package with the library is installed."""
    return any(map(importlib.util.find_spec, ("xllamacpp", "llama_cpp")))


def version() -> str:
    """The package that answers, and its version."""
    name = "xllamacpp" if importlib.util.find_spec("xllamacpp") else "llama-cpp-python"
    return f"{name} {importlib.metadata.version(name)}"


def system_info() -> str:
    """What its kernels were compiled for: `CPU : SSE3 = 1 | AVX2 = 1 | ...`."""
    return _ask({})["system_info"]


def logits(
    model: Path,
    tokens: np.ndarray,
    *,
    step: int | None = None,
    cache: str = "f16",
    flash_attention: int = -1,
    n_threads: int = 1,
    yarn_betas: tuple[float, float] | None = None,
    hidden: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [n_chunk, t, n_vocab] for tokens int [n_chunk, t]: every chunk is a fresh sequence from position 0.

    step: tokens per llama_decode call (default: the whole chunk); 1 is token by token. cache: type of K and V.
    flash_attention: -1 as llama.cpp chooses (its default), 0 off, 1 on. yarn_betas: its --yarn-beta-fast and -slow.
    hidden: float32 [n_chunk, t, d], what the head saw of the tokens before; then the answer is the MTP layer's.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "tokens.npy", Path(folder) / "logits.npy"
        np.save(given, np.ascontiguousarray(tokens, dtype=np.int32))
        if hidden is not None:
            np.save(Path(folder) / "hidden.npy", np.ascontiguousarray(hidden, dtype=np.float32))
        _ask(
            {
                "model": str(model),
                "tokens": str(given),
                "logits": str(answer),
                "step": step or tokens.shape[1],
                "cache": CACHE_TYPES[cache],
                "flash_attention": flash_attention,
                "n_threads": n_threads,
                "yarn_betas": yarn_betas,
                "hidden": None if hidden is None else str(Path(folder) / "hidden.npy"),
            }
        )
        return np.load(answer)


def tokenize(model: Path, texts: Sequence[str], *, bos: bool = False, special: bool = True) -> list[list[int]]:
    """Token ids of each text. special: markers like <｜User｜> in the text become their tokens."""
    return _ask({"model": str(model), "texts": list(texts), "bos": bos, "special": special})["ids"]


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        path.write_text(json.dumps(request | {"answer": str(answer)}), encoding="utf-8")
        run_module(__name__, str(path), "llama.cpp", TIMEOUT)
        return json.loads(answer.read_text(encoding="utf-8"))


# The child.


class _ModelParams(ctypes.Structure):
    """struct llama_model_params; booleans at its end are in the tail's place in newer builds."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        ("tail", ctypes.c_ubyte * 170),
    )


class _ContextParams(ctypes.Structure):
    """struct llama_context_params up to the cache types."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int),
        ("rope_scaling_type", c_int),
        ("pooling_type", c_int),
        ("attention_type", c_int),
        ("flash_attn_type", c_int),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("tail", ctypes.c_ubyte * 400),
    )


class _Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_MODEL_DEFAULTS = {
    "devices": None,
    "tensor_buft_overrides": None,
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "tensor_split": None,
    "progress_callback": None,
    "kv_overrides": None,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
_MTP = 1  # LLAMA_CONTEXT_TYPE_MTP
_CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "type_k": 1,
    "type_v": 1,
}

_SIGNATURES = {
    "llama_backend_init": (None, []),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_params": (ctypes.c_uint64, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
}


def _library() -> Any:
    """llama.cpp's C functions as attributes."""
    spec = importlib.util.find_spec("xllamacpp")
    if not spec and importlib.util.find_spec("llama_cpp"):
        from llama_cpp import llama_cpp

        llama_cpp.llama_backend_init()
        return llama_cpp
    places = (spec.submodule_search_locations if spec else None) or []
    found = sorted(file for place in places for file in Path(place).glob("*.so"))
    if not found:
        raise NotRun(f"pip install {WHEEL}")
    lib = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise NotRun(f"{found[0].name} has no {name}; pip install {WHEEL}") from None
        function.restype, function.argtypes = result, arguments
    for make, known in (
        ("llama_model_default_params", _MODEL_DEFAULTS),
        ("llama_context_default_params", _CONTEXT_DEFAULTS),
    ):
        params = getattr(lib, make)()
        strange = {k: getattr(params, k) for k, value in known.items() if getattr(params, k) != value}
        if strange:
            raise NotRun(f"{make} gives {strange}: another struct layout than that of {WHEEL}; install that")
    lib.llama_backend_init()
    return lib


def _load(lib: Any, path: str, vocab_only: bool, mtp: bool = False) -> int:
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocab_only
    if mtp:
        params.load_mtp = True
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise OracleError(f"llama.cpp does not load {path}")
    return model


def _decode(lib: Any, context: int, batch: _Batch, tokens: np.ndarray, first: int, out: np.ndarray) -> None:
    """Decode tokens at positions first, first + 1, ... of sequence 0; their logits go to out [n, n_vocab]."""
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), first + i, 1, 1
        batch.seq_id[i][0] = 0
    status = lib.llama_decode(context, batch)
    if status:
        raise OracleError(f"llama_decode returned {status} at position {first}")
    for i in range(len(tokens)):
        row = lib.llama_get_logits_ith(context, i)
        if not row:
            raise OracleError(f"no logits for position {first + i}")
        out[i] = np.ctypeslib.as_array(row, (out.shape[1],))


def _logits(lib: Any, request: dict[str, Any]) -> dict[str, Any]:
    tokens = np.load(request["tokens"])
    hidden = np.load(request["hidden"]) if request["hidden"] else None
    model = _load(lib, request["model"], vocab_only=False, mtp=hidden is not None)
    params = lib.llama_context_default_params()
    params.ctx_type = 0 if hidden is None else _MTP
    params.n_ctx = params.n_batch = max(256, tokens.shape[1])
    params.n_threads = params.n_threads_batch = request["n_threads"]
    params.flash_attn_type = request["flash_attention"]
    params.type_k = params.type_v = request["cache"]
    if request["yarn_betas"]:
        params.yarn_beta_fast, params.yarn_beta_slow = request["yarn_betas"]
    context = lib.llama_init_from_model(model, params)
    if not context or lib.llama_n_ctx(context) < tokens.shape[1] or lib.llama_n_batch(context) < request["step"]:
        raise OracleError(f"llama.cpp made no context of {tokens.shape[1]} tokens")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(request["step"], 0, 1)
    out = np.empty((*tokens.shape, n_vocab), np.float32)
    for i, (chunk, rows) in enumerate(zip(tokens, out, strict=True)):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for first in range(0, len(chunk), request["step"]):
            end = first + request["step"]
            if hidden is not None:
                batch.embd = hidden[i, first:end].ctypes.data  # in memory as one piece
            _decode(lib, context, batch, chunk[first:end], first, rows[first:end])
    np.save(request["logits"], out)
    return {"n_params": lib.llama_model_n_params(model)}


def _tokenize(lib: Any, request: dict[str, Any]) -> dict[str, Any]:
    vocab = lib.llama_model_get_vocab(_load(lib, request["model"], vocab_only=True))
    ids = []
    for text in request["texts"]:
        raw = text.encode()
        room = (c_int32 * (len(raw) + 2))()
        n = lib.llama_tokenize(vocab, raw, len(raw), room, len(room), request["bos"], request["special"])
        if n < 0:
            raise OracleError(f"llama_tokenize needs {-n} ids for {len(raw)} bytes")
        ids.append(list(room[:n]))
    return {"ids": ids}


def _serve(path: Path) -> None:
    """Request: model, answer (a path), and either tokens and logits (paths) with options, or texts; without a
    model it is asked about itself."""
    request = json.loads(path.read_text(encoding="utf-8"))
    lib = _library()
    if "model" not in request:
        answer = {"system_info": lib.llama_print_system_info().decode()}
    else:
        answer = _tokenize(lib, request) if "texts" in request else _logits(lib, request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]))
    except NotRun as problem:
        print(problem, file=sys.stderr)
        sys.exit(UNAVAILABLE)
    except OracleError as problem:
        sys.exit(f"oracle: {problem}")
