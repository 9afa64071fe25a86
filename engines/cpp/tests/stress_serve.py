"""Thousands of requests, valid and hostile, to zoo-serve: stress_serve.py ZOO_SERVE BUNDLES [COUNT [AT_ONCE]].

Each valid one must be answered with Python's logits to the bit, or with 503; each hostile one with 4xx; and the server
must end cleanly on SIGTERM.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
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
    """Status and body; 0 where the client hangs up in the middle, or the connection is reset."""
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
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        return 0, repr(error).encode()
    finally:
        writer.close()


async def stress(port: int, bundles: Path, count: int, engine: str) -> tuple[Counter, list[str]]:
    rng = random.Random(0)
    images = [path.read_bytes() for path in sorted((bundles / "images").iterdir())]
    logits = np.load(bundles / f"{MODEL}-{engine}.npy")
    slots, seen, wrong = asyncio.Semaphore(AT_ONCE), Counter(), []
    allowed = {
        "valid": {200, 503, 504},
        "slow": {200, 503, 504},
        "cut": {0},
        "drip": {408, 0},
        "stall": {408},
    }
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
        if status not in allowed.get(kind, {400} if kind == "query" else {400, 503, 504}):
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
    """Faults of clients, one at a time: each gets one answer, of this status, and the connection is closed."""
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
        "refused while it is sent": (413, post + b"Content-Length: 30000000\r\n\r\n" + b"x" * 30_000_000),
        "late": (408, post + b"Content-Length: 1000\r\n\r\n" + b"x" * 10),
        "no gzip": (
            415,
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
        "GET of predict": (405, b"GET /v1/predict HTTP/1.1\r\n\r\n"),
        "POST of healthz": (405, b"POST /healthz HTTP/1.1\r\n" + begun),
        "two lengths": (400, whole + b"Content-Length: 5\r\n\r\n" + image),
        "a length and chunks": (400, whole + chunked + b"\r\n5\r\nhello\r\n0\r\n\r\n"),
        "gzip as transfer": (501, post + b"Transfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
        "range of an answer": (200, whole + b"Range: bytes=0-0,0-1\r\n\r\n" + image),
        "ranges of metrics": (
            200,
            b"GET /metrics HTTP/1.1\r\nRange: bytes=" + b"0-999," * 600 + b"0-1\r\n\r\n",
        ),
        "expects, too large": (413, post + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"),
        "expects elsewhere": (404, b"POST /v2 HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
        "a wrong deadline": (400, whole + b"X-Request-Timeout-Ms: soon\r\n\r\n" + image),
        "two deadlines": (400, whole + b"X-Request-Timeout-Ms: 5\r\n" * 2 + b"\r\n" + image),
        "a huge deadline": (200, whole + b"X-Request-Timeout-Ms: 99999999999999999999\r\n\r\n" + image),
        "an early deadline": (50, whole + b"X-Request-Timeout-Ms: 1\r\n\r\n" + image),  # 503 or 504
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
        ("ranges of admin", admin, 200, b"GET /metrics HTTP/1.1\r\nRange: bytes=0-1,0-1\r\n\r\n"),
        ("PUT to admin", admin, 405, b"PUT /v1/predict HTTP/1.1\r\n" + begun),
    ]
    wrong = []
    for name, where, status, text in asked:
        answer = ask(where, text)
        if not answer.startswith(b"HTTP/1.1 %d" % status) or answer.count(b"HTTP/1.1 ") != 1:
            wrong.append(f"{name}: {answer[:200]!r}")
        if b"EXCEPTION" in answer:
            wrong.append(f"{name}: tells of its inside")
    return wrong


def expected(port: int, image: bytes) -> list[str]:
    """A body that is welcome is asked for, and then answered."""
    head = b"POST /v1/predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(image)
    answer = ask(port, head + image)
    good = answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    return [] if good else [f"Expect: {answer[:200]!r}"]


def slow_headers(port: int) -> list[str]:
    """Headers that never end are cut off after --timeout, however steadily their bytes come."""
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=1) as client:
        client.sendall(b"POST /v1/predict HTTP/1.1\r\nX: ")
        try:
            while time.monotonic() < begin + 5 * TIMEOUT:
                client.sendall(b"x")
                time.sleep(0.1)
        except OSError:
            return []
    return ["slow headers are not cut off"]


def large_headers(port: int) -> list[str]:
    """Headers, and lines of chunks, of any length are cut off before they take memory."""
    head = b"POST /v1/predict HTTP/1.1\r\n"
    texts = {
        "a long header": head + b"X: " + b"x" * 5_000_000,
        "many headers": head + b"X: x\r\n" * 1_000_000,
        "a long request line": b"GET /" + b"x" * 5_000_000,
        "a long chunk line": head + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 5_000_000,
    }
    wrong = []
    for name, text in texts.items():
        begin = time.monotonic()
        try:
            answer = ask(port, text)
        except OSError:  # closed while it was sent
            answer = b""
        if answer.startswith(b"HTTP/1.1 2") or time.monotonic() - begin > TIMEOUT:
            wrong.append(f"{name}: {answer[:100]!r} after {time.monotonic() - begin:.1f} s")
    return wrong


def abandoned(port: int, image: bytes) -> list[str]:
    """Requests of clients that have hung up are dropped and not run."""
    head = b"POST /v1/predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(image)
    clients = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(200)]
    for client in clients:
        client.sendall(head + image)
        client.close()
    time.sleep(1)
    late = [line for line in get(port, "/metrics").splitlines() if 'status="504"' in line]
    return [] if late else ["requests of clients that are gone are run"]


def predict_status(port: int, body: bytes) -> int:
    answer = ask(port, b"POST /v1/predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return int(answer.split()[1])


def after_a_pause(command: list[str], port: int, image: bytes) -> list[str]:
    """A pause after a request that failed while another was answered is not taken for the time of an answer."""
    large = io.BytesIO()
    Image.linear_gradient("L").resize((6000, 4000)).save(large, "JPEG", quality=95)
    server = subprocess.Popen([*command, "--deadline", "500"], stdout=subprocess.DEVNULL)
    try:
        serving_engine(server, port)
        failing = threading.Thread(target=predict_status, args=(port, large.getvalue()[:-1000]))
        failing.start()
        time.sleep(0.02)
        predict_status(port, image)
        failing.join()
        time.sleep(3)
        found = [predict_status(port, image) for _ in range(8)]
    finally:
        server.terminate()
        server.wait(30)
    return [] if set(found) == {200} else [f"after a pause: {found}"]


def waited_for_a_thread(command: list[str], port: int, image: bytes) -> list[str]:
    """The deadline counts from the connect, though silent clients hold all threads meanwhile."""
    server = subprocess.Popen([*command, "--threads", "2", "--deadline", "1000"], stdout=subprocess.DEVNULL)
    try:
        serving_engine(server, port)
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.2)
        found = [predict_status(port, image)]
        for client in silent:
            client.close()
        time.sleep(0.2)
        found.append(predict_status(port, image))
    finally:
        server.terminate()
        server.wait(30)
    return [] if found == [408, 200] else [f"behind silent clients: {found}"]


def same_signal(command: list[str], port: int) -> list[str]:
    """SIGTERM to the process and then to its group is one."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    serving_engine(server, port)
    for _ in range(3):
        server.terminate()
    return [] if server.wait(30) == 0 else ["SIGTERM three times at once is not one"]


