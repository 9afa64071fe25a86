"""The peer of zoo-serve in benchmarks/cpp.py: FastAPI, Pillow, torchvision and ONNX Runtime, as people write it.

The environment says which engine file (PEER_ENGINE), how many threads of ONNX Runtime (PEER_THREADS), and what
torchvision preprocesses to (PEER_RESIZE, PEER_CROP).
"""

from __future__ import annotations

import io
import os

import numpy as np
import onnxruntime
import torch
from fastapi import FastAPI, Request
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from torchvision.transforms._presets import ImageClassification

torch.set_num_threads(1)  # each request has a thread of its own
transform = ImageClassification(
    crop_size=int(os.environ["PEER_CROP"]), resize_size=int(os.environ["PEER_RESIZE"])
)
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = int(os.environ["PEER_THREADS"])
session = onnxruntime.InferenceSession(os.environ["PEER_ENGINE"], settings, ["CPUExecutionProvider"])
input_name = session.get_inputs()[0].name
app = FastAPI()


def answer(body: bytes) -> dict:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")
    inputs = transform(image)[None].numpy()
    logits = session.run(None, {input_name: inputs})[0][0].astype(np.float64)
    exponents = np.exp(logits - logits.max())
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities)[:5]
    return {"classes": [{"index": int(i), "probability": float(probabilities[i])} for i in best]}


@app.post("/v1/predict")
async def predict(request: Request) -> dict:
    return await run_in_threadpool(answer, await request.body())


@app.get("/healthz")
def healthz() -> dict:
    return {"status": "ok"}
