"""What a model is fine-tuned on, as rows of tokens: texts, pairs, chats.

Everything becomes exchanges: a prompt, of which nothing is learned, and a response. A
plain text is a response without a prompt.
"""

import dataclasses
import warnings

import numpy as np

from keras_openllama.text.inputs import Pair, Texts
from keras_openllama.text.token_arrays import as_arrays
from keras_openllama.utils.bin_packing import best_fit_decreasing

_TEMPLATE = '{"user": "USER: {content}\\n", "assistant": "ASSISTANT: {content}"}'


# ----- Exchanges


def exchanges_of(data, template=None):
    """Texts, pairs or chats as lists of exchanges.

    Args:
        data: `inputs.Texts` or `inputs.Examples`.
        template: dict of strings, see `OpenLlamaCausalLMPreprocessor`.

    Returns:
        List with, for each example, a list of `(prompt, response)`.

    Raises:
        ValueError: for a malformed chat.
    """
    if isinstance(data, Texts):
        return [[("", text)] for text in data.texts]
    return [
        [(example.prompt, example.response)]
        if isinstance(example, Pair)
        else chat_exchanges(example.messages, template, example.name)
        for example in data.examples
    ]


def check_template(template):
    """Raises a `ValueError` unless it is `None` or a template of chats."""
    if template is None:
        return
    if not isinstance(template, dict) or "assistant" not in template:
        raise ValueError(
            '`chat_template` is a dict of roles, "assistant" among them, such as '
            f"{_TEMPLATE}. Received: {template!r}"
        )
    for role, text in template.items():
        if not isinstance(text, str) or text.count("{content}") != 1:
            raise ValueError(
                f'`chat_template["{role}"]` is a text with {{content}} once. '
                f"Received: {text!r}"
            )


def chat_exchanges(messages, template, name="messages"):
    """The exchanges of a chat, the last of them perhaps still without a response.

    Args:
        messages: list of `{"role": …, "content": …}`.
        template: dict of strings by role, each with `{content}` once. What stands
            before the content of the assistant belongs to the prompt, what stands
            after it to the response.

    Returns:
        List of `(prompt, response)`; no response is `""`.

    Raises:
        ValueError: for a role that the template has not, or a malformed message.
    """
    if template is None:
        raise ValueError(
            "Chats need a template: set `preprocessor.chat_template`, such as "
            f"{_TEMPLATE}."
        )
    before, after = template["assistant"].split("{content}")
    exchanges, prompt = [], ""
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(
                f'`{name}[{i}]` is a dict of "role" and "content". Received: '
                f"{message!r}"
            )
        role, content = message["role"], message["content"]
        if role not in template or not isinstance(content, str) or not content:
            raise ValueError(
                f"`{name}[{i}]` has a role of {sorted(template)} and a content that is "
                f"not empty. Received: {message!r}"
            )
        if role == "assistant":
            exchanges.append((prompt + before, content + after))
            prompt = ""
        else:
            prompt += template[role].replace("{content}", content)
    if prompt:
        exchanges.append((prompt + before, ""))
    return exchanges


# ----- Rows


def tokenize(examples, tokenizer, length, add_start_token=True, add_end_token=True):
    """The rows of examples.

    A prompt has the tokens that `generate` gives it, and a response those that follow;
    each begins anew behind the `</s>` of the response before it.

    Args:
        examples: list of lists of exchanges, see `exchanges_of`.
        tokenizer: `OpenLlamaTokenizer`.
        length: int, predictions of a row.
        add_start_token, add_end_token: bools, `<s>` before each example, `</s>` after
            each response.

    Returns:
        `TrainingExamples`.

    Raises:
        ValueError: if the response to a prompt is missing, or has no tokens.
    """
    exchanges = [exchange for example in examples for exchange in example]
    pairs = iter(_pairs_of_ids(exchanges, tokenizer))
    start = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    rows = TrainingExamples([], [], length)
    for number, example in enumerate(examples):
        ids, learned = list(start), [False] * len(start)
        for prompt, response in example:
            prompt_ids, response_ids = next(pairs)
            if prompt and not response_ids:
                raise ValueError(
                    f"Example {number} has a prompt without a response, or one that "
                    f"has no tokens: {prompt[-80:]!r}"
                )
            room = length + 1 - len(ids) - len(prompt_ids)
            part = response, prompt_ids, response_ids, room
            rows.bytes += _kept_bytes(*part, tokenizer)
            ids += prompt_ids + response_ids + end
            learned += [False] * len(prompt_ids)
            learned += [bool(response_ids)] * len(response_ids + end)
        rows.add(ids, learned)
    return rows


def _kept_bytes(response, prompt_ids, response_ids, room, tokenizer):
    """Bytes of a response that are in its first `room` tokens."""
    if len(response_ids) <= room:
        return len(response.encode())
    if room <= 0:
        return 0
    kept = tokenizer.detokenize(prompt_ids + response_ids[:room])
    return len(kept.encode()) - len(tokenizer.detokenize(prompt_ids).encode())