def second_signal(command: list[str], port: int, image: bytes) -> list[str]:
    """A second SIGTERM ends the server at once, though a client is still sending."""
    command = list(command)
    command[command.index("--timeout") + 1] = "60"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    serving_engine(server, port)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"POST /v1/predict HTTP/1.1\r\nContent-Length: 100000\r\n\r\n" + image[:10])
        time.sleep(0.3)
        server.terminate()
        time.sleep(1.5)
        waits = server.poll() is None
        server.terminate()
        try:
            code = server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            return ["a second SIGTERM is not heard"]
    return [] if waits and code == 1 else [f"SIGTERM twice: waits {waits}, exit code {code}"]


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


def set_ups(command: list[str], port: int, image: bytes) -> list[str]:
    """Streams and threads are as asked for, or what was measured on the cores that the server may use."""
    cores = len(os.sched_getaffinity(0))
    measured = (
        r"\d+ streams? of \d+ threads?: .* images per second at batch 4"
        if cores > 1
        else "1 stream of 1 thread"
    )
    wanted = {
        (): measured + "|1 stream of .* which is fastest here",
        ("--no-measure",): f"1 stream of {cores} thread",
        ("--streams", "3", "--engine-threads", "1"): "3 streams of 1 thread$",
        ("--streams", "2", "--engine-threads", "2"): "2 streams of 2 threads$",
        ("--engine-threads", "1"): "1 stream of 1 thread$",
    }
    wrong = []
    runs = [(command, options, setup) for options, setup in wanted.items()]
    runs.append((["taskset", "-c", str(min(os.sched_getaffinity(0))), *command], (), "1 stream of 1 thread$"))
    for words, options, setup in runs:
        server = subprocess.Popen([*words, *options], stdout=subprocess.DEVNULL)
        try:
            serving_engine(server, port)
            found = json.loads(get(port, "/healthz"))["setup"]
            status, _ = asyncio.run(post(port, image))
            if not re.match(setup, found) or status != 200:
                wrong.append(f"{words[0]} {options}: {found!r}, {status}")
        finally:
            server.terminate()
            server.wait(20)
    return wrong


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return answer.read().decode()


