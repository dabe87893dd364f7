"""Packed attention by cuDNN, with a stand-in for cuDNN that reads and writes memory as cuDNN does."""

import dataclasses
import functools
import json
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lorajax_kernels import attention, choose_attention
from lorajax_kernels.attention import cudnn
from lorajax_kernels.attention.problem import Problem
from lorajax_kernels.device import Device

# A JAX that is not known yet is refused, and then there is nothing to test with it.
known_jax = pytest.mark.skipif(cudnn._why_not_this_jax(False) is not None, reason="this JAX is not known")
grouped_keys = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="older releases misplace grouped keys"
)
HOPPER = Device("a Hopper GPU", (9, 0), cudnn_version=91900)
PROBLEM = Problem(
    *(2, 256, 4, 4, 64, jnp.dtype(jnp.bfloat16)), window=None, softcap=None, max_segments=5, scale=0.1
)
HEADS = (4, 2) if jax.__version_info__ >= (0, 11) else (4, 4)  # older ones misplace grouped keys
# Two, four and five segments on a row.
SEGMENT_IDS = np.stack(
    [
        np.repeat([1, 0], [30, 18]),
        np.repeat([1, 2, 1, 0], [1, 20, 26, 1]),
        np.repeat([1, 2, 3, 4, 5], [1, 1, 3, 1, 42]),
    ]
)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Where a segment lies in flat memory, and its attention in float32."""

    length: int
    queries: slice
    keys: slice
    group: int
    scale: float
    window: int | None

    def cut(self, x, where):
        return x.reshape(-1)[where].reshape(self.length, -1, x.shape[-1])

    def scores(self, q, k):
        """[N, length, length], -inf where masked."""
        distance = np.arange(self.length)[:, None] - np.arange(self.length)
        visible = (distance >= 0) & (distance < (self.window or self.length))
        k = np.repeat(self.cut(k, self.keys), self.group, axis=1)
        scores = np.einsum("tnh,snh->nts", self.cut(q, self.queries), k) * self.scale
        return np.where(visible, scores, -np.inf)

    def forward(self, q, k, v):
        scores = self.scores(q, k)
        lse = np.log(np.exp(scores).sum(-1))
        v = np.repeat(self.cut(v, self.keys), self.group, axis=1)
        return np.einsum("nts,snh->tnh", np.exp(scores - lse[..., None]), v), lse

    def backward(self, q, k, v, lse, out, dout):
        p = np.exp(self.scores(q, k) - lse[..., None])
        q, out, dout = (self.cut(x, self.queries) for x in (q, out, dout))
        k, v = (np.repeat(self.cut(x, self.keys), self.group, axis=1) for x in (k, v))
        delta = (dout * out).sum(-1).T[..., None]  # [N, length, 1]
        ds = p * (np.einsum("tnh,snh->nts", dout, v) - delta) * self.scale
        dk, dv = np.einsum("nts,tnh->snh", ds, q), np.einsum("nts,tnh->snh", p, dout)
        shape = (self.length, -1, self.group, q.shape[-1])
        return np.einsum("nts,snh->tnh", ds, k), dk.reshape(shape).sum(2), dv.reshape(shape).sum(2)


def emulated(is_forward, window, scale, q, k, v, lengths, q_starts, k_starts, *residuals):
    """cuDNN: segment i is lengths[i] tokens from elements q_starts[i] and k_starts[i] of flat memory on."""
    tokens, heads, head_dim = q.shape[1:]
    results = [np.full(x.shape, np.nan, np.float32) for x in ((q,) if is_forward else (q, k, v))]
    stats = np.full((lengths.size, heads, tokens), np.nan, np.float32)
    for i in np.flatnonzero(lengths):
        length, starts = int(lengths.flat[i]), (q_starts.flat[i], k_starts.flat[i])
        queries, keys = (
            slice(start, start + length * x.shape[2] * head_dim)
            for start, x in zip(starts, (q, k), strict=True)
        )
        segment = Segment(length, queries, keys, heads // k.shape[2], scale, window)
        if is_forward:
            part, stats[i, :, :length] = segment.forward(q, k, v)
            parts = [part]
        else:
            lse, out, dout = residuals
            parts = segment.backward(q, k, v, lse[i, :, :length], out, dout)
        for result, where, part in zip(results, (queries, keys, keys), parts, strict=False):
            result.reshape(-1)[where] = part.ravel()
    return [*results, stats] if is_forward else results


@pytest.fixture
def stand_in(monkeypatch):
    """Puts it in cuDNN's place; JAX' own code still turns lengths and offsets into those of flat memory."""
    private = cudnn._private()

    def bind(
        q, k, v, bias, lengths, _, q_offsets, k_offsets, *more, scale, sliding_window_length, **settings
    ):
        pages, residuals = more[:2], more[2:]
        assert (bias.size, *(page.size for page in pages), settings["layout"]) == (0, 0, 0, 0)
        assert settings["mask_type"] == private.MaskType.PADDING_CAUSAL
        places = private._fix_seqlen_offsets(lengths, lengths, q_offsets, k_offsets, q, k)
        is_forward = not residuals
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ((q,) if is_forward else (q, k, v))]
        if is_forward:
            shapes.append(jax.ShapeDtypeStruct((lengths.size, q.shape[2], q.shape[1]), jnp.float32))
        found = jax.pure_callback(
            lambda *arrays: emulated(is_forward, sliding_window_length, scale, *map(np.asarray, arrays)),
            shapes,
            *(q, k, v, places[0], *places[2:], *residuals),
        )
        return found if settings.get("is_training", True) else found[:1]

    primitive = types.SimpleNamespace(bind=bind)
    fake = types.SimpleNamespace(
        MaskType=private.MaskType,
        AttentionLayout=private.AttentionLayout,
        _dot_product_attention_fwd_impl=private._dot_product_attention_fwd_impl,
        _dot_product_attention_fwd_p_wrapper=primitive,
        _dot_product_attention_bwd_p_wrapper=primitive,
    )
    monkeypatch.setattr(cudnn, "_private", lambda: fake)


def run(function, *arrays, segment_ids=SEGMENT_IDS):
    def forward_and_gradients(q, k, v, cotangent):
        out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, segment_ids), q, k, v)
        return [out, *vjp(cotangent)]

    return jax.jit(forward_and_gradients)(*arrays)


def arrays(batch, length, heads=HEADS):
    random = np.random.default_rng(0)
    shapes = [(batch, length, n, 8) for n in (heads[0], heads[1], heads[1], heads[0])]
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize(("window", "max_segments"), ((None, 5), (6, 7)))
def test_equals_the_reference(stand_in, window, max_segments):
    options = {"scale": 0.3, "window": window}
    ours = functools.partial(cudnn.cudnn_attention, softcap=None, max_segments=max_segments, **options)
    found = run(ours, *arrays(3, 48))
    expected = run(functools.partial(attention, implementation="reference", **options), *arrays(3, 48))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    forward = ours(*arrays(3, 48)[:3], SEGMENT_IDS)
    np.testing.assert_allclose(forward, expected[0], atol=1e-5)


@pytest.mark.parametrize(
    "heads", ((3, 3), pytest.param((6, 2), marks=grouped_keys), pytest.param((8, 1), marks=grouped_keys))
)
def test_equals_the_reference_with_any_heads(stand_in, heads):
    options = {"scale": 0.3, "window": 6}
    ours = functools.partial(cudnn.cudnn_attention, softcap=None, max_segments=6, **options)
    found = run(ours, *arrays(3, 48, heads))
    expected = run(functools.partial(attention, implementation="reference", **options), *arrays(3, 48, heads))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_single_segment_a_row(stand_in):
    segment_ids = np.ones((2, 16), np.int32)
    ours = functools.partial(cudnn.cudnn_attention, scale=0.3, window=None, softcap=None, max_segments=1)
    found = run(ours, *arrays(2, 16), segment_ids=segment_ids)
    reference = functools.partial(attention, implementation="reference", scale=0.3)
    for a, b in zip(found, run(reference, *arrays(2, 16), segment_ids=segment_ids), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_residual_is_one_number_a_token_and_head(stand_in):
    ours = functools.partial(cudnn.cudnn_attention, scale=0.3, window=None, softcap=None, max_segments=32)
    q, k, v, _ = arrays(3, 48)
    _, vjp = jax.vjp(lambda q, k, v: ours(q, k, v, SEGMENT_IDS), q, k, v)
    floats = [x.shape for x in jax.tree.leaves(vjp) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert sorted(floats) == sorted([q.shape, k.shape, v.shape, q.shape, (3, HEADS[0], 48)])


def test_saving_the_named_residuals_avoids_a_second_forward_pass(stand_in):
    ours = functools.partial(cudnn.cudnn_attention, scale=0.3, window=None, softcap=None, max_segments=5)
    q, k, v, _ = arrays(3, 48)

    def calls(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        inner = jax.checkpoint(lambda q, k, v: ours(q, k, v, SEGMENT_IDS), policy=policy)
        gradient = jax.grad(lambda q: jnp.sum(inner(q, k, v) ** 2))
        return str(jax.make_jaxpr(gradient)(q)).count("pure_callback[")

    assert calls("segment_bounds", "attention_output", "attention_lse") == 2  # forward, backward
    assert calls("segment_bounds") == 3


@known_jax
def test_what_jax_hands_to_cudnn():
    """Lowered for a GPU that is not there: the segments reach both calls, and the log-sum-exp the second."""
    shapes = [(4, 384, n, 64) for n in (8, 2, 2, 8)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    segment_ids = jax.ShapeDtypeStruct((4, 384), jnp.int32)

    def forward_and_backward(q, k, v, dout, segment_ids):
        def attend(q, k, v):
            options = {"scale": 0.1, "window": None, "softcap": None, "max_segments": 6}
            return cudnn.cudnn_attention(q, k, v, segment_ids, **options)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(dout)

    traced = jax.jit(forward_and_backward).trace(*arrays, segment_ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(\S*fmha\w*)\(.*? : \((.*)\) -> \((.*)\)", text)
    q, kv, stats = "tensor<4x384x8x64xbf16>", "tensor<4x384x2x64xbf16>", "tensor<24x8x384xf32>"
    segments = "tensor<4x6xi32>, tensor<4x6xi32>, tensor<4x7xi32>, tensor<4x7xi32>"
    (forward, taken, made), (backward, taken_back, _) = calls
    assert (forward, backward) == ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
    assert taken == f"{q}, {kv}, {kv}, {segments}" and stats in made
    assert taken_back == f"{q}, {kv}, {kv}, {stats}, {q}, {q}, {segments}"


row = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(row, min_size=2, max_size=2), st.sampled_from((7, 9)))
def test_log_sum_exp_survives_the_way_to_cudnn_and_back(rows, max_segments):
    runs = [[i for i, n in row for _ in range(n)] for row in rows]
    length = 32
    segment_ids = np.array([(ids + [0] * length)[:length] for ids in runs], np.int32)
    starts, lengths = cudnn.segments.starts_and_lengths(segment_ids, max_segments)
    rank = cudnn.segments.ranks(segment_ids)
    lse = np.random.default_rng(0).normal(size=(2, 3, length)).astype(np.float32)
    stats = np.array(cudnn._by_segment(lse, starts))
    for i, n in enumerate(np.asarray(lengths).ravel()):
        stats[i, :, n:] = np.nan
    np.testing.assert_array_equal(cudnn._by_token(stats, starts, rank), lse)


def test_says_why_it_cannot_serve(monkeypatch):
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)

    def why_not(device=HOPPER, **change):
        return cudnn.why_not(dataclasses.replace(PROBLEM, **change), device)

    assert why_not() is None
    assert "compute capability 9.0" in why_not(Device("an Ampere GPU", (8, 0), 91900))
    assert "compute capability 9.0" in why_not(Device("cpu"))
    assert "not installed" in why_not(dataclasses.replace(HOPPER, cudnn_version=None))
    assert "float32" in why_not(dtype=jnp.dtype(jnp.float32))
    assert "not 60" in why_not(head_dim=60)
    assert "not 264" in why_not(head_dim=264)
    assert "softcap" in why_not(softcap=30.0)
    assert "positive scales alone, not 0.0" in why_not(scale=0.0)
    assert "positive scales alone, not -0.1" in why_not(scale=-0.1)
    assert "max_segments" in why_not(max_segments=None)
    largest = {"batch": 64, "length": 8192, "heads": 32, "kv_heads": 2, "head_dim": 128}
    assert "q has 2,147,483,648 elements" in why_not(**largest)
    assert why_not(**largest | {"length": 8064}) is None


@pytest.mark.parametrize("scale", (0, 0.0, -0.1))
def test_auto_goes_on_to_triton_where_the_scale_is_not_positive(scale, monkeypatch):
    """One document and padding, heads of 128: otherwise cuDNN comes first."""
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)
    q = jax.ShapeDtypeStruct((2, 256, 4, 128), jnp.bfloat16)
    segment_ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    choose = functools.partial(choose_attention, q, q, q, segment_ids, max_segments=2, device=HOPPER)
    assert choose().name == choose(scale=0.1).name == "cudnn"
    name, refused = choose(scale=scale)
    assert name == "triton" and list(refused) == ["cudnn"] and "positive scales" in refused["cudnn"]
    with pytest.raises(ValueError, match="'cudnn' cannot serve: it is tried with positive scales alone"):
        choose(scale=scale, implementation="cudnn")


@known_jax
def test_is_not_trusted_with_a_jax_it_does_not_know(monkeypatch):
    grouped = cudnn._why_not_this_jax(True)
    assert (grouped is None) == (jax.__version_info__ >= (0, 11))
    cudnn._why_not_this_jax.cache_clear()
    private = cudnn._private()
    monkeypatch.setattr(private, "_dot_product_attention_fwd_impl", lambda query, key: None)
    assert "_dot_product_attention_fwd_impl" in cudnn._why_not_this_jax(False)
    cudnn._why_not_this_jax.cache_clear()
    monkeypatch.delattr(private, "_dot_product_attention_fwd_impl")
    assert "_dot_product_attention_fwd_impl" in cudnn._why_not_this_jax(False)
    cudnn._why_not_this_jax.cache_clear()


@grouped_keys
def test_the_probe_passes_what_is_right(stand_in):
    assert cudnn._probe(16, True, True, jnp.dtype(jnp.float32)) <= 1e-5


def test_the_probe_catches_wrong_offsets(stand_in, monkeypatch):
    assert cudnn._probe(16, False, False, jnp.dtype(jnp.float32)) <= 1e-5
    right = cudnn.segments.starts_and_lengths

    def wrong(segment_ids, max_segments):
        starts, lengths = right(segment_ids, max_segments)
        return starts.at[0, 2].add(-1), lengths

    monkeypatch.setattr(cudnn.segments, "starts_and_lengths", wrong)
    assert not cudnn._probe(16, False, False, jnp.dtype(jnp.float32)) <= 2e-2


def test_what_the_probe_finds_is_the_reason(monkeypatch):
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)
    monkeypatch.setattr(cudnn, "current_device", lambda: HOPPER)
    cudnn._failed_probe.cache_clear()
    monkeypatch.setattr(cudnn, "_probe", lambda *kind: 0.3)
    assert "error of 3.0e-01" in cudnn.why_not(PROBLEM, HOPPER)
    cudnn._failed_probe.cache_clear()
    monkeypatch.setattr(cudnn, "_probe", lambda *kind: float("nan"))
    assert "error of nan" in cudnn.why_not(PROBLEM, HOPPER)
    cudnn._failed_probe.cache_clear()

    def fails(*kind):
        raise RuntimeError("no plan found\nand more")

    monkeypatch.setattr(cudnn, "_probe", fails)
    assert cudnn.why_not(PROBLEM, HOPPER).endswith("no plan found")
    cudnn._failed_probe.cache_clear()


def test_what_was_right_once_is_not_tried_again(monkeypatch, compilation_cache):
    errors = iter([0.3, 1e-3])
    monkeypatch.setattr(cudnn, "_why_not_this_jax", lambda is_grouped: None)
    monkeypatch.setattr(cudnn, "current_device", lambda: HOPPER)
    monkeypatch.setattr(cudnn, "_probe", lambda *kind: next(errors))

    def of_a_new_process(problem=PROBLEM):
        cudnn._failed_probe.cache_clear()
        return cudnn.why_not(problem, HOPPER)

    assert "error of 3.0e-01" in of_a_new_process()
    assert of_a_new_process() is None
    assert of_a_new_process() is None
    with pytest.raises(StopIteration):
        next(errors)
    # Another kind is another matter.
    assert "StopIteration" in of_a_new_process(dataclasses.replace(PROBLEM, head_dim=PROBLEM.head_dim * 2))
    cudnn._failed_probe.cache_clear()


def test_asking_for_it_on_a_cpu_raises():
    q = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="'cudnn' cannot serve: packed rows need compute capability 9.0"):
        attention(q, q, q, jnp.ones((1, 8), jnp.int32), max_segments=2, implementation="cudnn")
    assert choose_attention(q, q, q, jnp.ones((1, 8), jnp.int32), max_segments=2).name == "xla"


# --- for a GPU that is not there ---


def recorded_workspaces():
    """(B, T, N, K, H, segments, bytes) of kernels.py on an H200: temporary memory of both passes."""
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels-h200.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if found := re.fullmatch(r"B(\d+) T(\d+) N(\d+) K(\d+) H(\d+), max_segments (\d+)", row["case"]):
            megabytes = re.match(r"(\d+) MB of temporary memory", row["note"])
            yield *map(int, found.groups()), 10**6 * int(megabytes[1])


def test_the_workspace_is_that_of_the_kernel():
    recorded = list(recorded_workspaces())
    assert len(recorded) >= 5 and any(heads == kv_heads for _, _, heads, kv_heads, *_ in recorded)
    for batch, length, heads, kv_heads, head_dim, segments, taken in recorded:
        q, k = ((batch, length, n, head_dim) for n in (heads, kv_heads))
        assert cudnn.workspace_bytes(batch * segments, q, k) == pytest.approx(taken, rel=0.015)
