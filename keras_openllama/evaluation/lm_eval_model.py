"""The models as lm-evaluation-harness asks them."""

import contextlib
import logging

import keras
from lm_eval.api.model import TemplateLM
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from keras_openllama.distribution import OpenLlamaParallel, make_mesh
from keras_openllama.evaluation.generate_until import Options, continuations
from keras_openllama.evaluation.prefix_tries import shared_length
from keras_openllama.evaluation.response_cache import Answers, fingerprint, key_of
from keras_openllama.evaluation.samplers import sampling
from keras_openllama.evaluation.token_scoring import DEFAULT_BATCH_SIZE, TokenScorer
from keras_openllama.models.causal_lm import OpenLlamaCausalLM

MAX_GEN_TOKS = 256  # Of the harness's own models, for tasks that name no number.

logger = logging.getLogger(__name__)


class OpenLlamaLM(TemplateLM):
    """An `OpenLlamaCausalLM` for lm-evaluation-harness, by the name `keras_openllama`.

    Tokens are those that the harness's own `hf` gives for an export of the model: one
    `<s>` in front, a continuation tokenized together with its context, control strings
    read as tokens.

    Args:
        preset: what `OpenLlamaCausalLM.from_preset` takes.
        lm: `OpenLlamaCausalLM` instead, loaded already.
        dtype: dtype or dtype policy of the weights; `None` is Keras's global one.
        revision: branch, tag or commit of a repository on the Hub.
        batch_size: int, rows of 512 tokens that are computed at once, into which
            requests are packed; of prompts to continue, as many. `"auto"` is 8.
        max_length: int, tokens of context; that of the model unless given.
        max_gen_toks: int, tokens to generate where a task names no number.
        add_bos: bool, put `<s>` before each text that does not begin with it.
        keep_bos: bool, keep it where the left of a text that is too long is cut off.
            `hf` cuts it off, too.
        apart: bool, tokenize a continuation apart from its context, as EasyLM did for
            the published results (`docs/evaluation.md`).
        data, fsdp, model: ints, sizes of the mesh of devices to spread the model over
            (JAX); see `keras_openllama.distribution.make_mesh`.
        answers: path of an SQLite file that keeps what is computed, to go on after an
            interruption with the same results, to the bit.
        max_batch_size, device: of the harness's command line, which names them
            unasked; of no use here. The backend chooses its devices.

    Raises:
        ValueError: for an argument that makes no sense, or without one model.
        OSError: if a file of the model cannot be had or read.

    Example:

    ```python
    import keras_openllama.evaluation
    import lm_eval

    lm_eval.simple_evaluate("keras_openllama", "preset=7b_v2", tasks=["hellaswag"])
    ```
    """

    def __init__(
        self,
        preset=None,
        lm=None,
        dtype=None,
        revision=None,
        batch_size=DEFAULT_BATCH_SIZE,
        max_length=None,
        max_gen_toks=MAX_GEN_TOKS,
        add_bos=True,
        keep_bos=True,
        apart=False,
        data=None,
        fsdp=None,
        model=None,
        answers=None,
        max_batch_size=None,
        device=None,
    ):
        super().__init__()
        if (preset is None) == (lm is None):
            raise ValueError(
                "Name one model: model_args preset=…, or an `lm`. Received: "
                f"preset={preset!r}, lm={lm!r}"
            )
        if lm is None:
            axes = {"data": data, "fsdp": fsdp, "model": model}
            mesh = {axis: size for axis, size in axes.items() if size}
            lm = load_model(preset, dtype, revision, mesh)
        if lm.preprocessor is None:
            raise ValueError(
                "Tasks are text, and this model has no tokenizer: load it with its "
                "`preprocessor`. Received: lm.preprocessor=None"
            )
        self.lm = lm
        self.batch_size = _batch_size(batch_size)
        self.max_length = _checked_length(max_length, lm.backbone.context_length)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos, self.keep_bos, self.apart = add_bos, keep_bos, apart
        self._warned_of_cuts = False
        self.scorer = TokenScorer(lm, self.batch_size)
        self.answers = Answers(answers, self._identity() if answers else {})

    def _identity(self):
        """What answers depend on, beside the request."""
        lm = self.lm
        return {
            "weights": fingerprint(lm),
            "dtype": lm.backbone.dtype_policy.name,
            "backend": keras.config.backend(),
            "rope_scaling": lm.backbone.rope_scaling,
            "tokenizer": lm.preprocessor.tokenizer.fingerprint[:16],
        }

    def get_model_info(self):
        """What the harness writes of the model into its results."""
        lm = self.lm
        return {
            "model_num_parameters": lm.count_params(),
            "model_dtype": lm.backbone.dtype_policy.name,
            "model_weights": lm.loaded_from,
        }

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        """As the harness's command line makes a model; `arg_string` goes before."""
        arguments = simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """The same from a dict."""
        return cls(**{**(additional_config or {}), **arg_dict})

    # ----- Tokens

    @property
    def eot_token_id(self):
        """Id of `</s>`."""
        return self.lm.preprocessor.tokenizer.end_token_id

    @property
    def prefix_token_id(self):
        """Id of what the first token of a text is predicted from, `<s>`."""
        return self.lm.preprocessor.tokenizer.start_token_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Ids of a text.

        Args:
            string: str.
            add_special_tokens: bool, whether `<s>` is put in front where it is not;
                `None` is `add_bos`.

        Returns:
            A list of int.
        """
        add_bos = self.add_bos if add_special_tokens is None else add_special_tokens
        return self.lm.preprocessor.tokenizer.tokenize(
            string, parse_special=True, add_bos=add_bos, add_eos=False
        )

    def _encode_pair(self, context, continuation):
        """Ids of both, tokenized together, as the harness parts them.

        It counts the tokens of the context. Where a token reaches over the boundary
        that may leave nothing to score; then the parting is before that token.
        """
        if not context:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            if ids[:1] == [self.prefix_token_id]:
                return ids[:1], ids[1:]
            return [self.prefix_token_id], ids
        if self.apart:
            ids = self.tok_encode(continuation, add_special_tokens=False)
            return self.tok_encode(context), ids
        context_ids, ids = super()._encode_pair(context, continuation)
        if not context_ids:  # Without `<s>`, of nothing but spaces.
            context_ids = [self.prefix_token_id]
        if ids or not continuation:
            return context_ids, ids
        whole = self.tok_encode(context + continuation)
        shared = shared_length(context_ids, whole[:-1])
        return whole[:shared] or [self.prefix_token_id], whole[shared:]

    # ----- Requests

    def loglikelihood(self, requests, disable_tqdm=False):
        """Log-likelihoods of continuations; see `lm_eval.api.model.LM`."""
        pairs = [request.args for request in requests]
        bar = tqdm(pairs, desc="tokenizing", disable=disable_tqdm or None, delay=1)
        encoded = [(pair, *self._encode_pair(*pair)) for pair in bar]
        return self._loglikelihood_tokens(encoded, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihoods of whole texts; see `lm_eval.api.model.LM`.

        The first token is predicted from `<s>`, which is not one of the text's. (`hf`
        puts another before those of a tokenizer that adds it, and scores it.)
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
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (log_prob, _) in zip(owners, answers, strict=True):
            totals[i] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """Pairs of log-probability and greedy flag for `(request, context, ids)`."""
        keys, asked = [], {}
        for request, context, ids in requests:
            sequence = self._sequence(request, context, ids)
            keys.append(key_of("loglikelihood", sequence, len(ids)))
            asked[keys[-1]] = sequence, len(sequence) - len(ids)
        names = list(asked)
        sequences, wanted_from = (
            zip(*asked.values(), strict=True) if asked else ((), ())
        )

        def answer(batch):
            found = self.scorer.run(batch, sequences, wanted_from)
            return {
                names[i]: (float(log_probs.sum(dtype="float64")), bool(greedy.all()))
                for i, (log_probs, greedy) in found.items()
            }

        def batches():
            late = []
            for batch in self.scorer.plan(sequences):
                missing = [i for i in batch.indices if names[i] not in self.answers]
                # The same batches as in the run that was interrupted.
                if len(missing) == len(batch.indices):
                    yield batch
                else:
                    late += missing
            yield from self.scorer.plan(sequences, late)

        texts = [request for request, _, _ in requests]
        self._ask("loglikelihood", texts, keys, batches(), answer, disable_tqdm)
        return [tuple(self.answers.get(key)) for key in keys]

    def generate_until(self, requests, disable_tqdm=False):
        """Continuations of prompts; see `lm_eval.api.model.LM`."""
        keys, asked, groups = [], {}, {}
        for request in requests:
            context, gen_kwargs = request.args
            options = Options.of(gen_kwargs, self.max_gen_toks)
            ids = self._prompt(context, options)
            keys.append(key_of("generate_until", ids, options))
            while options.sampler.get("temperature") and keys[-1] in asked:
                keys[-1] = key_of(keys[-1])  # Another sample.
            asked[keys[-1]] = ids, options
            _, lengths = groups.setdefault(key_of(options), (options, {}))
            lengths[keys[-1]] = len(ids)

        def answer(batch):
            prompts, (_, options) = [asked[key][0] for key in batch], asked[batch[0]]
            texts = continuations(self.lm, prompts, options)
            return dict(zip(batch, texts, strict=True))

        def batches():
            for options, lengths in groups.values():
                longest_first = sorted(lengths, key=lambda key: (-lengths[key], key))
                sampler = dict(options.sampler)
                if "seed" in sampler:  # Not to draw what is kept a second time.
                    sampler["seed"] += sum(key in self.answers for key in lengths)
                with sampling(self.lm, **sampler):
                    for first in range(0, len(longest_first), self.batch_size):
                        batch = longest_first[first : first + self.batch_size]
                        batch = [key for key in batch if key not in self.answers]
                        if batch:
                            yield batch

        pairs = [request.args for request in requests]
        self._ask("generate_until", pairs, keys, batches(), answer, disable_tqdm)
        return [self.answers.get(key) for key in keys]

    def _ask(self, kind, requests, keys, batches, answer, disable_tqdm):
        """Answers what has no answer, and keeps it, a batch at a time."""
        askers = {}
        for request, key in zip(requests, keys, strict=True):
            askers.setdefault(key, []).append(request)
        done = sum(key in self.answers for key in keys)
        bar = tqdm(
            total=len(keys), initial=done, desc=kind, disable=disable_tqdm or None
        )
        with bar:
            for batch in batches:
                new = answer(batch)
                self.answers.add(new)
                for key, value in new.items():
                    bar.update(len(askers[key]))
                    for request in askers[key]:
                        if request is not None:  # A window of a text.
                            self.cache_hook.add_partial(kind, request, value)

    def _sequence(self, request, context, ids):
        """Context and continuation in one, cut from the left to fit."""
        if len(ids) > self.max_length:
            raise ValueError(
                f"A continuation has {len(ids)} tokens, and the context is "
                f"{self.max_length} tokens. Received: …{str(request)[-200:]}"
            )
        # One more than the context, as the last token is not read.
        return self._cut(context + ids, self.max_length + 1)

    def _prompt(self, context, options):
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise ValueError(
                f"A task asks for {options.max_new_tokens} new tokens, and the context "
                f"is {self.max_length} tokens. Set its `max_gen_toks` lower."
            )
        return self._cut(self.tok_encode(context) or [self.prefix_token_id], room)

    def _cut(self, ids, length):
        """The last `length` ids, the first of which stays `<s>` if it was."""
        if len(ids) <= length:
            return ids
        if not self._warned_of_cuts:
            self._warned_of_cuts = True
            logger.warning(
                "Some requests are longer than the context: the left is cut off them."
            )
        if self.keep_bos and ids[0] == self.prefix_token_id:
            return ids[:1] + ids[1 - length :] if length > 1 else ids[:1]
        return ids[-length:]


def load_model(preset, dtype=None, revision=None, mesh=None):
    """Loads a model, spread over devices if asked to.

    Args:
        preset, dtype, revision: see `OpenLlamaCausalLM.from_preset`.
        mesh: dict of sizes by axis, see `distribution.make_mesh`; `None` or empty is
            whatever distribution is set.

    Returns:
        An `OpenLlamaCausalLM`.
    """
    scope = contextlib.nullcontext()
    if mesh:
        scope = OpenLlamaParallel(make_mesh(**mesh)).scope()
    with scope:
        return OpenLlamaCausalLM.from_preset(preset, dtype=dtype, revision=revision)


def _batch_size(value):
    """A number also from what a command line gives, as in `batch_size=auto`."""
    text = str(value)
    if text.partition(":")[0] == "auto":
        return DEFAULT_BATCH_SIZE
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            '`batch_size` is a whole number from 1 on, or "auto". Received: '
            f"batch_size={value!r}"
        )
    return int(text)


def _checked_length(max_length, context_length):
    max_length = context_length if max_length is None else max_length
    if not 1 <= max_length <= context_length:
        raise ValueError(
            "`max_length` is from 1 to the context of the model, "
            f"{context_length}. Received: max_length={max_length!r}"
        )
    return max_length
