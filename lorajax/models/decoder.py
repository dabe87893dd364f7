"""The decoder that all families share: differences between families are options, not classes."""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray
from lorajax_kernels import (
    Adapter,
    attention,
    geglu,
    lora_linears,
    rms_norm,
    rope,
    segments,
    swiglu,
    swiglu_lora_linear,
)
from lorajax_kernels.precision import MULTIPLE

from lorajax.lora.config import LoRAConfig
from lorajax.memory.chunks import in_chunks
from lorajax.memory.layers import run_layers
from lorajax.memory.policy import Checkpointing
from lorajax.models.rope import RopeOptions, Rotation, rope_angles

# hidden_act of config.json -> (gate [*rows, F], up [*rows, F]) -> [*rows, F].
GATES: dict[str, Callable[[Array, Array], Array]] = {
    "silu": swiglu,
    "gelu": functools.partial(geglu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(geglu, approximate=True),
    "relu": lambda gate, up: jax.nn.relu(gate) * up,
}

# What mixes tokens: (q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H].
Attend = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True)
class DecoderOptions:
    """Shapes and switches of one decoder. Sizes are in elements.

    Attributes:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: F.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: K, key/value heads; N is a multiple of K.
        head_dim: H; N * H need not be D.
        max_position: what the config calls max_position_embeddings, in tokens.
        norm_epsilon: added to the mean square in RMSNorm.
        activation: one of GATES: how gate and up meet.
        tie_embeddings: the head is the embedding table.
        qkv_bias, output_bias, mlp_bias: which projections carry a bias.
        rope: position encoding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rope: RopeOptions = field(default_factory=RopeOptions)

    @property
    def context_length(self) -> int:
        """Longest text that the model takes, in tokens: linear and dynamic scaling stretch max_position."""
        stretched = self.rope.type in ("linear", "dynamic")
        return int(self.max_position * self.rope.factor) if stretched else self.max_position


# Of a block, by path.
PROJECTIONS = (
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_SHARED_INPUTS = ((0, 1, 2), (3,), (4, 5), (6,))
# Shapes of the A and B of each of them, None where there is no adapter.
AdapterShapes = tuple[tuple[tuple[int, int], tuple[int, int]] | None, ...]


class LoRAParam(nnx.Param):
    """A leaf of an adapter, or all those of a block in one vector; float32."""


class Linear(nnx.Module):
    """y = x W^T + b + scale * dropout(x) A^T B^T; the last term is there once `lora_a` and `lora_b` are set.

    weight [out, in] in the model's dtype, as Hugging Face stores it; bias [out] or None;
    lora_a [R, in] and lora_b [out, R] in float32, or None. LoRA: Hu et al., 2021.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: jnp.dtype):
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), dtype))
        self.bias = nnx.data(nnx.Param(jnp.zeros((out_features,), dtype)) if bias else None)
        self.lora_a: LoRAParam | None = nnx.data(None)
        self.lora_b: LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    def plain(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        """Without the adapter, in x's dtype; float32 means float32, not the tensor cores' 19-bit format."""
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype), precision=precision)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    @property
    def bias_array(self) -> Float[Array, " out"] | None:
        return None if self.bias is None else self.bias[...]


