"""Damaged and malicious checkpoints, as many as you like: `python tests/fuzz/fuzz.py --count 1000000 --jobs 2`.

Each must give a clear error or, if it still is a checkpoint, a model with exactly the weights that other readers find
in it: no crash, no hang, no memory beyond what the file has, no code run, nothing half written.

A case is a pure function of its seed and number, so a failure can be repeated: `--seed 0 --only 1234`.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fuzz_files import KINDS, MARKER, Base, Case, Files, State, bases, make_case, members, zipped
from tqdm import tqdm

import vit
from vit.weights import CheckpointError
from vit.weights.load import find, load
from vit.weights.verify import convert_file

ROOM = 32 * 2**20  # bytes of address space that reading a file of some 20 KB may take
SECONDS = 10  # for one case
CONVERTED = 50  # every 50th case is also converted,
HASHED = 10  # every 10th is also compared with the sound file's sha256,
BUILT = 5  # and every 5th that loads is also made a model
CHUNK = 100  # cases that a worker gets at once
FAILURES = 10  # that are described


# ---------------------------------------------------------------- what other readers find in a file


def reference(case: Case) -> State:
    """The tensors of a file as readers other than ours find them; bfloat16 as its bits."""
    base, files = case.base, case.files
    if base.kind == "npz":
        with np.load(io.BytesIO(files[base.entry]), allow_pickle=False) as arrays:
            return {name: arrays[name].astype(arrays[name].dtype.newbyteorder("=")) for name in arrays.files}
    if base.kind == "pth":
        return {name: tensor.detach().numpy() for name, tensor in _flat("", _by_torch(files[base.entry]))}
    if base.kind == "onnx":
        return _onnx_state(files[base.entry])
    if base.kind == "sharded":
        where = json.loads(files[base.entry])["weight_map"]
        parts = {name: _safetensors_state(files[name]) for name in set(where.values())}
        assert all(parts[file].keys() == {n for n in where if where[n] == file} for file in parts), "the index lies"
        return {name: parts[file][name] for name, file in where.items()}
    return _safetensors_state(files["model.safetensors"])


class _Nothing:
    """Whatever a pickle makes that is not a tensor."""

    def __new__(cls, *_: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *_: Any) -> None: ...

    @staticmethod  # a damaged file may set the state of the class itself
    def __setstate__(*_: Any) -> None: ...


class _Harmless(pickle._Unpickler):  # Python's, because C's allocates a memo of any size that the file asks for
    """Makes tensors and dictionaries only."""

    def find_class(self, module: str, name: str) -> Any:
        known = {("torch._utils", f"_rebuild_{what}") for what in ("tensor_v2", "tensor_v3", "parameter")}
        is_storage = module == "torch" and name.endswith("Storage")
        is_known = is_storage or (module, name) in known | {("collections", "OrderedDict")}
        return super().find_class(module, name) if is_known else _Nothing


def _by_torch(content: bytes) -> Any:
    """What torch.load finds; if its check of the zip file or of the classes is stricter than ours, without these."""
    if content.startswith(b"PK"):
        # numbers that torch checks and that say nothing of the tensors
        numbers = {"version": b"3\n", ".format_version": b"1", ".storage_alignment": b"64"}
        parts = members(content)
        content = zipped([(name, numbers.get(name.rpartition("/")[2], part)) for name, part in parts.items()])
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except Exception:  # its UnpicklingError, mostly
        load = lambda file, **more: _Harmless(file, **more).load()  # noqa: E731
        harmless = SimpleNamespace(__name__="harmless", Unpickler=_Harmless, load=load)
        return torch.load(io.BytesIO(content), weights_only=False, pickle_module=harmless, map_location="cpu")


def _flat(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}.{key}" if name else str(key), item)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a key is there twice"
    return dict(pairs)


def _safetensors_state(content: bytes) -> State:
    """By the format's definition alone: each byte of the data belongs to one tensor, and no key stands twice."""
    stop = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:stop].decode("utf-8"), object_pairs_hook=_no_duplicates)
    header.pop("__metadata__", None)
    state, end = {}, stop
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, after = (stop + offset for offset in entry["data_offsets"])
        assert start == end and after <= len(content), "a gap, or beyond the end"
        state[name] = np.frombuffer(content[start:after], kinds[entry["dtype"]]).reshape(entry["shape"])
        end = after
    assert end == len(content), "data that belongs to no tensor"
    return state


