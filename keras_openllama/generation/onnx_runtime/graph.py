"""The network with a KV cache as a graph of ONNX operators.

The operators are those that ONNX Runtime has for language models on CPUs: products with
quantized matrices (`MatMulNBits`), and attention that rotates queries and keys and
updates the cache in place (`GroupQueryAttention`); or those of
`keras_openllama/native/`. Projections of the same inputs are one product, so that the
inputs are rounded and the threads are started once.

Inputs and outputs have the names of ONNX Runtime GenAI:

    input_ids                        int64 (batch, length), the same length of each
    attention_mask                   int64 (batch, total): 1 for the tokens in the cache
                                     and the new ones, the sum for each sequence; with
                                     the compiled attention there is `last_positions`,
                                     int32 (batch,), the sum minus 1, instead of it
    past_key_values.{layer}.key      float32 (batch, heads, columns, head size)
    past_key_values.{layer}.value    the same; `present.{layer}.…` may be its memory.
                                     With the compiled attention there are no such
                                     outputs, and it is in float16, bfloat16 or int8,
                                     which has `past_key_values.{layer}.{…}_scales`,
                                     float32 (batch, heads, columns)
    cos, sin                         float32 (positions, half a head), if not constant
    first_logit                      int64 (1,): minus the number of last tokens with
                                     logits; only beside `cos`, otherwise it is 1
    logits                           float32 (batch, number, vocabulary)

ONNX Runtime's attention needs halves of heads that are a multiple of 8. Others are
padded by zeros, as the 50 of OpenLLaMA 3B to 56.

Source: https://onnxruntime.ai/docs/reference/operators; the operators' documentation in
`microsoft/onnxruntime`, `docs/ContribOperators.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_openllama.backend.arrays import as_numpy
from keras_openllama.backend.keras_private import (
    embeddings_variable,
    kernel_variable,
)
from keras_openllama.generation.onnx_runtime.file import (
    MICROSOFT,
    PACKAGE_DOMAIN,
    OnnxGraph,
    Weight,
)
from keras_openllama.generation.onnx_runtime.matrices import JoinedMatrix, can_be_joined
from keras_openllama.generation.onnx_runtime.tiles import TiledMatrix

if TYPE_CHECKING:
    from keras_openllama.backend.keras_hub import CausalLM

CACHES = ("key", "value")
# `accuracy_level` of `MatMulNBits`: 4 rounds activations to 8 bits in each group, as
# llama.cpp does; 1 does not, and is 15 to 40 times slower for single rows.
ACTIVATION_ACCURACY = 4


def padded_half_head(head_dim: int) -> int:
    """Returns the size of half a head for ONNX Runtime's own attention.

    Args:
        head_dim: size of a head.

    Example:
        >>> padded_half_head(128), padded_half_head(100)
        (64, 56)
    """
    return -(-head_dim // 16) * 8


def rotary_tables(model: CausalLM, positions: int, half: int) -> dict[str, np.ndarray]:
    """Returns the inputs `cos` and `sin` of the graph.

    Args:
        model: `OpenLlamaCausalLM` without dynamic RoPE scaling.
        positions: number of positions.
        half: size of half a head in the graph.

    Returns:
        float32 arrays `(positions, half)`.
    """
    backbone = model.backbone
    lengths = np.array([positions], "int32")
    tables = backbone.rotary_embedding(np.arange(positions)[None], lengths)
    padding = ((0, 0), (0, half - backbone.head_dim // 2))
    arrays = [np.pad(as_numpy(table)[0, 0], padding) for table in tables]
    return dict(zip(("cos", "sin"), arrays, strict=True))


def cache_dtype(model: CausalLM) -> str:
    """Returns the dtype of the cache for the compiled attention.

    Args:
        model: `OpenLlamaCausalLM`.

    Example:
        >>> cache_dtype(lm)
        'float16'
    """
    if model.kv_cache_dtype is not None:
        return model.kv_cache_dtype
    # What float16 rounds is little beside the rounding of activations to 8 bits.
    in_bfloat16 = model.backbone.compute_dtype == "bfloat16"
    return "bfloat16" if in_bfloat16 else "float16"


def decoder_graph(
    model: CausalLM, positions: int | None = None, lanes: int | None = None
) -> OnnxGraph:
    """Returns the graph of a model; its weights are read when it is saved.

    Args:
        model: `OpenLlamaCausalLM`.
        positions: number of positions for which the graph has the rotary tables;
            `None` makes them inputs.
        lanes: the lanes of the compiled operators of `native_library`, which the graph
            uses, products where they support a matrix; `None` uses ONNX Runtime's own
            only. With them, float weights are used where they are in memory.

    Returns:
        The graph, see the module's documentation.
    """
    return _DecoderGraph(model, positions, lanes).graph


class _DecoderGraph:
    def __init__(self, model, positions, lanes):
        self.model, self.graph, self.lanes = model, OnnxGraph(), lanes
        backbone = model.backbone
        self.half = backbone.head_dim // 2
        if not self.lanes:
            self.half = padded_half_head(backbone.head_dim)
        self.heads = backbone.num_query_heads, backbone.num_key_value_heads
        self._add_rotary_tables(positions)
        self._add_inputs()
        residual, update = self._embed(backbone.token_embedding), ""
        for i, layer in enumerate(backbone.transformer_layers):
            residual, update = self._layer(f"layer.{i}", i, layer, residual, update)
        normed, _ = self._norm("final_norm", backbone.final_norm, residual, update)
        last, number = self._positions_with_logits(normed, positions)
        (logits,) = self._project("head", last, [model.lm_head])
        self.graph.add("Identity", [logits], "logits")
        shape = ["batch", number, backbone.vocabulary_size]
        self.graph.output("logits", "float32", shape)

    def _positions_with_logits(self, x, positions):
        """Adds the selection of the positions with logits; returns their number too."""
        if positions is not None:
            last = self.graph.add("Gather", [x, "minus_one"], "last_hidden", axis=1)
            return last, 1
        self.graph.input("first_logit", "int64", [1])
        end = self.graph.constant("int32_max", [2**31 - 1])
        inputs = [x, "first_logit", end, "axis_1"]
        return self.graph.add("Slice", inputs, "last_hidden"), "num_logits"

    def _add_rotary_tables(self, positions):
        if positions is None:
            for name in ("cos", "sin"):
                self.graph.input(name, "float32", ["positions", self.half])
            return
        for name, table in rotary_tables(self.model, positions, self.half).items():
            self.graph.weight(name, Weight.of(table))

    def _add_inputs(self):
        """Adds the tokens, and the last positions or the mask that gives them."""
        graph = self.graph
        graph.input("input_ids", "int64", ["batch", "length"])
        graph.constant("one", 1)
        graph.constant("minus_one", [-1])
        axis = graph.constant("axis_1", [1])
        if self.lanes:
            graph.input("last_positions", "int32", ["batch"])
            return
        graph.input("attention_mask", "int64", ["batch", "total"])
        counts = graph.add("ReduceSum", ["attention_mask", axis], "counts", keepdims=0)
        last = graph.add("Sub", [counts, "one"], "last_positions_int64")
        graph.cast(last, "last_positions", "int32")
        shape = graph.add("Shape", ["attention_mask"], "mask_shape")
        total = graph.add("Gather", [shape, "one"], "total_length_int64", axis=0)
        graph.cast(total, "total_length", "int32")

    def _embed(self, layer):
        """Adds the embedding and returns its output."""
        matrix = layer.quantized_matrix()
        if matrix is None:
            values = as_numpy(embeddings_variable(layer).value)
            if self.lanes and keras.config.backend() != "tensorflow":
                table = self.graph.array("embedding.table", values)
            else:
                table = self.graph.weight("embedding.table", Weight.of(values))
            rows = self.graph.add("Gather", [table, "input_ids"], "embedding.rows")
            return self.graph.cast(rows, "embedding", "float32")
        joined = JoinedMatrix([matrix])
        shape = matrix.values.shape  # Here the last group is not filled up.
        weight = Weight(
            *(shape, "uint8"),
            lambda: joined.values().reshape(shape[0], -1)[:, : shape[1]],
        )
        values = self.graph.weight("embedding.values", weight)
        inputs = [values, "input_ids", self._scales("embedding", joined)]
        if joined.has_zeros:
            inputs.append(self._zeros("embedding", joined))
        return self.graph.add(
            *("GatherBlockQuantized", inputs, "embedding", MICROSOFT),
            bits=joined.bits,
            block_size=joined.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _layer(self, name, index, layer, residual, update):
        """Adds a decoder layer; returns the residual and what is added to it next."""
        normed, residual = self._norm(
            f"{name}.attention_norm", layer.self_attention_norm, residual, update
        )
        update = self._attend(name, index, layer.self_attention, normed)
        normed, residual = self._norm(
            f"{name}.feedforward_norm", layer.feedforward_norm, residual, update
        )
        return residual, self._feed_forward(name, layer.feedforward, normed)

    def _norm(self, name, layer, residual, update):
        """Adds `residual + update` and its norm; returns the norm and the sum."""
        scale = as_numpy(layer.scale.value).astype("float32")
        weight = self.graph.weight(f"{name}.scale", Weight.of(scale))
        epsilon = self.model.backbone.layer_norm_epsilon
        if not update:
            normed = self.graph.add(
                *("SimplifiedLayerNormalization", [residual, weight], name),
                axis=-1,
                epsilon=epsilon,
                stash_type=1,
            )
            return normed, residual
        normed, _, _, total = self.graph.add(
            "SkipSimplifiedLayerNormalization",
            [residual, update, weight],
            [name, "", "", f"{name}.sum"],
            MICROSOFT,
            epsilon=epsilon,
        )
        return normed, total

    def _attend(self, name, index, attention, x):
        projections = [attention.query, attention.key, attention.value]
        qkv = self._project_heads(f"{name}.qkv", x, projections)
        if self.lanes:
            context = self._attend_compiled(name, index, qkv)
        else:
            context = self._attend_padded(name, index, qkv)
        (output,) = self._project(
            f"{name}.attention_output", context, [attention.output_projection]
        )
        return output

    def _attend_compiled(self, name, index, qkv):
        heads, kv_heads = self.heads
        dtype, shape = cache_dtype(self.model), ["batch", kv_heads, "columns"]
        caches = [f"past_key_values.{index}.{kind}" for kind in CACHES]
        for cache in caches:
            self.graph.input(cache, dtype, [*shape, 2 * self.half])
        scales = [f"{cache}_scales" for cache in caches] if dtype == "int8" else []
        for scale in scales:
            self.graph.input(scale, "float32", shape)
        return self.graph.add(
            "CachedAttention",
            [qkv, *caches, "last_positions", "cos", "sin", *scales],
            f"{name}.context",
            PACKAGE_DOMAIN,
            num_heads=heads,
            kv_num_heads=kv_heads,
        )

    def _attend_padded(self, name, index, qkv):
        heads, kv_heads = self.heads
        head_dim = self.model.backbone.head_dim
        past, present = [], []
        for kind in CACHES:
            for names, prefix in ((past, "past_key_values"), (present, "present")):
                names.append(f"{prefix}.{index}.{kind}")
            shape = ["batch", kv_heads, "columns", 2 * self.half]
            self.graph.input(past[-1], "float32", shape)
            self.graph.output(present[-1], "float32", shape)
        context, *_ = self.graph.add(
            "GroupQueryAttention",
            [qkv, "", "", *past, "last_positions", "total_length", "cos", "sin"],
            [f"{name}.context", *present],
            MICROSOFT,
            num_heads=heads,
            kv_num_heads=kv_heads,
            do_rotary=1,
            scale=head_dim**-0.5,
        )
        return self._without_padding(f"{name}.context", context, head_dim // 2)

    def _project_heads(self, name, x, projections):
        """The queries, keys and values of all heads, padded, as one value."""
        half = self.model.backbone.head_dim // 2
        outputs = sum(projection.matrix_shape[0] for projection in projections)
        rows = np.full((outputs // half, self.half), -1)
        rows[:, :half] = np.arange(outputs).reshape(-1, half)
        rows = None if half == self.half else rows.reshape(-1)
        if not any(layer.adapters() for layer in projections):
            joined = self._multiply_joined(name, x, projections, rows)
            if joined:
                return joined
        parts = self._project(name, x, projections)
        joined = self.graph.add("Concat", parts, f"{name}.joined", axis=-1)
        if rows is None:
            return joined
        # An additional column of zeros, from which the padding is gathered.
        pads = self.graph.constant("one_column", [0, 0, 0, 0, 0, 1])
        padded = self.graph.add("Pad", [joined, pads], f"{name}.padded")
        index = self.graph.constant("padded_heads", np.where(rows < 0, outputs, rows))
        return self.graph.add("Gather", [padded, index], name, axis=-1)

    def _without_padding(self, name, x, half):
        if half == self.half:
            return x
        graph = self.graph
        graph.constant("half_heads", [0, 0, -1, self.half])
        graph.constant("start", [0])
        graph.constant("half", [half])
        graph.constant("last_axis", [3])
        graph.constant("flat", [0, 0, -1])
        x = graph.add("Reshape", [x, "half_heads"], f"{name}.halves")
        x = graph.add("Slice", [x, "start", "half", "last_axis"], f"{name}.unpadded")
        return graph.add("Reshape", [x, "flat"], f"{name}.flat")

    def _feed_forward(self, name, layer, x):
        if gated := self._feed_forward_gated(name, layer, x):
            return gated
        gate, up = self._project(f"{name}.gate_up", x, [layer.gate, layer.up])
        # With alpha 1 this is the SiLU.
        silu = self.graph.add("QuickGelu", [gate], f"{name}.silu", MICROSOFT, alpha=1.0)
        product = self.graph.add("Mul", [silu, up], f"{name}.product")
        (output,) = self._project(f"{name}.down", product, [layer.down])
        return output

    def _feed_forward_gated(self, name, layer, x):
        """The same with the activation in the last product, if that is compiled."""
        layers = layer.gate, layer.up, layer.down
        if not self._is_compiled(layer.down) or any(x.adapters() for x in layers):
            return None
        joined = self._multiply_joined(f"{name}.gate_up", x, layers[:2])
        if joined is None:
            return None
        return self._multiply_joined(f"{name}.down", joined, layers[2:], gated=True)

    def _project(self, name, x, projections):
        """Adds projections of the same inputs and returns their outputs."""
        names = [f"{name}.{i}" for i in range(len(projections))]
        joined = self._multiply_joined(name, x, projections)
        if joined is None:
            outputs = [
                self._project_one(*arguments, x)
                for arguments in zip(names, projections, strict=True)
            ]
        elif len(projections) == 1:
            outputs = [joined]
        else:
            sizes = [projection.matrix_shape[0] for projection in projections]
            sizes = self.graph.constant(f"{'_'.join(map(str, sizes))}_outputs", sizes)
            outputs = self.graph.add("Split", [joined, sizes], names, axis=-1)
        return [
            self._add_adapters(output, x, projection)
            for output, projection in zip(outputs, projections, strict=True)
        ]

    def _project_one(self, name, projection, x):
        matrix = projection.quantized_matrix()
        if matrix is not None:
            return self._multiply(name, x, JoinedMatrix([matrix]))
        return self._multiply_float(name, x, kernel_variable(projection))

    def _is_compiled(self, projection):
        """Whether a compiled product multiplies by the matrix of a projection."""
        matrix = projection.quantized_matrix()
        if matrix is not None:
            return bool(self.lanes) and JoinedMatrix([matrix]).can_be_tiled
        return bool(self.lanes) and kernel_variable(projection).dtype == "bfloat16"

    def _multiply_joined(self, name, x, projections, rows=None, gated=False):
        """Adds one product with the matrices of all projections, without adapters.

        It returns `None` if there is no such product. `rows` is explained in
        `JoinedMatrix`, and `gated`, for a compiled product, in `onnx_operators.c`.
        """
        matrices = [projection.quantized_matrix() for projection in projections]
        if all(matrix is not None for matrix in matrices) and can_be_joined(matrices):
            return self._multiply(name, x, JoinedMatrix(matrices, rows), gated)
        variables = [kernel_variable(projection) for projection in projections]
        if all(map(self._is_compiled, projections)) and not any(
            matrix is not None for matrix in matrices
        ):
            return self._multiply_dense(name, x, variables, gated)
        return None

    def _multiply(self, name, x, matrix, gated=False):
        """Adds a product with a quantized matrix."""
        if self.lanes and matrix.can_be_tiled:
            return self._multiply_tiles(name, x, TiledMatrix(matrix, self.lanes), gated)
        values = Weight(matrix.values_shape, "uint8", matrix.values)
        inputs = [x, self.graph.weight(f"{name}.values", values)]
        inputs.append(self._scales(name, matrix))
        if matrix.has_zeros:
            inputs.append(self._zeros(name, matrix))
        outputs, columns = matrix.shape
        return self.graph.add(
            *("MatMulNBits", inputs, f"{name}.outputs", MICROSOFT),
            K=columns,
            N=outputs,
            bits=matrix.bits,
            block_size=matrix.group_size,
            accuracy_level=ACTIVATION_ACCURACY,
        )

    def _multiply_tiles(self, name, x, tiles, gated):
        words = Weight(tiles.words_shape, "uint8", tiles.words, in_memory=True)
        scales = Weight(tiles.scales_shape, "float16", tiles.scales, in_memory=True)
        inputs = [
            x,
            self.graph.weight(f"{name}.words", words),
            self.graph.weight(f"{name}.scales", scales),
        ]
        return self.graph.add(
            *("QuantizedProduct", inputs, f"{name}.outputs", PACKAGE_DOMAIN),
            bits=tiles.matrix.bits,
            N=tiles.matrix.shape[0],
            groups_per_scale=tiles.groups_per_scale,
            gated=int(gated),
        )

    def _multiply_dense(self, name, x, variables, gated=False):
        weights = [
            self.graph.array(f"{name}.weights.{i}", as_numpy(variable.value))
            for i, variable in enumerate(variables)
        ]
        return self.graph.add(
            *("DenseProduct", [x, *weights], f"{name}.outputs", PACKAGE_DOMAIN),
            gated=int(gated),
        )

    def _scales(self, name, matrix):
        weight = Weight(matrix.scales_shape, "float32", matrix.scales)
        return self.graph.weight(f"{name}.scales", weight)

    def _zeros(self, name, matrix):
        weight = Weight(matrix.zeros_shape, "uint8", matrix.zeros)
        return self.graph.weight(f"{name}.zeros", weight)

    def _multiply_float(self, name, x, variable):
        """Adds a product with the transpose of a float kernel."""
        if self.lanes and variable.dtype == "bfloat16":
            return self._multiply_dense(name, x, [variable])
        shape = tuple(variable.shape)[::-1]

        def transposed():
            return as_numpy(variable.value).astype("float32").T

        kernel = self.graph.weight(
            f"{name}.kernel", Weight(shape, "float32", transposed)
        )
        return self.graph.add("MatMul", [x, kernel], f"{name}.outputs")

    def _add_adapters(self, outputs, x, projection):
        """Adds the product with the adapters of a projection, if it has any."""
        if not projection.adapters():
            return outputs
        name = f"{outputs}.adapted"
        factor_a, factor_b = projection.adapters().values()
        narrow = self._multiply_float(f"{name}.inner", x, factor_b)
        added = self._multiply_float(f"{name}.outer", narrow, factor_a)
        scale = projection.lora_alpha / projection.lora_rank
        factor = self.graph.constant(f"{name}.scale", scale, "float32")
        scaled = self.graph.add("Mul", [added, factor], f"{name}.scaled")
        return self.graph.add("Add", [outputs, scaled], name)
