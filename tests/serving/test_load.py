"""Many clients at once, some of whom leave, and the end of the server."""

import asyncio
import itertools
import json
import random
import signal
import socket

import httpx2
import pytest
from server_process import server_process

pytestmark = pytest.mark.backend_free

PROMPTS = ("The sea", "Call me", "In the beginning God", "It was a dark night and " * 9)
# With few tokens to choose from, rounding does not choose between two unlikely ones: it
# depends on how many texts are computed at once.
SAMPLED = {"temperature": 1, "top_k": 10}
# Requests that the server must refuse, and the status of the response.
REFUSED = (
    (b"{", 400),
    (b"[]", 400),
    (b'{"prompt": "\xff"}', 400),
    (b'{"prompt": 1}', 400),
    (b'{"prompt": "The", "temperature": -1}', 400),
    (b'{"prompt": "The", "temprature": 1}', 400),
    (b'{"prompt": "The", "model": "other"}', 404),
    (json.dumps({"prompt": "The sea " * 200}).encode(), 400),
    (json.dumps({"prompt": "The sea " * 20_000}).encode(), 413),
)


async def stream(client, url, body, leave_after=None, pause=0.0, stall=0.0):
    """Returns the text of a stream; `None` if the client leaves before its end.

    Args:
        leave_after: number of events.
        pause: seconds after each event.
        stall: seconds after the first event.
    """
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
                await asyncio.sleep(pause + stall)
                stall = 0
            if leave_after is not None and chunks >= leave_after:
                return None
    raise AssertionError("The stream ended without [DONE].")


async def is_refused(client, url, content, status):
    """Sends a request that must be refused."""
    response = await client.post(
        f"{url}/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def make_client():
    """A client for any number of requests, whose sockets have small buffers.

    So the server notices that a client does not read.
    """
    transport = httpx2.AsyncHTTPTransport(
        limits=httpx2.Limits(max_connections=None),
        socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)],
    )
    return httpx2.AsyncClient(timeout=240, transport=transport)


def bodies():
    """Requests, all different."""
    kinds = [{"temperature": 0}, *({**SAMPLED, "seed": seed} for seed in range(4))]
    lengths = {"max_tokens": 1}, {"max_tokens": 7}, {"max_tokens": 24}
    for prompt, kind, length in itertools.product(PROMPTS, kinds, lengths):
        yield {"prompt": prompt, "stream": True, **kind, **length}
    # The events of these fill the buffers between the server and its client.
    for prompt in PROMPTS[:2]:
        long = {"max_tokens": 200, "min_tokens": 200, "logprobs": 20}
        yield {"prompt": prompt, "stream": True, "temperature": 0, **long}


async def texts_alone(url, requests):
    """The requests, and the text of each, sent one after the other."""
    async with make_client() as client:
        return [(body, await stream(client, url, body)) for body in requests]


async def send_wave(url, alone, number, seed):
    """Sends many requests at once; a third of the clients leave, some are slow."""
    numbers = random.Random(seed)
    requests = numbers.choices(alone, k=number)
    async with make_client() as client:
        tasks = []
        for body, _ in requests:
            leaves = numbers.random() < 1 / 3
            leave_after = numbers.randint(0, body["max_tokens"]) if leaves else None
            pause, stall = numbers.choices(
                [(0, 0), (0.02, 0), (0, 2)], weights=[8, 1, 1]
            )[0]
            tasks.append(stream(client, url, body, leave_after, pause, stall))
        refused = [is_refused(client, url, *pair) for pair in REFUSED * (number // 40)]
        numbers.shuffle(refused)
        texts = await asyncio.gather(*tasks, *refused)
    completed = 0
    for (body, expected), text in zip(requests, texts, strict=False):
        if text is not None:
            completed += 1
            assert text == expected, body
    assert number / 2 < completed < number


def test_32_streams_have_the_text_that_they_have_alone(server):
    errors = server.engine.stats.finished["error"]
    alone = asyncio.run(texts_alone(server.url, list(bodies())[:60:5]))
    asyncio.run(send_wave(server.url, alone, 32, seed=1))
    server.wait_until_idle()
    stats = server.engine.stats
    assert stats.submitted == sum(stats.finished.values())
    assert stats.finished["error"] == errors


async def fill_slots(server, number):
    """Sends as many requests as there are slots: all of them are computed at once."""
    body = {"prompt": "The", "max_tokens": 250, "min_tokens": 250, "stream": True}
    async with make_client() as client:
        tasks = [
            asyncio.create_task(stream(client, server.url, body, leave_after=240))
            for _ in range(number)
        ]
        while server.texts != (number, 0):
            assert not any(task.done() for task in tasks)
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)


@pytest.mark.slow
def test_waves_of_200_clients_lose_no_slot_and_no_memory():
    slots, clients = 8, 200
    options = {"--slots": slots, "--queue": clients, "--max-body": 100_000}
    resident = []
    with server_process(*itertools.chain(*options.items())) as server:
        alone = asyncio.run(texts_alone(server.url, bodies()))
        for seed in range(5):
            asyncio.run(send_wave(server.url, alone, clients, seed))
            server.wait_until_idle()
            resident.append(server.resident_bytes)
        asyncio.run(fill_slots(server, slots))
        server.wait_until_idle()
    # The first waves compile programs. The least that a request could leave behind, the
    # keys and values of its prompt, has 512 KiB.
    assert resident[-1] - resident[-3] < 2 * clients * 2**16, resident


def test_sigterm_completes_the_requests_that_run():
    body = {
        "prompt": "The sea",
        "max_tokens": 250,
        "temperature": 0,
        "logit_bias": {"2": -100},
        "stream": True,
    }
    with server_process("--slots", 1, "--context", 256) as server:
        with httpx2.stream(
            "POST", f"{server.url}/v1/completions", json=body, timeout=120
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{server.url}/health")
