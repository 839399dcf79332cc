"""`keras-openllama serve`: an HTTP server with the API of OpenAI, and a page."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from keras_openllama.cli import arguments as types
from keras_openllama.cli.chat_templates import add_chat_template, read_chat_template
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.model_options import add_model_options, load_model
from keras_openllama.cli.paths import require_adapters, require_preset
from keras_openllama.cli.process import PROGRAM, choose_backend

API_KEY_VARIABLE = "KERAS_OPENLLAMA_API_KEY"
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

DESCRIPTION = """\
Serve a model over HTTP: a page for the browser, and the API of OpenAI.

    http://127.0.0.1:8000/                      a page to chat and to continue texts
    http://127.0.0.1:8000/v1/chat/completions   chats, if there is a chat template
    http://127.0.0.1:8000/v1/completions        texts
    http://127.0.0.1:8000/v1/models             the names of the model, by its adapters
    http://127.0.0.1:8000/metrics               metrics for Prometheus

Several requests are computed at once; others wait in a queue. Ctrl-C or SIGTERM ends
the server after the requests that run.
"""

EXAMPLES = """\
examples:
  Serve the embedded model, and ask it with curl:
    %(prog)s --preset nano
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "The sea", "max_tokens": 32, "temperature": 0}'

  With the Python client of OpenAI:
    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="nano", prompt="The sea")

  A model that was fine-tuned on chats, in bfloat16, for the local network:
    KERAS_OPENLLAMA_API_KEY=secret %(prog)s --preset runs/my_chat_model \\
        --dtype bfloat16 --host 0.0.0.0

  One model with several LoRA adapters. Requests choose "3b_v2", "3b_v2+law" or
  "3b_v2+poems" as their model:
    %(prog)s --preset 3b_v2 --adapters law=runs/law/adapters \\
        --adapters poems=runs/poems/adapters

  Chats with a model that has no chat template of its own:
    echo '{"user": "Q: {content}\\n", "assistant": "A: {content}\\n"}' > template.json
    %(prog)s --preset 3b_v2 --chat-template template.json
