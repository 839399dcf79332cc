"""Writes the README.md of an exported model: usage, license and provenance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_openllama import __version__, presets

if TYPE_CHECKING:
    from keras_openllama.checkpoints.contents import ModelContents

_NOT_LLAMA_TOKENIZER_V1 = """
**Do not use `LlamaTokenizer`**, which OpenLLaMA's own README shows. This tokenizer
merges runs of spaces into one. `LlamaTokenizer` of transformers 5 (tested: 5.23) does
not, and so returns ids that the model was not trained on. In transformers 4
`LlamaTokenizer` used SentencePiece and was correct. Since it merges spaces, the model
is not suitable for code.
"""
_NOT_LLAMA_TOKENIZER_V2 = """
**Do not use `LlamaTokenizer`**, which OpenLLaMA's own README shows. If a text begins
with a space, `LlamaTokenizer` of transformers 5 (tested: 5.23) omits the space that
SentencePiece prepends to each text, and so returns different ids. It was correct for
the other texts that were tested. In transformers 4 `LlamaTokenizer` used SentencePiece.
"""


def model_card(contents: ModelContents, dtype: str, merges_spaces: bool | None) -> str:
    """Returns the model card of an export.

    Args:
        contents: The model.
        dtype: Name of the dtype of the exported weights.
        merges_spaces: Whether the tokenizer merges runs of spaces. `None` if the export
            has no tokenizer.

    Returns:
        Markdown with a YAML header, as the Hugging Face Hub expects it.
    """
    preset = presets.registry().get(contents.origin)
    sections = [
        _header(preset),
        _title(contents, preset, dtype),
        _usage(merges_spaces),
        _tokenizer(merges_spaces),
        _llama_cpp(contents.arguments["hidden_dim"], merges_spaces),
        _provenance(contents, preset),
    ]
    return "\n".join(section for section in sections if section)


def _header(preset):
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if preset:
        lines.append(f"license: {preset.license.lower()}")
        handle = preset.handles["transformers"]
        if handle.startswith("hf://"):
            lines.append(f"base_model: {handle.removeprefix('hf://')}")
    return "\n".join([*lines, "tags:", "- llama", "- open_llama", "---", ""])


def _title(contents, preset, dtype):
    name = preset.name if preset else "A LLaMA model"
    return f"""\
# {name}

{contents.parameters:,} parameters in {dtype}, in the format of transformers. Exported
by keras_openllama {__version__}.
"""


def _usage(merges_spaces):
    if merges_spaces is None:
        return """\
## Use

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
```

The export has no tokenizer.
"""
    return """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
inputs = tokenizer("Q: What is the largest animal?\\nA:", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

`PATH` is this directory, or its repository on the Hub. In Keras:

```python
from keras_openllama import OpenLlamaCausalLM

lm = OpenLlamaCausalLM.from_preset("PATH")
```
"""


def _tokenizer(merges_spaces):
    if merges_spaces is None:
        return ""
    text = """\
## Tokenizer

`tokenizer.json` returns the same token ids as SentencePiece with `tokenizer.model`; the
two were compared during the export. Use **AutoTokenizer**. It prepends the start token
to a text if the preprocessor of the Keras model did. Unlike SentencePiece, transformers
treats strings such as `<s>` and `</s>` in a text as control tokens; with
`split_special_tokens=True` they are ordinary text.
"""
    return text + (
        _NOT_LLAMA_TOKENIZER_V1 if merges_spaces else _NOT_LLAMA_TOKENIZER_V2
    )


def _llama_cpp(hidden_dim, merges_spaces):
    if merges_spaces is None:
        return ""
    text = """\
## llama.cpp

```
keras-openllama convert PATH model.gguf --to gguf --quantization q8_0
```

llama.cpp's own converter takes this directory, too:
`python convert_hf_to_gguf.py PATH --outfile model.gguf --outtype f16`.
"""
    if hidden_dim % 256:
        text += f"""
The hidden size, {hidden_dim}, is not a multiple of 256, the block size of llama.cpp's
K-quants (such as `Q4_K_M`): llama-quantize replaces them by larger types. `Q8_0`,
`Q5_0` and `Q4_0` have blocks of 32 and work as expected.
"""
    if merges_spaces:
        text += """
llama.cpp does not merge runs of spaces as this tokenizer does: merge them before you
pass a text to llama.cpp.
"""
    return text


def _provenance(contents, preset):
    if preset is None:
        where = "The origin of the weights is unknown."
        if contents.origin:
            where = f"The weights were loaded from {contents.origin}."
        return f"""\
## License and provenance

{where} State their license and training data here before you publish
this model.
"""
    provenance = preset.provenance
    mixture = provenance.get("data_mixture", {})
    sources = "\n".join(
        f"- [{source.get('title', source['name'])}]({source['url']})"
        for source in mixture.get("sources", provenance.get("sources", []))
    )
    handle = preset.handles["transformers"]
    link = handle.removeprefix("hf://")
    where = f" (https://huggingface.co/{link})" if handle.startswith("hf://") else ""
    notice = f"\n{preset.notice}\n" if preset.notice else ""
    return f"""\
## License and provenance

The weights were loaded from `{preset.name}`{where}, whose license is {preset.license}.
This card does not record later changes, such as fine-tuning.
{notice}
{preset.description}

Trained on {_count(provenance["trained_tokens"])} tokens, with
{provenance["trained_with"]}. Training data:

{sources}
"""


def _count(number):
    return f"{number:,}" if isinstance(number, int) else number
