"""ONNX Runtime Web, which runs the model in a page: fetched once, with npm, and known by its hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .packages import need

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
MODULE, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SHA256 = {
    MODULE: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
INSIDE = ("", "dist", "package/dist", "node_modules/onnxruntime-web/dist")  # where a folder may hold the files
BY_HAND = f"run `npm pack {PACKAGE}` where that works, unpack the file and give its folder: --runtime-folder package"
SECONDS = 900  # after which a download has failed


def runtime_files(folder: str | Path | None = None) -> list[Path]:
    """The two files of ONNX Runtime Web that a page needs.

    Args:
        folder: holds them, as npm or an archive unpacks them; None for the cache, which npm fills if it has to.

    Raises:
        ValueError: the folder does not hold them, or others; npm is missing or cannot fetch them.
    """
    if folder is not None:
        places = [Path(folder) / inside for inside in INSIDE]
        place = next((one for one in places if (one / WASM).is_file()), None)
        if place is None:
            raise ValueError(f"{folder} does not hold {WASM} of ONNX Runtime Web {VERSION}: {BY_HAND}")
        return checked(place)
    cache = cache_folder()
    if not all((cache / name).is_file() for name in SHA256):
        fetch(cache)
    return checked(cache)


def cache_folder() -> Path:
    """Where the fetched files are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit-small" / PACKAGE


def checked(folder: Path) -> list[Path]:
    """The files in a folder; ValueError for one that is missing or has another hash."""
    for name, wanted in SHA256.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{file} is not that of ONNX Runtime Web {VERSION}: remove it and try again, or {BY_HAND}")
    return [folder / name for name in SHA256]


def fetch(cache: Path) -> None:
    """Fill the cache by `npm pack`."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"a page needs ONNX Runtime Web {VERSION}, and npm, which fetches it, is missing: {BY_HAND}")
    print(f"fetching {PACKAGE} with npm, 33 MB, once, into {cache}", file=sys.stderr)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        command = [npm, "pack", PACKAGE, "--ignore-scripts", "--loglevel=error"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(f"npm did not fetch {PACKAGE} within {SECONDS} seconds: {BY_HAND}") from None
        if done.returncode:
            reason = " ".join(done.stderr.split())[:300]
            raise ValueError(f"npm cannot fetch {PACKAGE} ({reason}): {BY_HAND}")
        (archive,) = Path(folder).glob("*.tgz")
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        with tarfile.open(archive) as packed:
            for name in SHA256:
                member = packed.extractfile(f"package/dist/{name}")
                assert member is not None
                (unpacked / name).write_bytes(member.read())
        cache.mkdir(exist_ok=True)
        for file in checked(unpacked):
            os.replace(file, cache / file.name)


def licence() -> str:
    """Its licence and those of what it contains, from the Python package, which comes from the same sources."""
    folder = Path(need("onnxruntime", "onnx").__file__).parent
    texts = [(folder / name).read_text(encoding="utf-8") for name in ("LICENSE", "ThirdPartyNotices.txt")]
    return f"ONNX Runtime Web {VERSION}\n\n" + "\n\n".join(texts)