def _onnx_state(content: bytes) -> State:
    """Constants by name; nameless ones by the bias that is added to their product, or else by their node."""
    import onnx

    graph = onnx.load_model_from_string(content).graph
    arrays = {proto.name: onnx.numpy_helper.to_array(proto) for proto in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and "::" in node.input[1]:
            added = [n for user in graph.node if set(user.input) & set(node.output) for n in user.input if n in arrays]
            scope = node.name.removesuffix("/MatMul")[1:].replace("/", ".")
            weight = arrays[node.input[1]].T
            names = {n.removesuffix("bias") + "weight" for n in added if n.endswith(".bias")}
            fits = len(names) == 1 and arrays[min(names).removesuffix("weight") + "bias"].shape == weight.shape[:1]
            arrays[min(names) if fits else f"{scope}.weight"] = weight
    return {name: array for name, array in arrays.items() if not re.search(r"::|/|^val_\d+$", name)}  # the exporter's


# ---------------------------------------------------------------- their names and ours, independent of the key maps

_TIMM = {"cls_token": "class_token", "pos_embed": "position_embedding", ".attn.": ".attention."}
_TRANSFORMERS = {
    "vit.embeddings.cls_token": "class_token", "vit.embeddings.position_embeddings": "position_embedding",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.encoder.layer.": "blocks.",
    ".attention.attention.query.": ".attention.q.", ".attention.attention.key.": ".attention.k.",
    ".attention.attention.value.": ".attention.v.", ".attention.output.dense.": ".attention.proj.",
    ".intermediate.dense.": ".mlp.fc1.", ".output.dense.": ".mlp.fc2.", ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.", "vit.layernorm.": "norm.", "classifier.": "head.",
}  # fmt: skip
_GOOGLE = {
    "Transformer/posembed_input/pos_embedding": "position_embedding", "pos_embedding": "position_embedding",
    "cls": "class_token", "embedding/": "patch_embed.proj/", "Transformer/encoderblock_": "blocks.",
    "Transformer/encoder_norm/": "norm/", "/LayerNorm_0/": ".norm1/", "/Dense_0/": ".fc1/", "/Dense_1/": ".fc2/",
    "/query/": ".q/", "/key/": ".k/", "/value/": ".v/", "/out/": ".proj/",
}  # fmt: skip
_AUGREG = {"/LayerNorm_2/": ".norm2/", "/MlpBlock_3": ".mlp", "/MultiHeadDotProductAttention_1": ".attention"}
_BIG_VISION = {"/LayerNorm_1/": ".norm2/", "/MlpBlock_0": ".mlp", "/MultiHeadDotProductAttention_0": ".attention"}
_RENAMED = {"vit": {}, "timm": _TIMM, "transformers": _TRANSFORMERS, "augreg": _AUGREG | _GOOGLE,
            "big_vision": _BIG_VISION | _GOOGLE}  # fmt: skip


def in_our_names(base: Base, state: State) -> State:
    """The weights of a file in our names and arrangement."""
    result: State = {}
    for theirs, array in state.items():
        if not theirs.startswith(base.wrapper) or theirs.startswith("vit.pooler."):
            continue
        name = theirs.removeprefix(base.wrapper)
        for old, new in _RENAMED[base.layout].items():
            name = name.replace(old, new)
        if base.kind == "npz":
            name, array = _from_google(name, array)
        assert name not in result, f"{name} is there twice"
        result[name] = array
    fused = {name.replace(".q.", ".qkv."): name for name in result if ".attention.q." in name}
    parts = {whole: [result.pop(q.replace(".q.", f".{part}.")) for part in "qkv"] for whole, q in fused.items()}
    return result | {whole: np.concatenate(three) for whole, three in parts.items()}


def _from_google(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Flax multiplies from the left and keeps the heads apart."""
    module, _, kind = name.partition("/")
    if not kind:
        return name, array
    if kind == "kernel":
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif module.endswith(".proj"):
            array = array.reshape(-1, array.shape[-1]).T
        else:
            array = array.reshape(len(array), -1).T
    elif module.endswith((".q", ".k", ".v")):
        array = array.reshape(-1)
    return f"{module}.{'bias' if kind == 'bias' else 'weight'}", array


def same(tensors: dict[str, torch.Tensor], expected: State) -> str:
    """What differs, to the bit; "" if nothing does."""
    if tensors.keys() != expected.keys():
        return f"the names differ: {sorted(tensors.keys() ^ expected.keys())[:5]}"
    for name, tensor in tensors.items():
        bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        ours, theirs = bits.numpy(), np.ascontiguousarray(expected[name])
        if (ours.dtype, ours.shape) != (theirs.dtype, expected[name].shape) or ours.tobytes() != theirs.tobytes():
            return f"{name} differs from what the file says"
    return ""


# ---------------------------------------------------------------- one case


class Wrong(Exception):
    """An outcome that no file may have."""


class DiskFull(Exception):
    """The file was not written, because the limit on file sizes forbids it."""


class Hangs(BaseException):
    """The case takes too long."""


def run_case(case: Case, number: int, folder: Path) -> str:
    """Load a case, and convert some: "refused" or "loaded". Raises Wrong for anything else or a wrong result."""
    for name, content in case.files.items():
        (folder / name).write_bytes(content)
    source = folder / case.base.entry
    before = _content(folder)
    loaded = _attempt(lambda: load(find(source), overrides=case.base.known), folder, case)
    if loaded is not None:
        _check_loaded(case, loaded.ours.tensors, loaded.ours.config, folder)
        if number % BUILT == 0:
            model = _attempt(lambda: vit.load_pretrained(source, **case.base.known), folder, case)
            if model is None:
                raise Wrong("load_pretrained refuses what load takes")
            _check_loaded(case, model.state_dict(), model.config, folder)
    outcome = "refused" if loaded is None else "loaded"
    if case.expected not in ("any", {"refused": "refused", "loaded": "loads"}[outcome]):
        raise Wrong(f"{outcome}, expected: {case.expected}")
    if number % HASHED == 0:
        _check_hash(case, source, folder)
    if _content(folder) != before:
        raise Wrong("reading changed the folder")
    if number % CONVERTED == 0:
        _check_conversion(case, number, source, loaded, folder)
    return outcome


def _attempt(run: Callable[[], Any], folder: Path, case: Case, names_file: bool = True) -> Any:
    """The result of reading; None if the file is refused with a proper error."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, limits[1]))
    try:
        return run()
    except (CheckpointError, FileNotFoundError) as error:
        _check_message(str(error), str(folder) if names_file else "")
        if isinstance(error, FileNotFoundError) and case.base.kind != "sharded":
            raise Wrong(f"FileNotFoundError: {error}") from None
        return None
    except OSError as error:
        raise (DiskFull if error.errno == errno.EFBIG else Wrong)(f"OSError: {error}") from None
    except MemoryError:
        raise Wrong("it takes too much memory") from None
    except Exception as error:
        raise Wrong(_where(error)) from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        if os.path.lexists(MARKER) or MARKER in os.environ:
            raise Wrong("code in the file was run")


def _where(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _check_message(text: str, folder: str) -> None:
    if folder not in text:
        raise Wrong(f"the error does not name the file: {text}")
    if re.search("MemoryError|alloc|not enough memory", text):
        raise Wrong(f"it takes too much memory: {text}")
    if not text.isprintable():
        raise Wrong(f"the error is not one printable line: {text!r}")


def _check_loaded(case: Case, tensors: dict[str, torch.Tensor], config: vit.ViTConfig, folder: Path) -> None:
    for name, content in case.files.items():  # changing a file later must not change the model
        _overwrite(folder / name, bytes(len(content)))
    try:
        expected = in_our_names(case.base, reference(case))
    except Exception as error:
        raise Wrong(f"loaded, but the file is not sound: {type(error).__name__}: {error}") from None
    renamed = case.base.kind == "onnx" and case.mutation.startswith("odd_")  # the graph's nodes still give the names
    if not renamed and (difference := same(tensors, expected)):
        raise Wrong(f"loaded, but {difference}")
    for name, content in case.files.items():
        _overwrite(folder / name, content)
    if case.base.beside:
        content = json.loads(case.files["config.json"])
        content = {} if "architecture" in content else content  # timm's
        for theirs, ours in (("layer_norm_eps", "eps"), ("num_attention_heads", "num_heads")):
            if theirs in content and "model_type" in content and content[theirs] != getattr(config, ours):
                raise Wrong(f"{ours} is {getattr(config, ours)}, config.json says {content[theirs]}")


def _overwrite(file: Path, content: bytes) -> None:
    """Replace the bytes in place, in the same inode."""
    with file.open("r+b") as opened:
        opened.write(content)


def _check_hash(case: Case, source: Path, folder: Path) -> None:
    """With `sha256=` of the sound file, no other file loads."""
    if case.base.kind == "sharded":
        return
    weights = case.base.entry or "model.safetensors"
    digest = hashlib.sha256(case.base.files[weights]).hexdigest()
    loaded = _attempt(lambda: load(find(source), sha256=digest, overrides=case.base.known), folder, case)
    if loaded is not None and case.files[weights] != case.base.files[weights]:
        raise Wrong("loaded, but its sha256 is another")


_TARGETS = (("vit", "out.safetensors"), ("augreg", "out.npz"), ("torchvision", "out.safetensors"), ("timm", "out"),
            ("transformers", "out"), ("vit", "new/out.safetensors"))  # fmt: skip


def _check_conversion(case: Case, number: int, source: Path, loaded: Any, folder: Path) -> None:
    """A conversion that fails leaves the target as it was; one that succeeds can be read back."""
    layout, name = _TARGETS[number // CONVERTED % len(_TARGETS)]
    place = folder / "target"
    target = place / name
    inside = target if name == "out" else target.parent
    if not name.startswith("new"):
        inside.mkdir(parents=True)
        in_folder = ("model.safetensors", "model.safetensors.report.json", "config.json", "preprocessor_config.json")
        for old in in_folder if name == "out" else (name, f"{name}.report.json"):
            (inside / old).write_bytes(b"precious")
    before = _content(place)
    convert = partial(convert_file, source, target, layout, overrides=case.base.known)
    disk = resource.getrlimit(resource.RLIMIT_FSIZE)
    if number // CONVERTED % 2:  # writing fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (number * 7919 % 30_000, disk[1]))
    try:
        report = _attempt(convert, folder, case, names_file=loaded is None)  # the layout may not hold it
    except DiskFull:
        report = None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, disk)
    after = _content(place)
    if report is None:
        if before != after:
            raise Wrong(f"a conversion that failed changed {sorted(set(before) ^ set(after)) or 'a file'}")
        return
    if loaded is None:
        raise Wrong("it was converted, but does not load")
    written = {str(Path(file)) for file in report["target"]["files"]}
    changed = {str(place / key) for key in after if after[key] != before.get(key)}
    if not written <= changed or len(changed - written) != 1:  # and the report
        raise Wrong(f"wrote {sorted(changed)}, expected {sorted(written)} and a report")
    again = load(find(target), overrides={"num_heads": loaded.ours.config.num_heads}).ours.tensors
    if difference := same(again, {name: tensor.numpy() for name, tensor in loaded.ours.tensors.items()}):
        raise Wrong(f"converted to {layout}, {difference}")


def _content(folder: Path) -> Files:
    """All files within a folder, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- many cases, in several processes


@dataclass
class Tally:
    """The outcomes of a number of cases."""

    outcomes: Counter = field(default_factory=Counter)  # (kind, mutation, outcome) -> cases
    seconds: Counter = field(default_factory=Counter)  # (kind, mutation) -> seconds
    failures: list[tuple[int, str]] = field(default_factory=list)  # number, what went wrong

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.seconds += other.seconds
        self.failures += other.failures

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def table(self) -> str:
        """By kind and mutation."""
        lines = [f"{'kind':<12} {'mutation':<18} {'cases':>8} {'refused':>8} {'loaded':>8} {'wrong':>6} {'seconds':>8}"]
        keys = sorted(self.seconds, key=lambda key: (KINDS.index(key[0]), key[1]))
        for kind, mutation in keys:
            lines.append(self._line(kind, mutation, lambda key, k=(kind, mutation): key[:2] == k))
        lines.append(self._line("all", "", lambda key: True))
        return "\n".join(lines)

    def _line(self, kind: str, mutation: str, chosen: Callable[[tuple], bool]) -> str:
        counts = Counter()
        for key, count in self.outcomes.items():
            counts[key[2]] += count * chosen(key)
        seconds = sum(value for key, value in self.seconds.items() if chosen(key))
        counted = "".join(f" {counts[outcome]:>{width}}" for outcome, width in
                          (("refused", 8), ("loaded", 8), ("wrong", 6)))  # fmt: skip
        return f"{kind:<12} {mutation:<18} {sum(counts.values()):>8}{counted} {seconds:>8.1f}"


def run_cases(
    seed: int, numbers: list[int], kinds: tuple[str, ...], folder: Path, begin: Callable[[int], None] | None = None
) -> Tally:
    """Run cases one by one, each in an empty folder; `begin` is called with each number first."""
    signal.signal(signal.SIGALRM, _hangs)
    tally = Tally()
    for number in numbers:
        if begin is not None:
            begin(number)
        case = make_case(seed, number, kinds)
        start = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome = run_case(case, number, folder)
        except (Wrong, Hangs) as error:
            outcome = "wrong"
            tally.failures.append((number, f"{case.base.kind}, {case.base.name}, {case.mutation}: {error}"))
        except Exception as error:
            outcome = "wrong"
            tally.failures.append((number, f"{case.base.kind}, {case.base.name}, {case.mutation}: {_where(error)}"))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        tally.outcomes[case.base.kind, case.mutation, outcome] += 1
        tally.seconds[case.base.kind, case.mutation] += time.perf_counter() - start
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tally


def _hangs(*_: Any) -> None:
    raise Hangs(f"takes more than {SECONDS} seconds")


def prepare(folder: Path) -> Path:
    """Make this process ready to run cases; the empty folder for them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # The model's shapes are needed for every case: building it once for each config halves the time.
    module = sys.modules["vit.weights.reading"]
    module.expected_shapes = lru_cache(256)(module.expected_shapes)
    os.chdir(folder)
    (folder / "case").mkdir()
    for base in bases():  # this also imports everything before memory is limited
        if run_case(Case(base, "none", base.files, "loads"), 0, folder / "case") != "loaded":
            raise Wrong(f"{base.name} does not load")
        shutil.rmtree(folder / "case")
        (folder / "case").mkdir()
    return folder / "case"


def work(pipe: Any, current: Any, seed: int, kinds: tuple[str, ...], folder: str) -> None:
    """The main loop of a worker: receives numbers, sends tallies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    place = prepare(Path(folder))

    while (numbers := pipe.recv()) is not None:
        pipe.send(run_cases(seed, numbers, kinds, place, partial(setattr, current, "value")))


class Worker:
    """A process that runs cases. If it crashes or hangs, the parent finds out in which case."""

    def __init__(self, seed: int, kinds: tuple[str, ...], folder: str) -> None:
        context = get_context("spawn")
        self.current = context.Value("q", -1, lock=False)
        self.pipe, theirs = context.Pipe()
        self.folder = tempfile.mkdtemp(dir=folder)
        arguments = (theirs, self.current, seed, kinds, self.folder)
        self.process = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.numbers: list[int] = []
        self.seen, self.since = -1, time.monotonic()

    def give(self, numbers: list[int]) -> None:
        self.numbers = numbers
        self.pipe.send(numbers)
        self.since = time.monotonic()

    def poll(self) -> Tally | str | None:
        """A tally; a text that says what went wrong; None if it is still running."""
        try:
            if self.pipe.poll():
                return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return f"the process crashed, exit code {self.process.exitcode}"
        if self.current.value != self.seen:
            self.seen, self.since = self.current.value, time.monotonic()
        if time.monotonic() - self.since > 3 * SECONDS + 60 * (self.seen < 0):
            self.process.kill()
            self.process.join()
            return "the process hangs and cannot be interrupted"
        return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def fuzz(
    seed: int, numbers: range, jobs: int, kinds: tuple[str, ...] = KINDS, seconds: float = 1e9, show: bool = False
) -> tuple[Tally, int]:
    """Run cases in `jobs` processes: their outcomes, and the first number that was not run."""
    os.environ.update(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")  # an arena per thread takes address space
    queue = deque(list(numbers[i : i + CHUNK]) for i in range(0, len(numbers), CHUNK))
    tally, until = Tally(), time.monotonic() + seconds
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    workers: list[Worker] = []
    bar = tqdm(total=len(numbers), disable=not show or not sys.stderr.isatty(), unit="case", file=sys.stderr)
    try:
        workers += [Worker(seed, kinds, folder) for _ in range(min(jobs, len(queue)))]
        while (queue and time.monotonic() < until) or any(worker.numbers for worker in workers):
            for i, worker in enumerate(workers):
                if not worker.numbers and queue and time.monotonic() < until:
                    worker.give(queue.popleft())
                result = worker.poll() if worker.numbers else None
                if isinstance(result, str):
                    workers[i] = _replace(worker, result, seed, kinds, folder, tally, queue)
                elif result is not None:
                    tally.add(result)
                    bar.update(result.cases)
                    bar.set_postfix(wrong=len(tally.failures))
                    worker.numbers = []
            time.sleep(0.01)
    except KeyboardInterrupt:
        pass
    finally:
        bar.close()
        open_ = [number for worker in workers for number in worker.numbers] + [n for part in queue for n in part]
        for worker in workers:
            worker.end()
        shutil.rmtree(folder, ignore_errors=True)
    return tally, min(open_, default=numbers.stop)


def _replace(
    worker: Worker, what: str, seed: int, kinds: tuple[str, ...], folder: str, tally: Tally, queue: deque
) -> Worker:
    """A new worker for one that died. The case that killed it is not run again; the others of its chunk are."""
    number = worker.current.value
    if number not in worker.numbers:
        raise SystemExit(f"a worker died before it began: {what}; see its output above")
    case = make_case(seed, number, kinds)
    tally.failures.append((number, f"{case.base.kind}, {case.base.name}, {case.mutation}: {what}"))
    tally.outcomes[case.base.kind, case.mutation, "wrong"] += 1
    tally.seconds[case.base.kind, case.mutation] += 0
    rest = [other for other in worker.numbers if other != number]
    if rest:
        queue.appendleft(rest)
    worker.end()
    return Worker(seed, kinds, folder)


def describe(tally: Tally, seed: int, kinds: tuple[str, ...]) -> str:
    """The failures, each with the command that repeats it."""
    more = "" if kinds == KINDS else f" --kind {kinds[0]}"
    lines = [f"{len(tally.failures)} cases went wrong:"] * bool(tally.failures)
    for number, what in sorted(tally.failures)[:FAILURES]:
        lines.append(f"  {what[:600]}\n    python tests/fuzz/fuzz.py --seed {seed} --only {number}{more}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="how many cases (20000)")
    parser.add_argument("--start", type=int, default=0, help="the number of the first one, to continue a run")
    parser.add_argument("--only", type=int, help="the number of the only one to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--kind", choices=(*KINDS, "all"), default="all")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this long")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the cases that went wrong")
    args = parser.parse_args()
    kinds = KINDS if args.kind == "all" else (args.kind,)
    numbers = range(args.start, args.start + args.count) if args.only is None else range(args.only, args.only + 1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends with a summary as well
    start = time.monotonic()
    tally, stopped = fuzz(args.seed, numbers, args.jobs, kinds, args.minutes * 60, show=True)
    print(f"{tally.table()}\n{tally.cases} cases with seed {args.seed} in {time.monotonic() - start:.0f} seconds")
    if stopped < numbers.stop:
        print(f"interrupted: continue with --start {stopped} --count {numbers.stop - stopped}")
    if tally.failures:
        print(describe(tally, args.seed, kinds))
    if args.keep:
        keep(
            args.keep,
            args.seed,
            [number for number, _ in tally.failures] or [args.only] * (args.only is not None),
            kinds,
        )
    return 1 if tally.failures else 0


def keep(folder: Path, seed: int, numbers: list[int], kinds: tuple[str, ...]) -> None:
    """Write the files of some cases."""
    for number in numbers[:100]:
        place = folder / f"{seed}-{number}"
        place.mkdir(parents=True, exist_ok=True)
        for name, content in make_case(seed, number, kinds).files.items():
            (place / name).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