def chat_prompt_ids(exchanges, tokenizer, add_start_token=True, add_end_token=True):
    """Tokens of a chat that waits for a reply.

    Args:
        exchanges: list, see `chat_exchanges`; the last one has no response.
        tokenizer, add_start_token, add_end_token: see `tokenize`.

    Returns:
        List of ints.

    Raises:
        ValueError: if the chat does not wait for a reply.
    """
    if not exchanges or exchanges[-1][1]:
        raise ValueError(
            "A chat that is to be continued ends with a message that is not the "
            f"assistant's. Received: {exchanges!r:.200}"
        )
    ids = [tokenizer.start_token_id] if add_start_token else []
    end = [tokenizer.end_token_id] if add_end_token else []
    for prompt_ids, response_ids in _pairs_of_ids(exchanges, tokenizer):
        ids += prompt_ids + response_ids + (end if response_ids else [])
    return ids


def _pairs_of_ids(exchanges, tokenizer):
    """`(ids of the prompt, ids of the response)` of each exchange."""
    options = dict(add_bos=False, add_eos=False)
    prompts = tokenizer.tokenize([prompt for prompt, _ in exchanges], **options)
    wholes = tokenizer.tokenize([p + r for p, r in exchanges], **options)
    pairs = []
    for (_, response), prompt, whole in zip(exchanges, prompts, wholes, strict=True):
        follows = whole[: len(prompt)] == prompt
        # Else a token reaches from the prompt into the response, and `generate` never
        # sees that.
        rest = (
            whole[len(prompt) :]
            if follows
            else tokenizer.tokenize_continuation(response)
        )
        pairs.append((prompt, rest))
    return pairs


@dataclasses.dataclass
class TrainingExamples:
    """Tokens of examples, and which of them are learned.

    Attributes:
        ids: list of lists of ints.
        learned: list of lists of bools, as long: whether a token is to be predicted.
        length: int, predictions a row makes at most: one token less than it has.
        bytes: int, UTF-8 bytes of the text that is learned, of what is not cut.
        cut: int, examples that were too long and lost their end.
        lost: int, examples of which nothing is learned: empty texts, and those whose
            prompt fills the row.
        longest: int, tokens of the longest, before it was cut.
    """

    ids: list
    learned: list
    length: int
    bytes: int = 0
    cut: int = 0
    lost: int = 0
    longest: int = 0

    def add(self, ids, learned):
        """Adds an example, cut to what a row holds."""
        room = self.length + 1
        self.longest = max(self.longest, len(ids))
        self.cut += len(ids) > room
        self.lost += not any(learned[1:room])
        self.ids.append(ids[:room])
        self.learned.append(learned[:room])

    def filled(self):
        """A row for each example: `(x, y, weights)` of NumPy arrays, as `fit` has it.

        `x` is a dict of int32 `"token_ids"` and a `"padding_mask"`.
        """
        ids, mask = as_arrays(self.ids, self.length + 1).values()
        weights, _ = as_arrays(self.learned, self.length + 1).values()
        x = {"token_ids": ids[:, :-1], "padding_mask": mask[:, :-1]}
        return x, ids[:, 1:], weights[:, 1:].astype("float32")

    def packed(self):
        """The same, several examples in a row; the mask numbers them, 1, 2, …

        Each token sees its own example only, and none predicts the next one's first.
        """
        sizes = np.array([max(0, len(ids) - 1) for ids in self.ids])
        bins = best_fit_decreasing(sizes, self.length)
        shape = int(bins.max()) + 1, self.length
        ids, numbers, targets = (np.zeros(shape, "int32") for _ in range(3))
        weights = np.zeros(shape, "float32")
        ends, counts = np.zeros((2, len(ids)), "int64")
        for example, (row, size) in enumerate(zip(bins, sizes, strict=True)):
            here = np.s_[row, ends[row] : ends[row] + size]
            tokens = self.ids[example]
            ids[here], targets[here] = tokens[:size], tokens[1:]
            weights[here] = self.learned[example][1:]
            ends[row], counts[row] = ends[row] + size, counts[row] + 1
            numbers[here] = counts[row]
        return {"token_ids": ids, "padding_mask": numbers}, targets, weights

    def warn(self):
        """Warns of what was cut, and of what teaches nothing, with numbers."""
        total = len(self.ids)
        if self.cut:
            warnings.warn(
                f"{self.cut} of {total} examples were cut to sequence_length="
                f"{self.length} and lost their end. The longest has {self.longest} "
                "tokens; set `preprocessor.sequence_length`.",
                stacklevel=2,
            )
        if self.lost:
            warnings.warn(
                f"{self.lost} of {total} examples teach nothing: they are empty, or "
                "nothing of their response was left when they were cut.",
                stacklevel=2,
            )
