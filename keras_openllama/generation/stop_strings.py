"""The text of sequences while their tokens arrive, up to a stop string."""

# Heuristic: tokens between two checks for a stop string; at most so many are wasted.
TOKENS_BETWEEN_STOP_CHECKS = 16


def decode_until_stopped(rows, new_tokens):
    """Feeds new tokens to sequences until all have met a stop string, or none come.

    Args:
        rows: list of `StopStringDecoder`, or of objects with the same `push`,
            `flush` and `stopped`.
        new_tokens: iterator that `generate.generate_tokens` returns.

    Yields:
        `None`, whenever the sequences have grown, and at their end.
    """
    for new in new_tokens:
        for row, ids in zip(rows, new, strict=True):
            row.push(ids)
        yield
        if all(row.stopped for row in rows):
            break
    for row in rows:
        row.flush()
    yield


def normalize_stop_strings(stop):
    """`stop` as a tuple of strings.

    Raises:
        ValueError: for anything but `None`, a string, or a list of strings, or for an
            empty string.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(
            "`stop` must be a string or a list of strings, none of them empty. "
            f"Received: stop={stop!r}"
        )
    return stops


class StopStringDecoder:
    """Turns the new tokens of a row into text, cut before the first stop string.

    Args:
        tokenizer: `OpenLlamaTokenizer`.
        prompt_ids: list of int, what the tokens continue.
        stops: tuple of strings.

    Attributes:
        text: the text so far, as far as it is final.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer, prompt_ids, stops=()):
        self._decoder = tokenizer.stream_decoder(prefix_ids=prompt_ids)
        self._stops = stops
        # A stop string may have begun in so many characters at the end.
        self._held_back = max(map(len, stops), default=1) - 1
        self._pending = ""
        self.text = ""
        self.stopped = False

    def push(self, token_ids):
        """Takes the next tokens; returns the text that has become final."""
        pieces = "".join(self._decoder.push(token_id) for token_id in token_ids)
        return self._release(pieces, self._held_back)

    def flush(self):
        """Returns what was still held back, once no more tokens come."""
        return self._release(self._decoder.flush(), 0)

    def _release(self, new, hold_back):
        if self.stopped:
            return ""
        self._pending += new
        found = [(self._pending.find(s), s) for s in self._stops]
        found = [(start + len(s), start) for start, s in found if start >= 0]
        if found:
            # The one that ends first, so that it does not matter how tokens come.
            self.stopped = True
            _, start = min(found)
            final, self._pending = self._pending[:start], ""
        else:
            end = max(0, len(self._pending) - hold_back)
            final, self._pending = self._pending[:end], self._pending[end:]
        self.text += final
        return final
