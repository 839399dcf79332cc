"""Many streams at once, some of whose clients leave, and the end of the server."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys

import httpx2
import pytest
from running_server import running_server

pytestmark = pytest.mark.backend_free

PROMPTS = ("The sea", "Call me", "In the beginning God", "It was a dark night and")


async def stream(client, url, body, leave_after=None, pause=0.0):
    """Returns the text of a stream; `None` if the client leaves before its end."""
    text, chunks = "", 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                data = json.loads(line.removeprefix("data: "))
                assert "error" not in data, data
                text += data["choices"][0]["text"]
                chunks += 1
            if leave_after is not None and chunks >= leave_after:
                return None
            if pause:
                await asyncio.sleep(pause)
    raise AssertionError("The stream ended without [DONE].")


def bodies(number):
    numbers = random.Random(0)
    for i in range(number):
        yield {
            "prompt": PROMPTS[i % len(PROMPTS)],
            "max_tokens": numbers.randint(1, 24),
            "temperature": numbers.choice([0, 1]),
            "seed": i % 5,
            "stream": True,
        }


async def check_load(url, number):
    """Sends requests one by one, then all at once while a third of clients leave."""
    numbers = random.Random(1)
    requests = list(bodies(number))
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=240, limits=limits) as client:
        alone = {}
        for body in requests:
            key = json.dumps(body)
            if key not in alone:
                alone[key] = await stream(client, url, body)
        tasks = []
        for body in requests:
            leaves = numbers.random() < 1 / 3
            leave_after = numbers.randint(0, body["max_tokens"]) if leaves else None
            pause = 0.02 if numbers.random() < 0.2 else 0  # A slow reader.
            tasks.append(stream(client, url, body, leave_after, pause))
        texts = await asyncio.gather(*tasks)
    completed = 0
    for body, text in zip(requests, texts, strict=True):
        if text is not None:
            completed += 1
            assert text == alone[json.dumps(body)]
    assert number / 2 < completed < number


def check_streams(server, number):
    errors = server.engine.stats.finished["error"]
    asyncio.run(check_load(server.url, number))
    server.wait_until_idle()
    stats = server.engine.stats
    assert stats.submitted == sum(stats.finished.values())
    assert stats.finished["error"] == errors


def test_32_streams_have_the_text_that_they_have_alone(server):
    check_streams(server, 32)


@pytest.mark.slow
def test_200_streams_have_the_text_that_they_have_alone(nano):
    with running_server(nano, num_slots=8, max_queue=200) as server:
        check_streams(server, 200)


def test_sigterm_completes_the_requests_that_run():
    command = [sys.executable, "-m", "keras_openllama", "serve", "--preset", "nano"]
    options = ["--port", "0", "--slots", "1", "--context", "256"]
    process = subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "jax"},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "served at" in line:
                break
        log = "".join(lines)
        (url,) = re.findall(r"served at (http://\S+)", log) or [pytest.fail(log)]
        body = {
            "prompt": "The sea",
            "max_tokens": 250,
            "temperature": 0,
            "logit_bias": {"2": -100},
            "stream": True,
        }
        with httpx2.stream(
            "POST", f"{url}/v1/completions", json=body, timeout=120
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        process.communicate(timeout=60)
        assert process.returncode == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")
    finally:
        process.kill()
        process.communicate()
