"""`keras-openllama chat`: a chat with a model in the terminal."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from keras_openllama.cli import arguments as types
from keras_openllama.cli.chat_templates import add_chat_template, read_chat_template
from keras_openllama.cli.command import CommandParser, command
from keras_openllama.cli.model_options import add_model_options, load_model
from keras_openllama.cli.paths import require_adapters, require_preset
from keras_openllama.cli.process import choose_backend

if TYPE_CHECKING:
    from keras_openllama.generation.continuous_batching.engine import Engine
    from keras_openllama.generation.sampling.config import SamplingConfig
    from keras_openllama.models.causal_lm import OpenLlamaCausalLM

DEFAULT_MAX_NEW_TOKENS = 512
PROMPT = "> "

DESCRIPTION = """\
Chat with a model in the terminal. Replies are printed as they are generated.

The model must have a chat template, or --chat-template must name one. The models of
OpenLLaMA continue texts, and are not trained to chat: fine-tune one on chats first.

In the chat:
  /reset     begin a new chat
  /undo      forget the last message and its reply
  /help      list these commands
  /exit      leave; so does the end of the input (Ctrl-D)
  Ctrl-C     ends a reply
"""

EXAMPLES = """\
examples:
  A model that was fine-tuned on chats:
    %(prog)s --preset runs/my_chat_model

  The embedded model, with a template by role; it continues in the style of its books:
    echo '{"user": "Q: {content}\\n", "assistant": "A: {content}\\n"}' > template.json
    %(prog)s --chat-template template.json --stop $'\\n'

  A system message, and other sampling:
    %(prog)s --preset runs/my_chat_model --system "Answer in one sentence." \\
        --temperature 0.2 --top-p 0.9
"""
HELP = DESCRIPTION.partition("In the chat:\n")[2].rstrip()


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Parses the arguments of the command."""
    parser = CommandParser(prog, description=DESCRIPTION, epilog=EXAMPLES)
    model = parser.add_argument_group("the model")
    add_model_options(model)
    add_chat_template(model)
    replies = parser.add_argument_group("the replies")
    replies.add_argument("--system", metavar="TEXT", help="system message of each chat")
    replies.add_argument(
        "--max-new-tokens",
        type=types.positive_int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help="maximum number of tokens of a reply (default: %(default)s)",
    )
    replies.add_argument(
        "--stop",
        type=types.not_empty,
        action="append",
        metavar="TEXT",
        help="end a reply before this string; may be given several times",
    )
    replies.add_argument(
        "--temperature",
        type=types.temperature,
        default=0.7,
        metavar="T",
        help="temperature; 0 is greedy decoding (default: %(default)s)",
    )
    replies.add_argument(
        "--top-k",
        type=types.positive_int,
        metavar="K",
        help="sample from the K most likely tokens (default: all)",
    )
    replies.add_argument(
        "--top-p",
        type=types.probability,
        default=0.95,
        metavar="P",
        help="sample from the most likely tokens whose total probability is P "
        "(default: %(default)s)",
    )
    replies.add_argument(
        "--seed",
        type=types.sampler_seed,
        metavar="N",
        help="random seed, for reproducible chats",
    )
    return parser.parse_args(arguments)


