"""Thousands of requests, valid and hostile, to zoo-serve: stress_serve.py ZOO_SERVE BUNDLES [COUNT [AT_ONCE]].

Each valid one must be answered with Python's logits to the bit, or with 503; each hostile one with 4xx; and the server
must end cleanly on SIGTERM.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

AT_ONCE = int(sys.argv[4]) if len(sys.argv) > 4 else 1000
TIMEOUT = 2  # seconds that the server gives a slow client
MODEL = "resnet18"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


async def post(port: int, body: bytes, query: str = "logits=1", *, kind: str = "") -> tuple[int, bytes]:
    """Status and body; 0 where the client hangs up in the middle."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        headers = f"Host: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(f"POST /v1/predict?{query} HTTP/1.1\r\n{headers}".encode())
        if kind == "cut":
            writer.write(body[: len(body) // 2])
            await writer.drain()
            return 0, b""
        if kind == "slow":
            writer.write(body[:100])
            await writer.drain()
            await asyncio.sleep(0.5)
            body = body[100:]
        if kind in ("drip", "stall"):
            writer.write(body[:100])
            head = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            while not head.done():
                writer.write(body[:1] if kind == "drip" else b"")
                await asyncio.sleep(0.2)
            try:
                return int(head.result().split()[1]), b""
            except (OSError, asyncio.IncompleteReadError):
                return 0, b""  # closed while a byte was on its way to it
        writer.write(body)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        return status, await reader.read()
    finally:
        writer.close()


async def stress(port: int, bundles: Path, count: int, engine: str) -> tuple[Counter, list[str]]:
    rng = random.Random(0)
    images = [path.read_bytes() for path in sorted((bundles / "images").iterdir())]
    logits = np.load(bundles / f"{MODEL}-{engine}.npy")
    slots, seen, wrong = asyncio.Semaphore(AT_ONCE), Counter(), []
    expected = {"valid": {200, 503}, "slow": {200, 503}, "cut": {0}, "drip": {408, 0}, "stall": {408}}
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")  # 18 kB, and 432 MB of pixels

    async def one(kind: str, index: int) -> None:
        image = images[index]
        body, query = {
            "truncated": (image[: rng.randrange(len(image) // 2)], "logits=1"),
            "junk": (rng.randbytes(1000), "logits=1"),
            "query": (image, "top=-1"),
            "empty": (b"", "logits=1"),
            "bomb": (bomb.getvalue(), "logits=1"),
        }.get(kind, (image, "logits=1"))
        async with slots:
            status, answer = await post(port, body, query, kind=kind)
        seen[kind, status] += 1
        if status not in expected.get(kind, {400} if kind == "query" else {400, 503}):
            wrong.append(f"{kind}: {status} {answer[:100]!r}")
        elif status == 200 and not np.array_equal(np.float32(json.loads(answer)["logits"]), logits[index]):
            wrong.append(f"{kind}: other logits for image {index}")

    kinds = ["valid"] * 7 + "truncated junk query empty bomb slow cut drip stall".split()
    await asyncio.gather(*(one(rng.choice(kinds), rng.randrange(len(images))) for _ in range(count)))
    return seen, wrong


def ask(port: int, text: bytes) -> bytes:
    """All that the server answers to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(text)
        found = b""
        try:
            while part := client.recv(65536):
                found += part
        except ConnectionResetError:
            pass
        return found


def manners(port: int, admin: int, image: bytes) -> list[str]:
    """What clients do wrong one at a time: each gets one answer, of this status, and the connection is closed."""
    chunked = b"Transfer-Encoding: chunked\r\n"
    begun = b"Host: x\r\n" + chunked + b"\r\n5\r\nhello\r\n"  # and never ended
    post = b"POST /v1/predict HTTP/1.1\r\nHost: x\r\n"
    whole = post + b"Content-Length: %d\r\n" % len(image)
    form = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        + image
        + b"\r\n--x--\r\n"
    )
    cases = {
        "good": (200, whole + b"\r\n" + image),
        "pipelined": (200, (whole + b"\r\n" + image) * 2),
        "no body": (411, post + b"\r\n"),
        "form": (
            415,
            post
            + b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n" % len(form)
            + form,
        ),
        "chunked form": (
            415,
            post
            + b"Content-Type: multipart/form-data; boundary=x\r\n"
            + chunked
            + b"\r\n%x\r\n" % len(form)
            + form
            + b"\r\n0\r\n\r\n",
        ),
        "chunked": (200, post + chunked + b"\r\n%x\r\n" % len(image) + image + b"\r\n0\r\n\r\n"),
        "negative": (400, post + b"Content-Length: -1\r\n\r\n"),
        "enormous": (413, post + b"Content-Length: 99999999999999999999999\r\n\r\n"),
        "late": (408, post + b"Content-Length: 1000\r\n\r\n" + b"x" * 10),
        "no gzip": (
            400,
            whole + b"Content-Encoding: gzip\r\n\r\n" + b"GET /metrics HTTP/1.1\r\n\r\n" + image,
        ),
        "GET with a body": (
            200,
            b"GET /healthz HTTP/1.1\r\nContent-Length: 40\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n",
        ),
        "large top": (
            400,
            whole.replace(b"predict", b"predict?top=99999999999999999999999") + b"\r\n" + image,
        ),
        "empty top": (400, whole.replace(b"predict", b"predict?top=") + b"\r\n" + image),
        "elsewhere": (404, b"GET /v2 HTTP/1.1\r\n\r\n"),
        # None of these bodies may be waited for: what httplib reads of them is kept in memory, without a limit.
        "POST elsewhere": (404, b"POST /v2 HTTP/1.1\r\n" + begun),
        **{
            method: (405, b"%s /v1/predict HTTP/1.1\r\n%s" % (method.encode(), begun))
            for method in ("PUT", "PATCH", "DELETE", "OPTIONS")
        },
        "PUT without a length": (405, b"PUT /v1/predict HTTP/1.1\r\n\r\n" + b"x" * 100),
        "GET with chunks": (200, b"GET /healthz HTTP/1.1\r\n" + begun),
        "HEAD with chunks": (200, b"HEAD /healthz HTTP/1.1\r\n" + begun),
    }
    asked = [(name, port, *case) for name, case in cases.items()]
    asked += [
        ("GET of admin", admin, 200, b"GET /healthz HTTP/1.1\r\n" + begun),
        ("POST to admin", admin, 405, b"POST /metrics HTTP/1.1\r\n" + begun),
        ("PUT to admin", admin, 405, b"PUT /v1/predict HTTP/1.1\r\n" + begun),
    ]
    wrong = []
    for name, where, status, text in asked:
        answer = ask(where, text)
        if not answer.startswith(b"HTTP/1.1 %d " % status) or answer.count(b"HTTP/1.1 ") != 1:
            wrong.append(f"{name}: {answer[:200]!r}")
        if b"EXCEPTION" in answer:
            wrong.append(f"{name}: tells of its inside")
    return wrong


def second_on_the_port(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return [] if done.returncode == 1 and "cannot listen" in done.stderr else [f"second server: {done}"]


def ended_early(command: list[str]) -> list[str]:
    """SIGTERM at any moment of the start ends it."""
    wrong = []
    for milliseconds in range(0, 200, 10):
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(milliseconds / 1000)
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            wrong.append(f"SIGTERM after {milliseconds} ms is lost")
    return wrong


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def main() -> int:
    program, bundles = sys.argv[1], Path(sys.argv[2])
    count, port = int(sys.argv[3]) if len(sys.argv) > 3 else 3000, free_port()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server inherits it
    command = [program, bundles / f"{MODEL}.bundle", "--port", port, "--timeout", TIMEOUT]
    command += ["--queue", 64, "--max-bytes", 1_000_000]
    admin = free_port()
    command = [*map(str, command), "--admin-port", str(admin)]
    server, engine = subprocess.Popen(command), ""
    try:
        for _ in range(100):
            try:
                engine = json.loads(get(port, "/healthz"))["engine"]
                break
            except OSError:
                if server.poll() is not None:
                    break
                time.sleep(0.2)
        if not engine:
            print("it does not come up")
            return 1
        seen, wrong = asyncio.run(stress(port, bundles, count, engine))
        answered = sum(n for (_, code), n in seen.items() if code == 200)
        for where in (port, admin):
            if f'requests_total{{status="200"}} {answered}\n' not in get(where, "/metrics"):
                wrong.append("the metrics tell another number of answers")
        if 'request_seconds_bucket{le="0.1"}' not in get(port, "/metrics"):
            wrong.append("the metrics' bounds are not those of the buckets")
        wrong += manners(port, admin, (bundles / "images" / "00-baseline.jpg").read_bytes())
        wrong += second_on_the_port(command)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    wrong += ended_early(command)
    print(*(f"{kind} {status}: {n}" for (kind, status), n in sorted(seen.items())), sep="\n")
    print("\n".join(wrong[:20]), f"{len(wrong)} wrong, exit code {code}")
    return int(bool(wrong) or code != 0 or not seen["valid", 200])


if __name__ == "__main__":
    sys.exit(main())
