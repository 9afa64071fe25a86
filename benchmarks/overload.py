"""Measures a server that is asked for more than it can answer, by an open loop of clients that give up.

    python benchmarks/overload.py PORT SECONDS IMAGE [IMAGE ...]      # of a server that runs already

`benchmarks/cpp.py --only overload` starts zoo-serve, and ends it under load.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

CLIENT_SECONDS = 2.0
"""Time after which a client hangs up; it tells the server so."""

CONNECTIONS = 16
"""Connections of the closed loop that measures the capacity."""


@dataclass
class Answers:
    """Seconds until each answer of 200, and the number of other ends."""

    good: list[float] = field(default_factory=list)
    refused: int = 0
    given_up: int = 0

    def p99(self) -> float:
        return float(np.percentile(self.good, 99)) if self.good else float("nan")


async def _ask(port: int, image: bytes, answers: Answers) -> bool:
    """Ask once. Returns False if the server refused."""

    begin = time.monotonic()

    async def exchange() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = (
                f"X-Request-Timeout-Ms: {int(1000 * CLIENT_SECONDS)}\r\nContent-Length: {len(image)}\r\n\r\n"
            )
            writer.write(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\n{head}".encode() + image)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()

    try:
        answer = await asyncio.wait_for(exchange(), CLIENT_SECONDS)
    except (TimeoutError, asyncio.TimeoutError, OSError):
        answers.given_up += 1
        return True
    if answer.startswith(b"HTTP/1.1 200 "):
        answers.good.append(time.monotonic() - begin)
        return True
    answers.refused += 1
    return False


async def capacity(port: int, images: Sequence[bytes], seconds: float) -> float:
    """Answers a second with CONNECTIONS clients, each of which asks again when it is answered.

    One that is refused waits for a second first, as Retry-After says. Clients that do not would take the CPU.
    """
    answers, end = Answers(), time.monotonic() + seconds

    async def client(index: int) -> None:
        while time.monotonic() < end:
            if not await _ask(port, images[index % len(images)], answers):
                await asyncio.sleep(1)
            index += CONNECTIONS

    await asyncio.gather(*map(client, range(CONNECTIONS)))
    return len(answers.good) / seconds


async def overload(port: int, images: Sequence[bytes], rate: float, seconds: float) -> Answers:
    """Requests at a fixed rate, whatever becomes of them, as many independent clients make them."""
    answers, begin, asked = Answers(), time.monotonic(), []
    for index in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begin + index / rate - time.monotonic()))
        asked.append(asyncio.create_task(_ask(port, images[index % len(images)], answers)))
    await asyncio.gather(*asked)
    return answers


def main() -> None:
    port, seconds = int(sys.argv[1]), float(sys.argv[2])
    images = [Path(name).read_bytes() for name in sys.argv[3:]]
    asyncio.run(capacity(port, images, 2))  # warms up
    most = asyncio.run(capacity(port, images, seconds))
    found = asyncio.run(overload(port, images, 2 * most, seconds))
    print(
        f"{most:.1f} a second; asked for twice that: {len(found.good) / seconds / most:.2f} of it answered in time"
    )


if __name__ == "__main__":
    main()