@command("chat")
def main(arguments: list[str], prog: str) -> int | None:
    """Runs the command."""
    options = parse_arguments(arguments, prog)
    template = options.chat_template and read_chat_template(options.chat_template)
    require_preset("--preset", options.preset, options.revision)
    require_adapters("--adapters", options.adapters)
    choose_backend(options.backend)
    lm = load_model(options)
    if template:
        lm.preprocessor.chat_template = template
    if lm.preprocessor.chat_template is None:
        raise ValueError(
            f"{options.preset} has no chat template: add --chat-template FILE, or use "
            "`generate` to continue a text."
        )
    from keras_openllama.generation.continuous_batching.engine import Engine
    from keras_openllama.generation.sampling.config import SamplingConfig

    sampling = SamplingConfig(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    with Engine(lm, num_slots=1) as engine:
        chat = Chat(
            lm,
            engine,
            sampling,
            options.max_new_tokens,
            stops=tuple(options.stop or ()),
            system=options.system,
        )
        run_chat(chat, read_line)


def read_line() -> str | None:
    """Returns the next line of the input; `None` at its end."""
    is_terminal = sys.stdin.isatty()
    if is_terminal and importlib.util.find_spec("readline"):
        import readline  # noqa: F401  Lets `input` edit lines and remember them.
    try:
        return input(PROMPT if is_terminal else "")
    except EOFError:
        if is_terminal:
            print()
        return None


class Chat:
    """The messages of a chat, and the model that replies.

    Args:
        lm: A model with a chat template.
        engine: Its engine.
        sampling: How tokens are chosen.
        max_new_tokens: Maximum number of tokens of a reply.
        stops: Strings that end a reply.
        system: Text of the system message, or `None`.

    Attributes:
        messages: Dicts of `"role"` and `"content"`.
    """

    def __init__(
        self,
        lm: OpenLlamaCausalLM,
        engine: Engine,
        sampling: SamplingConfig,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        stops: tuple[str, ...] = (),
        system: str | None = None,
    ) -> None:
        self._lm = lm
        self._engine = engine
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stops = stops
        self._system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Begins a new chat."""
        self.messages = list(self._system)

    def undo(self) -> None:
        """Removes the last message of the user, and what follows it."""
        roles = [message["role"] for message in self.messages]
        if "user" in roles:
            last = len(roles) - 1 - roles[::-1].index("user")
            del self.messages[last:]

    def reply(self, text: str) -> Iterator[str]:
        """Adds a message of the user, and yields the pieces of the reply to it.

        What was yielded becomes a message, also if the iterator is closed early.

        Raises:
            ValueError: If the template cannot render the chat, or it is too long. The
                message is not added then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        preprocessor = self._lm.preprocessor
        prompt_ids = preprocessor.chat_ids(messages, parse_special=False)
        room = self._engine.context - len(prompt_ids)
        if room < 1:
            raise ValueError(
                f"The chat has {len(prompt_ids)} tokens, and the context of the model "
                f"is {self._engine.context}. Begin a new one with /reset."
            )
        from keras_openllama.generation.continuous_batching.engine import EngineRequest
        from keras_openllama.serving.choices import ChoiceDecoder

        end_ids = self._lm.end_token_ids
        request = EngineRequest(
            prompt_ids, min(room, self._max_new_tokens), self._sampling, end_ids
        )
        tokenizer = preprocessor.tokenizer
        decoder = ChoiceDecoder(tokenizer, prompt_ids, self._stops, end_ids)
        events = self._engine.stream(request)
        self.messages = messages
        pieces = []
        try:
            for event in events:
                piece = decoder.push(event)
                if piece and piece.text:
                    pieces.append(piece.text)
                    yield piece.text
                if decoder.finished:
                    break
        finally:
            events.close()
            content = "".join(pieces)
            self.messages.append({"role": "assistant", "content": content})


def run_chat(chat: Chat, read: Callable[[], str | None]) -> None:
    """Reads messages and prints replies until the end of the input.

    Args:
        chat: The chat.
        read: Returns the next line; `None` at the end of the input.
    """
    commands = {"/reset": chat.reset, "/undo": chat.undo, "/help": _print_help}
    while (line := read()) is not None and line.strip() != "/exit":
        text = line.strip()
        if text in commands:
            commands[text]()
        elif text.startswith("/"):
            print(f"Unknown command: {text}", file=sys.stderr)
            _print_help()
        elif text:
            _print_reply(chat, text)


def _print_reply(chat, text):
    try:
        for piece in chat.reply(text):
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)


def _print_help():
    print(HELP, file=sys.stderr)
