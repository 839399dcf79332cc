"""Files of other libraries: transformers, llama.cpp, ONNX Runtime and PEFT."""

from __future__ import annotations

from keras_openllama.utils.types import PathLike


class ExportMixin:
    """The methods of `OpenLlamaCausalLM` that write files for other libraries.

    Each of them imports its format when it is called: most processes write no file.
    """

    def export_to_transformers(
        self,
        path: PathLike,
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
        tokenizer: bool = True,
        force: bool = False,
    ) -> None:
        """Writes a directory that Hugging Face transformers can load.

        `AutoModelForCausalLM.from_pretrained(path)`,
        `AutoTokenizer.from_pretrained(path)` and `OpenLlamaCausalLM.from_preset(path)`
        load it without further arguments. Weights are written tensor by tensor, with
        LoRA adapters merged and quantized weights dequantized. The directory appears at
        `path` only when it is complete.

        Args:
            path: path of the new directory.
            dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` is the model's own.
            max_shard_size: maximum size of a file of weights, in bytes or as a string
                such as `"5GB"`.
            tokenizer: whether to write the tokenizer, if the model has one.
            force: whether to replace an existing directory that contains a model.

        Raises:
            ValueError: for an unknown dtype or size; if a value exceeds the range of
                the dtype; if the tokenizer of the model cannot be expressed in
                `tokenizer.json`.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> lm.export_to_transformers("my_model", dtype="bfloat16")
            >>> sorted(os.listdir("my_model"))[:3]
            ['README.md', 'config.json', 'generation_config.json']
        """
        from keras_openllama.checkpoints import contents, writer

        config = writer.ExportConfig(
            path,
            "transformers",
            dtype=dtype,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            force=force,
        )
        writer.write_model(contents.contents_of_model(self), config)

    def export_to_gguf(
        self,
        path: PathLike,
        quantization: str = "f16",
        tokenizer: bool = True,
        force: bool = False,
    ) -> None:
        """Writes a GGUF file, which llama.cpp and `from_preset` load.

        Weights are written tensor by tensor, with LoRA adapters merged. The file
        appears at `path` only when it is complete.

        Args:
            path: path of the new file.
            quantization: the type of the matrices: `"f32"`, `"f16"`, `"bf16"`,
                `"q8_0"`, `"q5_1"`, `"q5_0"`, `"q4_1"` or `"q4_0"`. Norms are float32.
                In the types of 4 and 5 bits, token embedding and head have 8 bits.
            tokenizer: whether to write the tokenizer, if the model has one.
            force: whether to replace an existing file.

        Raises:
            ValueError: for an unknown type; if a value exceeds the range of the type;
                if llama.cpp cannot apply the tokenizer.
            OSError: if the file exists already, or cannot be written.

        Example:
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm.export_to_gguf("nano.gguf", quantization="q8_0")
            >>> lm = OpenLlamaCausalLM.from_preset("nano.gguf")
        """
        from keras_openllama.checkpoints import contents, writer

        config = writer.ExportConfig(
            path, "gguf", quantization=quantization, tokenizer=tokenizer, force=force
        )
        writer.write_model(contents.contents_of_model(self), config)

    def export_to_onnx(self, path: PathLike, *, force: bool = False) -> None:
        """Writes the model as an ONNX graph, with its tokenizer.

        The graph computes a step with a KV cache. ONNX Runtime GenAI runs the directory
        without this package, and ONNX Runtime runs the graph; its inputs and outputs
        are described in `keras_openllama.generation.onnx_runtime.graph`. A quantized
        model stays quantized; other weights are written in float32. Adapters stay
        apart.

        Args:
            path: path of the new directory.
            force: whether to replace an existing directory that contains a model.

        Raises:
            ValueError: for dynamic RoPE scaling, or quantized groups whose size is not
                a multiple of 16.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.quantize("int4")
            >>> lm.export_to_onnx("nano_onnx")
            >>> sorted(os.listdir("nano_onnx"))[1:4]
            ['generation_config.json', 'model.onnx', 'model.onnx.data']
        """
        from keras_openllama.generation.onnx_runtime.export import export_to_onnx

        export_to_onnx(self, path, force)

    def save_adapters(self, path: PathLike, force: bool = False) -> None:
        """Writes the LoRA adapters as a directory that PEFT can load.

        Args:
            path: path of the new directory.
            force: whether to replace an existing directory that contains adapters.

        Raises:
            ValueError: if the model has no adapters.
            OSError: if the path exists already, or cannot be written.

        Example:
            >>> import os
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4)
            >>> lm.save_adapters("my_adapters")
            >>> "adapter_model.safetensors" in os.listdir("my_adapters")
            True
        """
        from keras_openllama.checkpoints import peft

        peft.save_adapters(self, path, force)

    def load_adapters(self, path: PathLike, revision: str | None = None) -> None:
        """Loads LoRA adapters that were saved by `save_adapters` or by PEFT.

        If the model has no adapters, they are first added, as by `enable_lora`, with
        the rank and target layers of the files.

        Args:
            path: path of the directory, or `"hf://user/repo"`.
            revision: branch, tag or commit of a repository on the Hugging Face Hub.

        Raises:
            ValueError: if the files are not LoRA adapters for this model, which is then
                left unchanged.
            OSError: if a file is unavailable or cannot be read.

        Example:
            >>> from keras_openllama import OpenLlamaCausalLM
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.backbone.enable_lora(4, ["query"])
            >>> lm.save_adapters("other_adapters")
            >>> lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
            >>> lm.load_adapters("other_adapters")
            >>> len(lm.trainable_variables)  # 4 layers, 2 matrices each
            8
        """
        from keras_openllama.checkpoints import peft
        from keras_openllama.loading.hub import open_repository

        peft.load_adapters(self, open_repository(path, revision))
