"""Adapter for lm-evaluation-harness."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import keras
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.evaluation.generate_until import GenerationOptions, generate_until
from keras_openllama.evaluation.prefix_tries import common_prefix_length
from keras_openllama.evaluation.response_cache import (
    ResponseCache,
    request_key,
    weights_fingerprint,
)
from keras_openllama.evaluation.samplers import use_sampler
from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.utils.types import PathLike

MAX_GEN_TOKS = 256  # The default of the harness's own models.

logger = logging.getLogger(__name__)


class OpenLlamaLM(TemplateLM):
    """The model `keras_openllama` of lm-evaluation-harness.

    The tokens are those of the harness's own model `hf` for an export of the model: one
    `<s>` at the beginning, contexts and continuations tokenized together, and control
    strings parsed as tokens. `docs/evaluation.md` lists the exceptions: truncation, and
    `loglikelihood_rolling`.

    Args:
        preset: see `OpenLlamaCausalLM.from_preset`.
        lm: a loaded model, instead of `preset`.
        dtype: dtype or dtype policy of the weights. Defaults to Keras's global policy.
        revision: branch, tag or commit of a repository on the Hub.
        batch_size: for log-likelihoods the number of sequences of 512 tokens into which
            requests are packed (not of requests); for generation the number of prompts.
            `"auto"` is 8; nothing is searched.
        max_length: context length in tokens. Defaults to that of the model.
        max_gen_toks: maximum number of tokens to generate if a task does not set it.
        add_bos: whether to add `<s>` to texts that do not begin with it.
        keep_bos: whether to keep `<s>` when a text is truncated on the left. `hf` does
            not keep it.
        separate_tokenization: whether to tokenize continuations separately from their
            contexts, as EasyLM did for the published results (`docs/evaluation.md`).
        data: number of replicas in the device mesh (JAX), see
            `keras_openllama.distribution.make_mesh`.
        fsdp: number of shards of the weights.
        model: number of tensor-parallel shards.
        response_cache: path of an SQLite file in which to cache responses. After an
            interruption, an evaluation resumes from it bit-exactly.
        max_batch_size: ignored; the harness's command line passes it.
        device: ignored; the harness's command line passes it. The backend selects the
            devices.

    Raises:
        ValueError: if an argument is invalid, or if not exactly one of `preset` and
            `lm` is given.
        OSError: if a file of the model could not be downloaded or read.

    Example:
        >>> from lm_eval.api.instance import Instance
        >>> model = OpenLlamaLM(lm=lm)
        >>> request = Instance("loglikelihood", {}, ("The old man", " looked"), 0)
        >>> [(log_prob, is_greedy)] = model.loglikelihood([request], disable_tqdm=True)
        >>> log_prob < 0
        True
    """

    def __init__(
        self,
        preset: str | None = None,
        lm: OpenLlamaCausalLM | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos: bool = True,
        keep_bos: bool = True,
        separate_tokenization: bool = False,
        data: int | None = None,
        fsdp: int | None = None,
        model: int | None = None,
        response_cache: PathLike | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if (preset is None) == (lm is None):
            raise ValueError(
                "Pass one of `preset` (model_args preset=…) and `lm`. Received: "
                f"preset={preset!r}, lm={lm!r}"
            )
        if lm is None:
            axes = {"data": data, "fsdp": fsdp, "model": model}
            mesh = {axis: size for axis, size in axes.items() if size}
            lm = load_model(preset, dtype, revision, mesh)
        if lm.preprocessor is None:
            raise ValueError(
                "Tasks need a tokenizer: load the model with its preprocessor. "
                "Received: lm.preprocessor=None"
            )
        self.lm = lm
        self.batch_size = _parse_batch_size(batch_size)
        self.max_length = _check_max_length(max_length, lm.backbone.context_length)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos, self.keep_bos = add_bos, keep_bos
        self.separate_tokenization = separate_tokenization
        self._warned_of_truncation = False
        self.scorer = TokenScorer(lm, self.batch_size)
        self.responses = ResponseCache(
            response_cache, self._identity() if response_cache else {}
        )

    def _identity(self):
        """What determines a response besides the request."""
        lm = self.lm
        return {
            "weights": weights_fingerprint(lm),
            "dtype": lm.backbone.dtype_policy.name,
            "backend": keras.config.backend(),
            "rope_scaling": lm.backbone.rope_scaling,
            "tokenizer": lm.preprocessor.tokenizer.fingerprint[:16],
        }

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness stores about the model in its results."""
        lm = self.lm
        return {
            "model_num_parameters": lm.count_params(),
            "model_dtype": lm.backbone.dtype_policy.name,
            "model_weights": lm.loaded_from,
        }

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "OpenLlamaLM":
        """Creates a model from the text of `--model_args`.

        Args:
            arg_string: arguments of this class, such as `"preset=nano,max_length=64"`.
            additional_config: see `create_from_arg_obj`.

        Returns:
            The model.

        Raises:
            ValueError: if an argument is invalid.
            OSError: if a file of the model could not be downloaded or read.
        """
        arguments = simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)

    @classmethod
    def create_from_arg_obj(
        cls,
        arg_dict: Mapping[str, Any],
        additional_config: Mapping[str, Any] | None = None,
    ) -> "OpenLlamaLM":
        """Creates a model from a dict of arguments.

        Args:
            arg_dict: arguments of this class.
            additional_config: arguments of `simple_evaluate`, such as `batch_size`.
                Those that are `None` are ignored, and `arg_dict` overrides the others.

        Returns:
            The model.

        Raises:
            ValueError: if an argument is invalid.
            OSError: if a file of the model could not be downloaded or read.
        """
        config = additional_config or {}
        given = {name: value for name, value in config.items() if value is not None}
        return cls(**{**given, **arg_dict})

    # ----- Tokens

    @property
    def eot_token_id(self) -> int:
        """Token id of `</s>`."""
        return self.lm.preprocessor.tokenizer.end_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id of `<s>`, from which the first token of a text is predicted."""
        return self.lm.preprocessor.tokenizer.start_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenizes a text.

        Args:
            string: the text.
            add_special_tokens: whether to add `<s>` to a text that does not begin with
                it. Defaults to `add_bos`.
            **kwargs: ignored.

        Returns:
            Token ids.
        """
        add_bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return self.lm.preprocessor.tokenizer.tokenize(
            string, parse_special=True, add_bos=add_bos, add_eos=False
        )

    def _encode_pair(self, context, continuation):
        """Token ids of context and continuation, split as the harness does.

        The harness splits at the number of tokens of the context. If a token spans the
        boundary, that may leave no token to score. Then we split before that token.
        """
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                return ids[:1], ids[1:]
            return [self.prefix_token_id], ids
        if self.separate_tokenization:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return self.tok_encode(context), ids
        context_ids, ids = super()._encode_pair(context, continuation)
        if not context_ids:  # Possible without `<s>`, for spaces only.
            context_ids = [self.prefix_token_id]
        if ids or not continuation:
            return context_ids, ids
        all_ids = self.tok_encode(context + continuation)
        shared = common_prefix_length(context_ids, all_ids[:-1])
        return all_ids[:shared] or [self.prefix_token_id], all_ids[shared:]

    # ----- Requests

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Computes log-likelihoods of continuations; see `lm_eval.api.model.LM`."""
        pairs = [request.args for request in requests]
        bar = tqdm(pairs, desc="tokenizing", disable=disable_tqdm or None, delay=1)
        encoded = [(pair, *self._encode_pair(*pair)) for pair in bar]
        return self._loglikelihood_tokens(encoded, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Computes log-likelihoods of full texts; see `lm_eval.api.model.LM`.

        The first token is predicted from `<s>`, which is not scored. (If the tokenizer
        adds `<s>`, `hf` adds another one and scores the second.)
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                ids = ids[1:]
            parts = get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, context_len=1
            )
            for pair in map(make_disjoint_window, parts):
                windows.append((None, *pair))
                owners.append(i)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (log_prob, _) in zip(owners, scores, strict=True):
            totals[i] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """Pairs of log-likelihood and greedy flag for `(request, context, ids)`."""
        keys, by_key = [], {}
        for request, context, ids in requests:
            sequence = self._sequence(request, context, ids)
            keys.append(request_key("loglikelihood", sequence, len(ids)))
            by_key[keys[-1]] = sequence, len(sequence) - len(ids)
        unique_keys = list(by_key)
        sequences, score_from = (
            zip(*by_key.values(), strict=True) if by_key else ((), ())
        )

        def respond(batch):
            scores = self.scorer.score_batch(batch, sequences, score_from)
            return {
                unique_keys[i]: (
                    float(log_probs.sum(dtype="float64")),
                    bool(greedy.all()),
                )
                for i, (log_probs, greedy) in scores.items()
            }

        def batches():
            rest = []
            for batch in self.scorer.make_batches(sequences):
                indices = batch.sequence_indices
                missing = [i for i in indices if unique_keys[i] not in self.responses]
                # Keeps the batches of an interrupted run, for bit-exact results.
                if len(missing) == len(indices):
                    yield batch
                else:
                    rest += missing
            yield from self.scorer.make_batches(sequences, rest)

        pairs = [request for request, _, _ in requests]
        self._respond("loglikelihood", pairs, keys, batches(), respond, disable_tqdm)
        return [tuple(self.responses.get(key)) for key in keys]

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Generates text up to a stop string; see `lm_eval.api.model.LM`."""
        keys, by_key, groups = [], {}, {}
        for request in requests:
            context, gen_kwargs = request.args
            options = GenerationOptions.from_gen_kwargs(gen_kwargs, self.max_gen_toks)
            ids = self._prompt(context, options)
            keys.append(request_key("generate_until", ids, options))
            while options.sampler.get("temperature") and keys[-1] in by_key:
                keys[-1] = request_key(keys[-1])  # Another sample of the same request.
            by_key[keys[-1]] = ids, options
            _, lengths = groups.setdefault(request_key(options), (options, {}))
            lengths[keys[-1]] = len(ids)

        def respond(batch):
            prompts, (_, options) = [by_key[key][0] for key in batch], by_key[batch[0]]
            texts = generate_until(self.lm, prompts, options)
            return dict(zip(batch, texts, strict=True))

        def batches():
            for options, lengths in groups.values():
                longest_first = sorted(lengths, key=lambda key: (-lengths[key], key))
                sampler = dict(options.sampler)
                if "seed" in sampler:  # Otherwise cached samples would be drawn again.
                    sampler["seed"] += sum(key in self.responses for key in lengths)
                with use_sampler(self.lm, **sampler):
                    for first in range(0, len(longest_first), self.batch_size):
                        batch = longest_first[first : first + self.batch_size]
                        batch = [key for key in batch if key not in self.responses]
                        if batch:
                            yield batch

        pairs = [request.args for request in requests]
        self._respond("generate_until", pairs, keys, batches(), respond, disable_tqdm)
        return [self.responses.get(key) for key in keys]

    def _respond(self, kind, requests, keys, batches, respond, disable_tqdm):
        """Computes and caches responses, one batch at a time."""
        requests_by_key = {}
        for request, key in zip(requests, keys, strict=True):
            requests_by_key.setdefault(key, []).append(request)
        done = sum(key in self.responses for key in keys)
        bar = tqdm(
            total=len(keys), initial=done, desc=kind, disable=disable_tqdm or None
        )
        with bar:
            for batch in batches:
                new = respond(batch)
                self.responses.add(new)
                for key, value in new.items():
                    bar.update(len(requests_by_key[key]))
                    for request in requests_by_key[key]:
                        if request is not None:  # `None` for a window of a text.
                            self.cache_hook.add_partial(kind, request, value)

    def _sequence(self, request, context, ids):
        """Context and continuation, truncated on the left to the context length."""
        if len(ids) > self.max_length:
            raise ValueError(
                f"A continuation has {len(ids)} tokens, which exceeds the context "
                f"length of {self.max_length}. Received: …{str(request)[-200:]}"
            )
        # One more than the context length, since the last token is only predicted.
        return self._truncate(context + ids, self.max_length + 1)

    def _prompt(self, context, options):
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise ValueError(
                "`max_gen_toks` of a task must be less than the context length of "
                f"{self.max_length}. Received: {options.max_new_tokens}"
            )
        return self._truncate(self.tok_encode(context) or [self.prefix_token_id], room)

    def _truncate(self, ids, length):
        """The last `length` ids, with a leading `<s>` kept if `keep_bos`."""
        if len(ids) <= length:
            return ids
        if not self._warned_of_truncation:
            self._warned_of_truncation = True
            logger.warning(
                "Some requests exceed the context length. They are truncated on the "
                "left."
            )
        if self.keep_bos and ids[0] == self.prefix_token_id:
            return ids[:1] + ids[1 - length :] if length > 1 else ids[:1]
        return ids[-length:]


