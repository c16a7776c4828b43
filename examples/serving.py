"""A web service around an exported file: micro-batches, one clear line for each bad request, and a graceful stop.

    pip install -e ".[onnx,serve]" && vit export vit_digits_patch4_32 -o digits.onnx
    MODEL=digits.onnx uvicorn --app-dir examples serving:app
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

On two cores of an AMD EPYC, which the clients share (tests/benchmarks/serving.py), 1 client: 273/s, p50 3.6 ms, p99
4.7 ms; 8 clients, BATCH=1: 438/s, 18, 22 ms; BATCH=8: 473/s, 16, 26 ms. ViT-S at 224 px: 10.4/s; 10.6/s; 10.8/s.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import torch
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

import vit

WAITING, BYTES = 128, 20_000_000  # at most, in pictures and in bytes
Image.MAX_IMAGE_PIXELS = 25_000_000  # Pillow refuses twice as many
model = vit.load_exported(os.environ.get("MODEL", "digits.onnx"), int(os.environ.get("THREADS", 1)))
BATCH = 1 if model.input == "image" else int(os.environ.get("BATCH", 8))  # of one size; such a file takes any
app, transform = FastAPI(), vit.create_transform(model)
runtime, waiting, turn = ThreadPoolExecutor(1), [], asyncio.Lock()  # a thread that those that decode cannot delay
assert model.config.num_classes > 1, "expected a model of two classes or more: the answers are their probabilities"


@app.post("/predict")
async def predict(request: Request) -> list[dict]:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BYTES:
            raise HTTPException(413, f"the picture is larger than {BYTES} bytes")
    logits = await classify(await asyncio.to_thread(read, body))  # [classes]
    best, labels = logits.softmax(dim=0).topk(min(5, len(logits))), model.categories or range(len(logits))
    return [{"label": str(labels[i]), "probability": p} for p, i in zip(best.values.tolist(), best.indices.tolist())]


def read(body: bytearray) -> torch.Tensor:
    try:
        return transform(Image.open(BytesIO(body)))  # [C, H, W]
    except Exception as error:  # Pillow's plugins raise errors of many kinds
        raise HTTPException(400, f"not a picture that can be read: {str(error).split(' <')[0]}") from error


async def classify(image: torch.Tensor) -> torch.Tensor:
    if len(waiting) >= WAITING:
        raise HTTPException(503, "too many pictures are waiting: try again later")
    waiting.append(job := {"image": image})
    async with turn:  # one call of the model at a time; pictures that arrive meanwhile share the next one
        if "logits" not in job:
            jobs = [waiting.pop(0) for _ in range(min(BATCH, len(waiting)))]
            images = torch.stack([one["image"] for one in jobs])  # [B, C, H, W]
            for one, row in zip(jobs, await asyncio.wrap_future(runtime.submit(model, images))):
                one["logits"] = row
    return job["logits"]
