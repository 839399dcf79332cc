"""Evaluation: lm-evaluation-harness, perplexity, HumanEval, reports.

Where the harness is installed (the extra `eval`), importing this registers the model
`keras_openllama` with it:

    import keras_openllama.evaluation
    lm_eval.simple_evaluate("keras_openllama", "preset=nano", tasks=["hellaswag"])

On the command line `keras-openllama lm-eval` does so, and goes on as the harness's own.
Perplexity (`keras_openllama.evaluation.perplexity`) needs Keras alone.
"""

MODEL = "keras_openllama"

try:
    from lm_eval.api.registry import model_registry
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
else:
    # By name, so that neither Keras nor the model is imported before one is asked for.
    model_registry.register(
        MODEL, target="keras_openllama.evaluation.lm_eval_model:OpenLlamaLM"
    )
