"""The README.md of an exported model: licence, provenance, and how to use it."""

from keras_openllama import __version__, presets

_NOT_LLAMA_TOKENIZER_V1 = """
**Not `LlamaTokenizer`**, which OpenLLaMA's own README shows. This tokenizer merges runs
of spaces into one; `LlamaTokenizer` of transformers 5 (tried: 5.23) keeps them, and so
gives ids that the model has never seen. In transformers 4 `LlamaTokenizer` was
SentencePiece itself, and right. Since spaces are merged, the model is unfit for code.
"""
_NOT_LLAMA_TOKENIZER_V2 = """
**Not `LlamaTokenizer`**, which OpenLLaMA's own README shows. Before a text that begins
with a space `LlamaTokenizer` of transformers 5 (tried: 5.23) leaves out the space that
SentencePiece puts before each text, and so gives other ids; it was right for the other
texts that were tried. In transformers 4 `LlamaTokenizer` was SentencePiece itself.
"""


def model_card(contents, dtype, merges_spaces):
    """Writes the card.

    Args:
        contents: `contents.Contents`.
        dtype: string, of the exported weights.
        merges_spaces: bool, whether its tokenizer merges runs of spaces; `None` if
            there is no tokenizer.

    Returns:
        String, Markdown with a YAML header as the Hugging Face Hub reads it.
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

`tokenizer.json` gives the token ids of `tokenizer.model` under SentencePiece, compared
with it when it was written. Take **AutoTokenizer**. It puts the start token before a
text where the Keras model's preprocessor did. Unlike SentencePiece, transformers takes
strings such as `<s>` and `</s>` in a text for control tokens;
`split_special_tokens=True` makes them text.
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
python convert_hf_to_gguf.py PATH --outfile model.gguf --outtype f16
```
"""
    if hidden_dim % 256:
        text += f"""
The width, {hidden_dim}, is no multiple of 256, the block of llama.cpp's K-quants
(`Q4_K_M` and the like): llama-quantize puts larger types in their place. `Q8_0`, `Q5_0`
and `Q4_0`, of blocks of 32, do as they say.
"""
    if merges_spaces:
        text += """
llama.cpp does not merge runs of spaces as this tokenizer does: merge them in the text
before you give it to llama.cpp.
"""
    return text


def _provenance(contents, preset):
    if preset is None:
        where = "It is not known here where the weights are from."
        if contents.origin:
            where = f"The weights were loaded from {contents.origin}."
        return f"""\
## Licence and provenance

{where} State their licence and training data here before you publish
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
## Licence and provenance

The weights were loaded from `{preset.name}`{where}, whose licence is {preset.license}.
If they were changed since, by fine-tuning for instance, that is not told here.
{notice}
{preset.description}

Trained on {_count(provenance["trained_tokens"])} tokens, with
{provenance["trained_with"]}. Training data:

{sources}
"""


def _count(number):
    return f"{number:,}" if isinstance(number, int) else number
