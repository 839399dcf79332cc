"""Evaluation: lm-evaluation-harness, perplexity, HumanEval, reports.

Importing this registers the model `keras_openllama` with lm-evaluation-harness:

    import keras_openllama.evaluation
    lm_eval.simple_evaluate("keras_openllama", "preset=nano", tasks=["hellaswag"])

On the command line `keras-openllama lm-eval` does so, and goes on as the harness's own.
"""

try:
    from lm_eval.api.registry import model_registry
except ImportError as error:
    raise ImportError(
        "Evaluation needs lm-evaluation-harness: pip install 'keras-openllama[eval]' "
        "brings it."
    ) from error

MODEL = "keras_openllama"

# By name, so that neither Keras nor the model is imported before one is asked for.
model_registry.register(
    MODEL, target="keras_openllama.evaluation.lm_eval_model:OpenLlamaLM"
)