def load_model(
    preset: str,
    dtype: str | None = None,
    revision: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> OpenLlamaCausalLM:
    """Loads a model, sharded over a device mesh if one is given.

    Args:
        preset: see `OpenLlamaCausalLM.from_preset`.
        dtype: dtype or dtype policy of the weights.
        revision: branch, tag or commit of a repository on the Hub.
        mesh: sizes of the mesh by axis, see `distribution.make_mesh`. If `None` or
            empty, Keras's current distribution applies.

    Returns:
        The model.

    Example:
        >>> load_model("nano", dtype="float32").count_params()
        4524288
    """
    scope = contextlib.nullcontext()
    if mesh:
        scope = OpenLlamaParallel(make_mesh(**mesh)).scope()
    with scope:
        return OpenLlamaCausalLM.from_preset(preset, dtype=dtype, revision=revision)


def _parse_batch_size(value):
    """Parses `batch_size`, which may be a string from a command line."""
    text = str(value)
    if text.partition(":")[0] == "auto":
        return DEFAULT_BATCH_SIZE
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            '`batch_size` must be a positive integer or "auto". Received: '
            f"batch_size={value!r}"
        )
    return int(text)


def _check_max_length(max_length, context_length):
    max_length = context_length if max_length is None else max_length
    if not 1 <= max_length <= context_length:
        raise ValueError(
            "`max_length` must be from 1 to the model's context length, "
            f"{context_length}. Received: max_length={max_length!r}"
        )
    return max_length
