"""Adapter for lm-evaluation-harness."""

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

from keras_openllama.evaluation.chat_prompts import ChatPrompts
from keras_openllama.evaluation.generate_until import GenerationOptions, generate_until
from keras_openllama.evaluation.hf_arguments import accept_hf_arguments
from keras_openllama.evaluation.model_loading import (
    check_not_given,
    load_model,
    parse_batch_size,
    parse_dtype,
)
from keras_openllama.evaluation.prefix_tries import common_prefix_length
from keras_openllama.evaluation.response_cache import (
    ResponseCache,
    declared_end_tokens,
    request_key,
    weights_fingerprint,
)
from keras_openllama.evaluation.samplers import use_sampler
from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.evaluation.unique_requests import UniqueRequests
from keras_openllama.layers.quantizable import weight_policy
from keras_openllama.models.causal_lm import OpenLlamaCausalLM
from keras_openllama.utils.types import PathLike
from keras_openllama.utils.validation import check_integer, one_of, raise_invalid

MAX_GEN_TOKS = 256  # The default of the harness's own models.

logger = logging.getLogger(__name__)


class OpenLlamaLM(TemplateLM):
    """The model `keras_openllama` of lm-evaluation-harness.

    The tokens are those of the harness's own model `hf` for an export of the model: one
    `<s>` at the beginning, contexts and continuations tokenized together, and control
    strings parsed as tokens. `docs/evaluation.md` lists the exceptions: truncation, and
    `loglikelihood_rolling`.

    The arguments of `hf` are accepted too. Some are names of the same thing, such as
    `pretrained` for `preset` and `peft` for `adapters`; some do not change results here
    and are ignored; the others raise an error that says what to do instead.

    Args:
        preset: see `OpenLlamaCausalLM.from_preset`.
        lm: a loaded model, instead of `preset`.
        dtype: dtype or dtype policy of the weights, with `preset` only. Defaults to
            Keras's global policy, as does `"auto"`.
        revision: branch, tag or commit of a repository on the Hub, with `preset` only.
        adapters: LoRA adapters to load, see `OpenLlamaCausalLM.load_adapters`, with
            `preset` only.
        tokenizer: preset of another tokenizer, with `preset` only. Defaults to that of
            the model.
        batch_size: for log-likelihoods the number of sequences of 512 tokens into which
            requests are packed (not of requests); for generation the number of prompts.
            `"auto"` is 8; nothing is searched.
        max_length: context length in tokens. Defaults to that of the model.
        max_gen_toks: maximum number of tokens to generate if a task does not set it.
        add_bos: whether to add `<s>` to texts that do not begin with it. Defaults to
            `add_start_token` of the preprocessor.
        keep_bos: whether to keep `<s>` when a text is truncated on the left. `hf` does
            not keep it.
        separate_tokenization: whether to tokenize continuations separately from their
            contexts, as EasyLM did for the published results (`docs/evaluation.md`).
        data: number of replicas in the device mesh (JAX), with `preset` only, see
            `keras_openllama.distribution.make_mesh`.
        fsdp: number of shards of the weights, with `preset` only.
        model: number of tensor-parallel shards, with `preset` only.
        quantization: `"int8"` or `"int4"`, with `preset` only. Defaults to the weights
            as they are in the files.
        response_cache: path of an SQLite file in which to cache responses. After an
            interruption, an evaluation resumes from it bit-exactly.
        max_batch_size: ignored; the harness's command line passes it.
        device: ignored; the harness's command line passes it. The backend selects the
            devices.

    Raises:
        ValueError: if an argument is invalid, unknown or not supported, or if not
            exactly one of `preset` and `lm` is given.
        OSError: if a file of the model could not be downloaded or read.

    Example:
        >>> from lm_eval.api.instance import Instance
        >>> model = OpenLlamaLM(lm=lm)
        >>> request = Instance("loglikelihood", {}, ("The old man", " looked"), 0)
        >>> [(log_prob, is_greedy)] = model.loglikelihood([request], disable_tqdm=True)
        >>> log_prob < 0
        True
    """

    @accept_hf_arguments
    def __init__(
        self,
        preset: str | None = None,
        lm: OpenLlamaCausalLM | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        adapters: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos: bool | None = None,
        keep_bos: bool = True,
        separate_tokenization: bool = False,
        data: int | None = None,
        fsdp: int | None = None,
        model: int | None = None,
        quantization: str | None = None,
        response_cache: PathLike | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(preset, OpenLlamaCausalLM):  # `pretrained` of `hf` may be one.
            preset, lm = None, preset
        if (not preset) == (lm is None):
            raise ValueError(
                "Pass one of `preset` (model_args preset=…) and `lm`. Received: "
                f"preset={preset!r}, lm={lm!r}"
            )
        # Before a model is loaded, which may take long.
        self.batch_size = parse_batch_size(batch_size)
        self.max_gen_toks = check_integer("max_gen_toks", max_gen_toks)
        for name, value in {"adapters": adapters, "tokenizer": tokenizer}.items():
            if value == "":
                raise_invalid(name, value, "a directory, or hf://user/repo")
        # The harness parses true and false only; other texts would count as true.
        flags = {
            "add_bos": add_bos,
            "keep_bos": keep_bos,
            "separate_tokenization": separate_tokenization,
        }
        for name, value in flags.items():
            if value is not None:
                one_of(True, False)(name, value)
        if max_length is not None:
            max_length = check_integer("max_length", max_length)
        axes = {"data": data, "fsdp": fsdp, "model": model}
        options = {
            "dtype": parse_dtype(dtype),
            "revision": revision,
            "adapters": adapters,
            "tokenizer": tokenizer,
            "quantization": quantization,
        }
        if quantization is not None:
            one_of("int8", "int4")("quantization", quantization)
        if lm is None:
            mesh = {axis: size for axis, size in axes.items() if size is not None}
            lm = load_model(preset, mesh=mesh, **options)
        else:
            check_not_given({**options, **axes})
        if lm.preprocessor is None:
            raise ValueError(
                "Tasks need a tokenizer: load the model with its preprocessor. "
                "Received: lm.preprocessor=None"
            )
        self.lm = lm
        longest = lm.backbone.context_length
        if max_length is not None:
            check_integer("max_length", max_length, most=longest)
        self.max_length = longest if max_length is None else max_length
        self.add_bos = lm.preprocessor.add_start_token if add_bos is None else add_bos
        self.keep_bos = keep_bos
        self.separate_tokenization = separate_tokenization
        self._warned_of_truncation = False
        self.scorer = TokenScorer(lm, self.batch_size)
        self.responses = ResponseCache(
            response_cache, self._identity() if response_cache else {}
        )

    def _identity(self):
        """What determines a response besides the request."""
        lm = self.lm
        tokenizer = lm.preprocessor.tokenizer
        return {
            **declared_end_tokens(lm),
            "weights": weights_fingerprint(lm),
            "dtype": weight_policy(lm.backbone).name,
            "backend": keras.config.backend(),
            "rope_scaling": lm.backbone.rope_scaling,
            "tokenizer": tokenizer.fingerprint[:16],
        }

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness stores about the model in its results."""
        lm = self.lm
        return {
            "model_num_parameters": lm.count_params(),
            "model_dtype": weight_policy(lm.backbone).name,
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

    # ----- Chats

    @property
    def _chat_prompts(self):
        return ChatPrompts(self.lm.preprocessor)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a chat with the chat template of the model.

        Args:
            chat_history: messages, dicts of `"role"` and `"content"`.
            add_generation_prompt: whether to end with what begins a reply. Otherwise
                the last message is to be continued.

        Returns:
            The text, with all special tokens.

        Raises:
            ValueError: if the model has no chat template, or the template refuses the
                messages.
        """
        return self._chat_prompts.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the chat template of the model, for the harness's results.

        Args:
            chat_template: true, or the name `"default"`; false for none.

        Returns:
            The template in Jinja, or `None`.

        Raises:
            ValueError: for another name, or if the model has no chat template.
        """
        if not chat_template:
            return None
        if chat_template not in (True, "default"):
            raise ValueError(
                "`apply_chat_template` must be True or 'default': of several chat "
                "templates a model keeps the default. To use another one, set "
                "`lm.preprocessor.chat_template` and pass `lm`. Received: "
                f"apply_chat_template={chat_template!r}"
            )
        return self._chat_prompts.source

    @property
    def tokenizer_name(self) -> str:
        """Name of tokenizer and chat template, for the harness's cache of requests."""
        tokenizer = self.lm.preprocessor.tokenizer.fingerprint[:16]
        return f"keras_openllama-{tokenizer}-{self._chat_prompts.fingerprint}"

    # ----- Requests

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Computes log-likelihoods of continuations; see `lm_eval.api.model.LM`.

        Args:
            requests: requests with the arguments `(context, continuation)`.
            disable_tqdm: whether to hide the progress bars.

        Returns:
            For each request, the sum of the log-probabilities of the continuation's
            tokens in nats, and whether each of them is the most likely token.

        Raises:
            ValueError: if a continuation is longer than `max_length`.
        """
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

        Args:
            requests: requests with the arguments `(text,)`.
            disable_tqdm: whether to hide the progress bar.

        Returns:
            For each request, the sum of the log-probabilities of its tokens in nats.
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
        unique = UniqueRequests()
        for request, context, ids in requests:
            sequence = self._truncated_pair(request, context, ids)
            key = request_key("loglikelihood", sequence, len(ids))
            unique.add(key, (sequence, len(sequence) - len(ids)), request)
        responses = self._score_missing(unique)
        self._store("loglikelihood", unique, responses, disable_tqdm)
        return [tuple(self.responses.get(key)) for key in unique.keys]

    def _score_missing(self, unique):
        """Yields the responses of each batch by key, except those in the cache."""
        keys = list(unique.inputs)
        sequences = [sequence for sequence, _ in unique.inputs.values()]
        score_from = [first for _, first in unique.inputs.values()]
        for batch in self._pending_batches(keys, sequences):
            scores = self.scorer.score_batch(batch, sequences, score_from)
            yield {
                keys[i]: (float(log_probs.sum(dtype="float64")), bool(greedy.all()))
                for i, (log_probs, greedy) in scores.items()
            }

    def _pending_batches(self, keys, sequences):
        """Yields batches of all sequences whose responses are not in the cache.

        The last bits of a log-probability may depend on the batch. So batches without
        a cached response remain as they are, which makes the results of a resumed
        evaluation bit-identical. Only the rest is packed anew.
        """
        rest = []
        for batch in self.scorer.make_batches(sequences):
            indices = batch.sequence_indices
            missing = [i for i in indices if keys[i] not in self.responses]
            if len(missing) == len(indices):
                yield batch
            else:
                rest += missing
        yield from self.scorer.make_batches(sequences, rest)

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Generates texts up to a stop string; see `lm_eval.api.model.LM`.

        Args:
            requests: requests with the arguments `(context, gen_kwargs)`.
            disable_tqdm: whether to hide the progress bar.

        Returns:
            For each request the generated text, without the stop string.

        Raises:
            ValueError: if `gen_kwargs` has unsupported keys or invalid values.
        """
        unique = UniqueRequests()
        for request in requests:
            context, gen_kwargs = request.args
            options = GenerationOptions.from_gen_kwargs(gen_kwargs, self.max_gen_toks)
            ids = self._truncated_prompt(context, options)
            key = request_key("generate_until", ids, options)
            if options.sampler.get("temperature"):
                while key in unique.inputs:  # Each equal request is another sample.
                    key = request_key(key)
            unique.add(key, (ids, options), request.args)
        responses = self._generate_missing(unique)
        self._store("generate_until", unique, responses, disable_tqdm)
        return [self.responses.get(key) for key in unique.keys]

    def _generate_missing(self, unique):
        """Yields the responses of each batch by key, except those in the cache."""
        keys_by_options = {}
        for key, (_, options) in unique.inputs.items():
            keys_by_options.setdefault(request_key(options), []).append(key)
        for keys in keys_by_options.values():
            _, options = unique.inputs[keys[0]]
            sampler = self._resumed_sampler(options, keys)
            batches = self._pending_prompts(unique, keys)
            with use_sampler(self.lm, **sampler):
                for batch in batches:
                    prompts = [unique.inputs[key][0] for key in batch]
                    texts = generate_until(self.lm, prompts, options)
                    yield dict(zip(batch, texts, strict=True))

    def _resumed_sampler(self, options, keys):
        """Arguments of `use_sampler` to generate what is missing of the responses.

        The number of cached samples is added to the seed: with the same seed they would
        be drawn again, as samples of other requests.
        """
        sampler = dict(options.sampler)
        if "seed" in sampler:
            sampler["seed"] += sum(key in self.responses for key in keys)
        return sampler

    def _pending_prompts(self, unique, keys):
        """Returns batches of the keys without a cached response, longest first.

        As in `_pending_batches`, the cache does not change how prompts are batched.
        """

        def longest_first(key):
            ids, _ = unique.inputs[key]
            return -len(ids), key

        keys = sorted(keys, key=longest_first)
        starts = range(0, len(keys), self.batch_size)
        batches = [keys[start : start + self.batch_size] for start in starts]
        pending = [[k for k in batch if k not in self.responses] for batch in batches]
        return [batch for batch in pending if batch]

    def _store(self, kind, unique, responses, disable_tqdm):
        """Stores responses as they are computed, and shows the progress.

        They go into this model's cache and the harness's own (`use_cache=…`).

        Args:
            kind: name of the method that the harness called.
            unique: the requests.
            responses: iterable of dicts of responses by key, one per batch.
            disable_tqdm: whether to hide the progress bar.
        """
        done = sum(key in self.responses for key in unique.keys)
        total, disable = len(unique.keys), disable_tqdm or None
        with tqdm(total=total, initial=done, desc=kind, disable=disable) as bar:
            for new in responses:
                self.responses.add(new)
                for key, response in new.items():
                    requests = unique.arguments(key)
                    bar.update(len(requests))
                    for arguments in requests:
                        if arguments is not None:  # `None` for a window of a text.
                            self.cache_hook.add_partial(kind, arguments, response)

    def _truncated_pair(self, request, context, ids):
        """Context and continuation, truncated on the left to the context length."""
        if len(ids) > self.max_length:
            raise ValueError(
                f"A continuation has {len(ids)} tokens, which exceeds the context "
                f"length of {self.max_length}. Received: …{str(request)[-200:]}"
            )
        # One more than the context length, since the last token is only predicted.
        return self._truncate_left(context + ids, self.max_length + 1)

    def _truncated_prompt(self, context, options):
        """Token ids of a prompt, truncated on the left to leave room for new tokens."""
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise ValueError(
                "`max_gen_toks` of a task must be less than the context length of "
                f"{self.max_length}. Received: {options.max_new_tokens}"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        return self._truncate_left(ids, room)

    def _truncate_left(self, ids, length):
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
