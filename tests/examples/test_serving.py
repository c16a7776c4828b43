"""examples/serving.py answers as the model does, in micro-batches, refuses bad requests and stops gracefully."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

import vit
from vit.resources import digit_images

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "digits.onnx"
    vit.export(vit.load_pretrained("vit_digits_patch4_32"), path)
    return path


class Slow:
    """The model, with a record of its batches, after a pause."""

    def __init__(self, model) -> None:
        self.model, self.categories, self.sizes, self.seconds = model, model.categories, [], 0.0

    def __call__(self, images):
        self.sizes.append(len(images))
        time.sleep(self.seconds)
        return self.model(images)


class Served:
    """The example in a thread of this process, on the loopback."""

    def __init__(self, module) -> None:
        self.module = module
        module.model = self.model = Slow(module.model)
        self.server = uvicorn.Server(uvicorn.Config(module.app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive()


@pytest.fixture
def served(file, load, monkeypatch):
    monkeypatch.setenv("MODEL", str(file))
    served = Served(load("serving"))
    yield served
    served.stop()


def post(port: int, body: bytes) -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", "/predict", body)
    response = connection.getresponse()
    content = response.read()
    return response.status, json.loads(content) if response.status < 500 or b"{" in content else content


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def test_it_answers_as_the_model(served, file):
    model = vit.load_exported(file)
    transform = vit.create_transform(model)
    for image in digit_images()[0][:5]:
        status, found = post(served.port, encoded(image))
        wanted = model(transform(image)[None])[0].softmax(dim=0).sort(descending=True)
        assert status == 200 and [one["label"] for one in found] == [str(i) for i in wanted.indices[:5].tolist()]
        torch.testing.assert_close([one["probability"] for one in found], wanted.values[:5].tolist())


def test_pictures_that_arrive_meanwhile_share_a_call(served):
    """In their own answers: each gets the label of its own picture."""
    images, labels = digit_images()
    served.model.seconds = 0.3
    with ThreadPoolExecutor(12) as clients:
        found = list(clients.map(lambda image: post(served.port, encoded(image)), images[:12]))
    right = [answer[0]["label"] == str(label) for (_, answer), label in zip(found, labels[:12].tolist())]
    assert sum(right) >= 11
    assert (
        sum(served.model.sizes) == 12 and max(served.model.sizes) > 1 and max(served.model.sizes) <= served.module.BATCH
    )
    assert len(served.model.sizes) <= 5


def test_a_file_that_resizes_by_itself(tmp_path, load, monkeypatch):
    """Pictures of several sizes, each in a call of its own."""
    model = vit.load_pretrained("vit_digits_patch4_32")
    vit.export(model, tmp_path / "image.onnx", input="image")
    monkeypatch.setenv("MODEL", str(tmp_path / "image.onnx"))
    served = Served(load("serving"))
    served.model.seconds = 0.1
    bodies = [encoded(digit_images()[0][i].resize((40 + i, 50))) for i in range(4)]
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda body: post(served.port, body), bodies))
    served.stop()
    assert [status for status, _ in found] == [200] * 4 and served.model.sizes == [1] * 4


def test_bad_requests(served, monkeypatch):
    monkeypatch.setattr(served.module, "BYTES", 5000)
    good = encoded(digit_images()[0][0])
    wide = encoded(Image.new("1", (9000, 9000)))
    for body, status, message in (
        (b"", 400, "not a picture that can be read: cannot identify image file"),
        (b"no picture", 400, "not a picture that can be read: cannot identify image file"),
        (good[: len(good) // 2], 400, "not a picture that can be read: "),
        (bytes(5001), 413, "the picture is larger than 5000 bytes"),
    ):
        found = post(served.port, body)
        assert found[0] == status and found[1]["detail"].startswith(message) and "\n" not in found[1]["detail"]
        assert "BytesIO" not in found[1]["detail"]
    monkeypatch.setattr(served.module, "BYTES", 10**7)
    found = post(served.port, wide)
    assert found[0] == 400 and "81000000 pixels" in found[1]["detail"]
    assert post(served.port, good)[0] == 200 and served.model.sizes == [1]  # it goes on


def test_too_many_at_once(served, monkeypatch):
    monkeypatch.setattr(served.module, "WAITING", 2)
    monkeypatch.setattr(served.module, "BATCH", 1)
    served.model.seconds = 0.5
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda image: post(served.port, encoded(image)), digit_images()[0][:8]))
    assert {status for status, _ in found} == {200, 503}
    assert all("try again later" in answer["detail"] for status, answer in found if status == 503)


def test_a_failure_of_the_model_is_no_end(served, monkeypatch):
    good = encoded(digit_images()[0][0])
    with monkeypatch.context() as broken:
        broken.setattr(served.module, "model", None)  # which cannot be called
        assert post(served.port, good)[0] == 500
    assert post(served.port, good)[0] == 200


def test_a_graceful_stop(file):
    """SIGTERM: a request that is on its way is answered, and new ones are not taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slow = (
        "import time, uvicorn, serving; real = serving.transform\n"
        "serving.transform = lambda image: (time.sleep(1.5), real(image))[1]\n"
        f"uvicorn.run(serving.app, port={port}, log_level='error')"
    )
    env = os.environ | {"MODEL": str(file), "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", slow], env=env) as process, ThreadPoolExecutor(1) as client:
        try:
            for _ in range(300):
                time.sleep(0.1)
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    assert process.poll() is None
            answer = client.submit(post, port, encoded(digit_images()[0][0]))
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert answer.result()[0] == 200
            process.wait(timeout=20)
            with pytest.raises(OSError):
                post(port, b"")
        finally:
            process.kill()


def test_it_is_short():
    assert len((EXAMPLES / "serving.py").read_text().splitlines()) <= 60