def project(
    x: Float[Array, "*rows in"],
    linears: Sequence[Linear],
    adapters: Sequence[Adapter | None],
    norm: "RMSNorm | None" = None,
) -> tuple[Float[Array, "*rows _"], ...]:
    """Linear layers that share their input, together: with adapters, weights and biases are constants.

    Args:
        norm: of x, before the layers.
    """
    if all(adapter is None for adapter in adapters):
        x = x if norm is None else norm(x)
        return tuple(linear.plain(x) for linear in linears)
    weights, biases = [linear.weight[...] for linear in linears], [linear.bias_array for linear in linears]
    first = None if norm is None else (norm.weight[...], norm.epsilon)
    return lora_linears(x, weights, adapters, biases=biases, norm=first)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, weight [D]."""

    def __init__(self, features: int, epsilon: float, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return rms_norm(x, self.weight[...], epsilon=self.epsilon)


class Embedding(nnx.Module):
    """Token table, weight [V, D]."""

    def __init__(self, vocab_size: int, features: int, dtype: jnp.dtype):
        self.weight = nnx.Param(jnp.zeros((vocab_size, features), dtype))

    def __call__(self, tokens: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        return jnp.take(self.weight[...], tokens, axis=0).astype(dtype)


class Attention(nnx.Module):
    """Grouped-query attention projections; what mixes the tokens is handed in as `attend`."""

    def __init__(self, options: DecoderOptions, dtype: jnp.dtype):
        self.heads, self.head_dim = options.num_heads, options.head_dim
        query, key_value = self.heads * self.head_dim, options.num_kv_heads * self.head_dim
        self.q_proj = Linear(options.hidden_size, query, bias=options.qkv_bias, dtype=dtype)
        self.k_proj = Linear(options.hidden_size, key_value, bias=options.qkv_bias, dtype=dtype)
        self.v_proj = Linear(options.hidden_size, key_value, bias=options.qkv_bias, dtype=dtype)
        self.o_proj = Linear(query, options.hidden_size, bias=options.output_bias, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        rotation: Rotation,
        attend: Attend,
        adapters: "BlockAdapters",
    ) -> Float[Array, "B T D"]:
        """Of what `norm` makes of x."""
        batch, length, _ = x.shape
        linears = (self.q_proj, self.k_proj, self.v_proj)
        projected = project(x, linears, [adapters(i, linear) for i, linear in enumerate(linears)], norm)
        q, k, v = (y.reshape(batch, length, -1, self.head_dim) for y in projected)
        q, k = checkpoint_name(rope(q, *rotation), "query"), checkpoint_name(rope(k, *rotation), "key")
        mixed = attend(q, k, checkpoint_name(v, "value"))
        mixed = mixed.reshape(batch, length, self.heads * self.head_dim)
        return project(mixed, [self.o_proj], [adapters(3, self.o_proj)])[0]


class MLP(nnx.Module):
    """Gated feed-forward layer (Shazeer, 2020)."""

    def __init__(self, options: DecoderOptions, dtype: jnp.dtype):
        hidden, inner, bias = options.hidden_size, options.intermediate_size, options.mlp_bias
        self.activation = options.activation
        self.gate_proj = Linear(hidden, inner, bias=bias, dtype=dtype)
        self.up_proj = Linear(hidden, inner, bias=bias, dtype=dtype)
        self.down_proj = Linear(inner, hidden, bias=bias, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], norm: RMSNorm, adapters: "BlockAdapters", chunks: int = 1
    ) -> Float[Array, "B T D"]:
        """Of what `norm` makes of x.

        Args:
            chunks: parts of the tokens that are taken one after the other, see lorajax.memory.chunks.
        """
        if chunks == 1:
            return self._of_all(x, norm, adapters)
        graph, state = nnx.split((self, norm))
        length = x.shape[1]

        def of_some(arrays: Any, x: Array, number: int) -> Array:
            state, adapters = arrays
            mlp, norm = nnx.merge(graph, state)
            first = x.shape[0] * (length * number // chunks)
            return mlp._of_all(x, norm, adapters.from_token(first))

        # Without those of the attention: they would have gradients of zeros.
        return in_chunks(of_some, (state, adapters.without(4)), x, chunks=chunks)

    def _of_all(
        self, x: Float[Array, "B T D"], norm: RMSNorm, adapters: "BlockAdapters"
    ) -> Float[Array, "B T D"]:
        linears = (self.gate_proj, self.up_proj)
        gate, up = project(x, linears, [adapters(4 + i, linear) for i, linear in enumerate(linears)], norm)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")  # [B, T, F]
        down, adapter = self.down_proj, adapters(6, self.down_proj)
        if self.activation == "silu" and adapter is not None:
            return swiglu_lora_linear(gate, up, down.weight[...], adapter, bias=down.bias_array)
        return project(GATES[self.activation](gate, up), [down], [adapter])[0]


class Block(nnx.Module):
    """One pre-norm decoder layer. Its activations have the names of lorajax.memory.policy.

    Where `adapters` [N] is set, it holds every A and B of the layer, of `adapter_shapes`, one after the
    other, and its linear layers have none (training.weights.split_weights says why).
    """

    def __init__(self, options: DecoderOptions, dtype: jnp.dtype):
        self.attention_norm = RMSNorm(options.hidden_size, options.norm_epsilon, dtype)
        self.attention = Attention(options, dtype)
        self.mlp_norm = RMSNorm(options.hidden_size, options.norm_epsilon, dtype)
        self.mlp = MLP(options, dtype)
        self.adapters: LoRAParam | None = nnx.data(None)
        self.adapter_shapes: AdapterShapes = ()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        attend: Attend,
        dropout_keys: Key[Array, " P"] | None = None,
        first_token: Int[Array, ""] | int = 0,
        mlp_chunks: int = 1,
    ) -> Float[Array, "B T D"]:
        adapters = BlockAdapters.of(self, dropout_keys, first_token)
        x = x + self.attention(x, self.attention_norm, rotation, attend, adapters)
        x = checkpoint_name(x, "block_middle")
        return x + self.mlp(x, self.mlp_norm, adapters, mlp_chunks)

    def linears(self) -> tuple[Linear, ...]:
        """In the order of PROJECTIONS."""
        found: list[Any] = [operator.attrgetter(path)(self) for path in PROJECTIONS]
        return tuple(found)


class Place(NamedTuple):
    """Of an A (half 0) or a B (half 1) in the vector of a block: where its elements begin, and its shape."""

    projection: int
    half: int
    start: int
    shape: tuple[int, int]


@functools.cache
def adapter_places(shapes: AdapterShapes) -> tuple[Place, ...]:
    """In their order. The A of projections that share an input are side by side: kernels take them as one."""
    places, end = [], 0
    for group in _SHARED_INPUTS:
        for half in (0, 1):
            for projection in group:
                pair = shapes[projection]
                if pair is not None:
                    places.append(Place(projection, half, end, pair[half]))
                    end += math.prod(pair[half])
    return tuple(places)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def adapters_apart(
    shapes: AdapterShapes, vector: Float[Array, " N"]
) -> tuple[tuple[Array, Array] | None, ...]:
    """A and B of each projection of a block. Their gradients are joined at once, not added up one by one."""
    parts = {
        (place.projection, place.half): vector[place.start :][: math.prod(place.shape)].reshape(place.shape)
        for place in adapter_places(shapes)
    }
    return tuple(
        None if pair is None else (parts[number, 0], parts[number, 1]) for number, pair in enumerate(shapes)
    )


def _adapters_apart_forward(shapes: AdapterShapes, vector: Array) -> tuple[Any, None]:
    return adapters_apart(shapes, vector), None


def _adapters_apart_backward(shapes: AdapterShapes, _: None, gradients: Any) -> tuple[Array]:
    return (adapters_joined(shapes, gradients, jnp),)


adapters_apart.defvjp(_adapters_apart_forward, _adapters_apart_backward)


def adapters_joined(shapes: AdapterShapes, pairs: Sequence[Any], numpy: Any) -> Any:
    """The vector of A and B of each projection, made by a module such as numpy."""
    places = adapter_places(shapes)
    return numpy.concatenate([pairs[place.projection][place.half].ravel() for place in places])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "first", "apart", "vector"),
    meta_fields=("shapes",),
)
@dataclass(frozen=True)
class BlockAdapters:
    """The adapters of a block's projections, each with a dropout key of its own.

    Attributes:
        keys: of the dropout, for each projection; None: without.
        first: number of the first token among those that the keys are for; None: without keys.
        vector: of a block that holds its adapters in one, a constant; otherwise None.
        apart: A and B of each projection in it.
        shapes: of these.
    """

    keys: Key[Array, " P"] | None
    first: Int[Array, ""] | None
    vector: Float[Array, " N"] | None = None
    apart: tuple[tuple[Array, Array] | None, ...] = ()
    shapes: AdapterShapes = ()

    @classmethod
    def of(cls, block: Block, keys: Key[Array, " P"] | None, first: Int[Array, ""] | int) -> "BlockAdapters":
        found = None if keys is None else jnp.asarray(first, jnp.int32)
        if block.adapters is None:
            return cls(keys, found)
        vector, shapes = block.adapters[...], block.adapter_shapes
        return cls(keys, found, jax.lax.stop_gradient(vector), adapters_apart(shapes, vector), shapes)

    def __call__(self, number: int, linear: Linear) -> Adapter | None:
        """Of the projection of this number."""
        key = None if self.keys is None else self.keys[number]
        scale, dropout, first = linear.lora_scale, linear.lora_dropout, self.first
        if self.vector is None:
            a, b = linear.lora_a, linear.lora_b
            return None if a is None or b is None else Adapter(a[...], b[...], scale, dropout, key, first)
        pair = self.apart[number]
        if pair is None:
            return None
        places = adapter_places(self.shapes)
        starts = [place.start for place in places if place.projection == number]
        return Adapter(*pair, scale, dropout, key, first, self.vector, *starts)

    def without(self, first: int) -> "BlockAdapters":
        """Of the projections from this number on alone."""
        return replace(self, apart=self.apart and (*(None,) * first, *self.apart[first:]))

    def from_token(self, number: int) -> "BlockAdapters":
        """For tokens that begin so much later."""
        return self if self.first is None else replace(self, first=self.first + number)


class Decoder(nnx.Module):
    """A causal language model.

    Leaves, by path: embed.weight [V, D]; layers.I.{attention_norm,mlp_norm}.weight [D];
    layers.I.attention.{q,k,v,o}_proj and layers.I.mlp.{gate,up,down}_proj (see Linear); norm.weight [D];
    head.weight [V, D] unless the embeddings are tied. Weights are `nnx.Param`, adapters `LoRAParam`.

    Attributes:
        options: shapes and switches.
        dtype: of the activations (and, unless they are trained, of the weights).
        attention_implementation: name for lorajax_kernels.attention, or "auto".
        family: key of lorajax.models.FAMILIES.
        hf_config: the Hugging Face config.json that the model came with, as text.
        eos_token_ids: tokens at which generation stops, as the checkpoint names them.
        lora_config: what the adapter looks like, None without one.
    """

    def __init__(
        self,
        options: DecoderOptions,
        *,
        dtype: jnp.dtype = jnp.bfloat16,
        param_dtype: jnp.dtype | None = None,
        attention_implementation: str = "auto",
        family: str = "llama",
        hf_config: str = "{}",
    ):
        stored = jnp.dtype(dtype if param_dtype is None else param_dtype)
        self.options, self.dtype, self.family, self.hf_config = options, jnp.dtype(dtype), family, hf_config
        self.attention_implementation = attention_implementation
        self.lora_config: LoRAConfig | None = None
        self.eos_token_ids: tuple[int, ...] = ()
        self.embed = Embedding(options.vocab_size, options.hidden_size, stored)
        self.layers = nnx.List([Block(options, stored) for _ in range(options.num_layers)])
        self.norm = RMSNorm(options.hidden_size, options.norm_epsilon, stored)
        self.head = nnx.data(
            None
            if options.tie_embeddings
            else Linear(options.hidden_size, options.vocab_size, bias=False, dtype=stored)
        )

    @property
    def head_weight(self) -> Float[Array, "V D"]:
        return (self.embed if self.head is None else self.head).weight[...]

    def linears(self) -> dict[str, Linear]:
        """The blocks' projections by tree path, layer by layer: {"layers.0.attention.k_proj": ...}."""
        found = {}
        for i, block in enumerate(self.layers):
            for group in ("attention", "mlp"):
                # Sorted, as nnx.merge leaves them: a model just built has them in the order of its code.
                for name, module in sorted(vars(getattr(block, group)).items()):
                    if isinstance(module, Linear):
                        found[f"layers.{i}.{group}.{name}"] = module
        return found

    def rotation(self, positions: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Rotation:
        """Of RoPE, for all layers; lengths: of each token's segment."""
        return Rotation.by(rope_angles(self.options.rope, self.options.head_dim, positions, lengths))

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        max_segments: int | None = None,
        dropout_key: PRNGKeyArray | None = None,
        first_row: Int[Array, ""] | int = 0,
        checkpointing: Checkpointing | None = None,
        mlp_chunks: int = 1,
    ) -> Float[Array, "B T D"]:
        """Activations after the final norm, in the model's dtype.

        Args:
            tokens: token ids.
            segment_ids: equal ids mark one document; documents are contiguous in a row; 0 is padding.
                Default: one document per row.
            positions: position of each token in its document. Default: counted from the start of each
                segment.
            max_segments: most segments on a row, padding included; some attention kernels need a bound.
            dropout_key: key of the adapters' dropout; None switches it off.
            first_row: number of the first of these rows among those that share the key: dropout is the same
                whether they come at once or one after the other. (Not where an MLP takes parts of several
                rows.)
            checkpointing: what the layers keep for the backward pass (lorajax.memory.policy); None: what JAX
                keeps by itself.
            mlp_chunks: parts of a row's tokens that an MLP takes one after the other; more than one: it keeps
                its input alone.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = segments.positions(segment_ids)
        length = tokens.shape[1]
        # Otherwise in every product. With dropout whatever the number of rows: its masks count tokens.
        sizes = tokens.size if dropout_key is None else length
        if self.dtype.itemsize == 2 and sizes % MULTIPLE:
            padding = ((0, 0), (0, -length % MULTIPLE))
            tokens, segment_ids, positions = (jnp.pad(x, padding) for x in (tokens, segment_ids, positions))
            max_segments = max_segments and max_segments + 1  # the padding
        rotation = self.rotation(positions, segments.lengths(segment_ids))

        def attend(q: Array, k: Array, v: Array) -> Array:
            return attention(
                q, k, v, segment_ids, max_segments=max_segments, implementation=self.attention_implementation
            )

        hidden = self.run(
            tokens,
            rotation,
            attend,
            dropout_key=dropout_key,
            first_row=first_row,
            checkpointing=checkpointing,
            mlp_chunks=mlp_chunks,
        )
        return hidden[:, :length]

    def run(
        self,
        tokens: Int[Array, "B T"],
        rotation: Rotation,
        attend: Attend,
        *,
        dropout_key: PRNGKeyArray | None = None,
        first_row: Int[Array, ""] | int = 0,
        checkpointing: Checkpointing | None = None,
        mlp_chunks: int = 1,
    ) -> Float[Array, "B T D"]:
        """`hidden_states`, with what rotates and what mixes the tokens handed in.

        Args:
            rotation: of the tokens (see `rotation`).
            attend: called once by each layer, in their order.
        """

        keys = None
        if dropout_key is not None:
            # All at once: to make one in each layer would take longer to compile than the layer.
            keys = jax.random.split(dropout_key, (len(self.layers), len(PROJECTIONS)))
        first_token = first_row * tokens.shape[1]

        def layer(block: Block, index: int, x: Array) -> Array:
            own = None if keys is None else keys[index]
            return block(x, rotation, attend, own, first_token, mlp_chunks)

        x = self.embed(tokens, self.dtype)
        return self.norm(run_layers(layer, self.layers, x, checkpointing=checkpointing))

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Scores of the next token, float32."""
        precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        return jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.head_weight.astype(hidden.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32; arguments as in `hidden_states`. Compiled once per shape."""
        graph, state = nnx.split(self)
        tokens = jnp.asarray(tokens, jnp.int32)
        return _compiled_logits(graph, state, tokens, segment_ids, positions)


@functools.partial(jax.jit, static_argnums=0)
def _compiled_logits(graph, state, tokens, segment_ids, positions):
    model = nnx.merge(graph, state)
    return model.logits(model.hidden_states(tokens, segment_ids, positions))
