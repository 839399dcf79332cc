"""Evaluation: lm-evaluation-harness, perplexity, HumanEval, and reports.

If the harness is installed (the extra `eval`), importing this package registers the
model `keras_openllama` with it. `keras-openllama lm-eval` is the command line of the
harness with this model registered. Perplexity (`keras_openllama.evaluation.perplexity`)
does not need the harness.

Example:
    >>> import lm_eval
    >>> import keras_openllama.evaluation
    >>> lm_eval.simple_evaluate(
    ...     "keras_openllama", "preset=nano", tasks=["hellaswag"]
    ... )  # doctest: +SKIP
"""

MODEL = "keras_openllama"

try:
    from lm_eval.api.registry import model_registry
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
else:
    # Registered by name, so that Keras and the model are imported only when used.
    model_registry.register(
        MODEL, target="keras_openllama.evaluation.lm_eval_model:OpenLlamaLM"
    )