"""


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    model = parser.add_argument_group("the model")
    add_model_options(model, named_adapters=True)
    add_chat_template(model)
    model.add_argument(
        "--name",
        type=types.not_empty,
        help="name of the model for clients (default: the last part of --preset)",
    )
    _add_network(parser.add_argument_group("the network"))
    _add_limits(parser.add_argument_group("limits"))
    return parser.parse_args(arguments)


def _add_network(group):
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 for all interfaces (default: %(default)s, "
        "which only this machine reaches)",
    )
    group.add_argument(
        "--port",
        type=types.port,
        default=8000,
        metavar="N",
        help="port; 0 for a free one (default: %(default)s)",
    )
    group.add_argument(
        "--api-key",
        action="append",
        type=types.not_empty,
        metavar="KEY",
        help="key that clients must send; may be given several times. Other users of "
        "the machine can see flags: prefer the environment variable "
        f"{API_KEY_VARIABLE}",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        type=types.not_empty,
        metavar="HOST",
        help="name by which clients may call the server; may be given several times; * "
        "for all (default: the names of the loopback interface, or all with --host)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        type=types.not_empty,
        metavar="URL",
        help="origin of a site whose pages may use the server, such as "
        "https://example.org; may be given several times",
    )
    group.add_argument(
        "--no-access-log", action="store_true", help="do not log each request"
    )


def _add_limits(group):
    group.add_argument(
        "--slots",
        type=types.positive_int,
        default=8,
        metavar="N",
        help="number of texts that are computed at once; each needs memory for its KV "
        "cache (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        type=types.positive_int,
        metavar="N",
        help="maximum number of tokens of a prompt and its text (default: the context "
        "of the model)",
    )
    group.add_argument(
        "--queue",
        type=types.non_negative_int,
        default=64,
        metavar="N",
        help="number of texts that wait for a slot, after which the status is 429 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--time-limit",
        type=types.positive_number,
        default=600.0,
        metavar="SECONDS",
        help="time that a request may take, in the queue and out of it (default: 600)",
    )
    group.add_argument(
        "--drain-time",
        type=types.positive_int,
        default=30,
        metavar="SECONDS",
        help="time for the requests that run when the server ends (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--max-body",
        type=types.number_of_bytes,
        default=4_000_000,
        metavar="BYTES",
        help="maximum size of a request, such as 4M (default: 4M)",
    )


@command("serve", extra="serve")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    keys = api_keys(options.api_key, os.environ)
    template = options.chat_template and read_chat_template(options.chat_template)
    require_preset("--preset", options.preset, options.revision)
    adapters = adapters_by_name(options.adapters)
    for path in adapters.values():
        require_adapters("--adapters", path)
    choose_backend(options.backend)
    # Before the model is loaded, which takes time.
    from keras_openllama.serving.server import open_socket

    with open_socket(options.host, options.port) as opened:
        _serve(options, keys, template, adapters, opened)


def _serve(options, keys, template, adapters, opened):
    lm = load_model(options)
    if template:
        lm.preprocessor.chat_template = template
    from keras_openllama.generation.continuous_batching.engine import Engine
    from keras_openllama.generation.continuous_batching.named_adapters import (
        NamedAdapters,
    )
    from keras_openllama.serving.app import make_app
    from keras_openllama.serving.served_model import ServedModel
    from keras_openllama.serving.server import Server, address_of, warm_up
    from keras_openllama.serving.settings import ServerSettings

    for_all = adapters.pop(None, None)
    if for_all:
        lm.load_adapters(for_all)
    named = NamedAdapters(lm) if adapters else None
    for name, path in adapters.items():
        named.load(name, path)
    engine = Engine(
        lm,
        num_slots=options.slots,
        context=options.context,
        max_queue=options.queue,
        adapters=named,
    )
    model = ServedModel(lm, engine, options.name or model_name(options.preset))
    settings = ServerSettings(
        allowed_hosts=allowed_hosts(options),
        api_keys=keys,
        cors_origins=tuple(options.cors_origin or ()),
        max_body_bytes=options.max_body,
        time_limit=options.time_limit,
    )
    if options.host not in LOOPBACK_HOSTS and not keys:
        _note(
            f"everybody who reaches {options.host} can use the model. Set "
            f"{API_KEY_VARIABLE} to require a key."
        )
    warm_up(engine, options.slots)
    address = address_of(opened)

    def on_ready():
        names = ", ".join(model.names)
        _note(f"{names} served at {address} (the API: {address}/v1)")

    Server(
        make_app(model, settings),
        engine,
        opened,
        drain_time=options.drain_time,
        access_log=not options.no_access_log,
        on_ready=on_ready,
    ).serve_until_signal()


def _note(text):
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def adapters_by_name(values: Sequence[str] | None) -> dict[str | None, str]:
    """Returns the directories of `--adapters` by name.

    Args:
        values: Values of the flag. `NAME=DIR` has a name, `./NAME=DIR` is a directory.

    Returns:
        The directories; under `None` the one for all requests.

    Raises:
        ValueError: If a name occurs twice, or a directory without one is not the only
            value.

    Example:
        >>> adapters_by_name(["law=runs/law", "poems=hf://user/poems"])
        {'law': 'runs/law', 'poems': 'hf://user/poems'}
        >>> adapters_by_name(["runs/law"])
        {None: 'runs/law'}
    """
    adapters = {}
    for value in values or ():
        match = re.fullmatch(r"([\w.-]+)=(.+)", value)
        name, path = match.groups() if match else (None, value)
        if name in adapters:
            raise ValueError(
                "--adapters must have a different name for each directory, such as "
                f"--adapters law=runs/law/adapters. Received: {value}"
            )
        adapters[name] = path
    if None in adapters and len(adapters) > 1:
        raise ValueError(
            "--adapters without a name is for all requests, and cannot be combined "
            f"with others. Received: {adapters[None]}"
        )
    return adapters


def api_keys(flags: Sequence[str] | None, environment: Mapping[str, str]) -> tuple:
    """Returns the API keys of the flags and of the environment.

    Raises:
        ValueError: If a key has characters that a header cannot have.

    Example:
        >>> api_keys(["a"], {API_KEY_VARIABLE: "b"})
        ('a', 'b')
    """
    keys = list(flags or ())
    if environment.get(API_KEY_VARIABLE):
        keys.append(environment[API_KEY_VARIABLE])
    for key in keys:
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise ValueError(
                f"--api-key and {API_KEY_VARIABLE} must be printable ASCII characters "
                "without spaces around them."
            )
    return tuple(keys)


def allowed_hosts(options: argparse.Namespace) -> tuple[str, ...]:
    """Returns the hosts by which clients may call the server.

    Example:
        >>> allowed_hosts(parse_arguments(["--allowed-host", "a.example"], "serve"))
        ('localhost', '127.0.0.1', '::1', 'a.example')
    """
    given = tuple(options.allowed_host or ())
    if options.host in LOOPBACK_HOSTS:
        return (*LOOPBACK_HOSTS, *given)
    return given or ("*",)


def model_name(preset: str) -> str:
    """Returns the name of a model for clients.

    Example:
        >>> model_name("nano"), model_name("hf://user/repo"), model_name("runs/mine/")
        ('nano', 'repo', 'mine')
    """
    path = Path(preset.removeprefix("hf://"))
    return path.name.strip(".") or path.resolve().name
