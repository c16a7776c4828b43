"""Load on examples/serving.py, on the loopback: requests per second and how long each takes, with and without batches.

    python tests/benchmarks/serving.py [--requests 300] [--seconds 20] [--clients 1,8] [--rounds 2] [--json out.json]

Two servers run at a time, one whose calls of the model take one picture (BATCH=1) and one whose calls take up to eight;
they are asked in turns, A B B A. The clients are threads of this process, which shares the processor with the servers.
Each cell ends after a number of requests or seconds, whichever comes first.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path

import torch
from harness import environment, write_json
from PIL import Image

import vit

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = {
    "digits, 32 px": lambda: vit.load_pretrained("vit_digits_patch4_32"),
    "ViT-S/16, 224 px": lambda: vit.create_model("vit_small_patch16_224").eval(),
}


@contextmanager
def serve(file: Path, batch: int) -> Iterator[int]:
    """The example, started as its head says; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "serving:app", "--port", str(port)]
    env = os.environ | {"MODEL": str(file), "BATCH": str(batch)}
    process = subprocess.Popen([*command, "--log-level", "warning"], env=env)
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(port: int, body: bytes, clients: int, requests: int, seconds: float) -> tuple[list[float], float]:
    """The time of each request by several clients, each of which waits for its answer, and of all together."""
    times: list[float] = []
    start, left = time.perf_counter(), iter(range(requests))  # one iterator for all: next() is atomic

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() - start < seconds and next(left, None) is not None:
            begin = time.perf_counter()
            connection.request("POST", "/predict", body)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}")
            times.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times, time.perf_counter() - start


def measure(file: Path, args: argparse.Namespace) -> Iterator[dict]:
    """One row for each number of clients and each BATCH."""
    picture = BytesIO()
    Image.radial_gradient("L").resize((400, 300)).convert("RGB").save(picture, "JPEG")
    with ExitStack() as servers:
        ports = {batch: servers.enter_context(serve(file, batch)) for batch in (1, 8)}
        for port in ports.values():
            ask(port, picture.getvalue(), 8, 24, args.seconds)  # warm
        for clients in args.clients:
            found: dict[int, list] = {batch: [] for batch in ports}
            for i in range(args.rounds):
                for batch in [*ports][:: 1 if i % 2 == 0 else -1]:
                    found[batch].append(ask(ports[batch], picture.getvalue(), clients, args.requests, args.seconds))
            for batch, rounds in found.items():
                times = torch.tensor([one for times, _ in rounds for one in times])
                yield {
                    "clients": clients, "BATCH": batch, "requests": len(times),
                    "per_second": len(times) / sum(total for _, total in rounds),
                    **{f"p{q}_ms": 1000 * times.quantile(q / 100).item() for q in (50, 99)},
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=300, help="per cell and round")
    parser.add_argument("--seconds", type=float, default=20, help="per cell and round, at most")
    parser.add_argument("--clients", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            vit.export(make(), file)
            print(f"{name}\n  clients  BATCH  requests   per s    p50 ms    p99 ms")
            for row in measure(file, args):
                print(
                    f"  {row['clients']:7} {row['BATCH']:6} {row['requests']:9} {row['per_second']:7.1f}"
                    f" {row['p50_ms']:9.1f} {row['p99_ms']:9.1f}",
                    flush=True,
                )
                rows.append({"model": name, **row})
    write_json(args.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