def serving_engine(server: subprocess.Popen, port: int) -> str:
    """The engine's name, once the server answers; empty if it ends before."""
    for _ in range(300):
        try:
            return json.loads(get(port, "/healthz"))["engine"]
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    return ""


def main() -> int:
    program, bundles = sys.argv[1], Path(sys.argv[2])
    count, port = int(sys.argv[3]) if len(sys.argv) > 3 else 3000, free_port()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server inherits it
    command = [program, bundles / f"{MODEL}.bundle", "--port", port, "--timeout", TIMEOUT]
    command += ["--queue", 64, "--max-bytes", 1_000_000]
    admin = free_port()
    command = [*map(str, command), "--admin-port", str(admin)]
    server = subprocess.Popen(command)
    try:
        if not (engine := serving_engine(server, port)):
            print("it does not come up")
            return 1
        seen, wrong = asyncio.run(stress(port, bundles, count, engine))
        answered = sum(n for (_, code), n in seen.items() if code == 200)
        for where in (port, admin):
            if f'requests_total{{status="200"}} {answered}\n' not in get(where, "/metrics"):
                wrong.append("the metrics tell another number of answers")
        if 'request_seconds_bucket{le="0.1"}' not in get(port, "/metrics"):
            wrong.append("the metrics' bounds are not those of the buckets")
        image = (bundles / "images" / "00-baseline.jpg").read_bytes()
        wrong += manners(port, admin, image)
        wrong += expected(port, image) + slow_headers(port) + large_headers(port) + abandoned(port, image)
        wrong += second_on_the_port(command)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    wrong += ended_early(command) + set_ups(command, port, image)
    wrong += after_a_pause(command, port, image) + waited_for_a_thread(command, port, image)
    wrong += same_signal(command, port) + second_signal(command, port, image)
    print(*(f"{kind} {status}: {n}" for (kind, status), n in sorted(seen.items())), sep="\n")
    print("\n".join(wrong[:20]), f"{len(wrong)} wrong, exit code {code}")
    return int(bool(wrong) or code != 0 or not seen["valid", 200])


if __name__ == "__main__":
    sys.exit(main())
