"""AdamW and its learning rate, against plain NumPy and against transformers' schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax.config import TrainConfig
from lorajax.training.optimizer import adamw, learning_rate_schedule, updated

SCHEDULES = [
    ("linear", 0),
    ("linear", 7),
    ("cosine", 0),
    ("cosine", 7),
    ("constant", 0),
    ("constant", 7),
    ("linear", 20),
]


@pytest.mark.parametrize(
    "kind, warmup, expected",
    [
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0]),
        ("cosine", 0, [1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0]),
        ("cosine", 2, [0, 0.5, 1, 0.5, 0]),
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 4, [0, 0.25, 0.5, 0.75, 1]),
    ],
)
def test_learning_rates(kind, warmup, expected):
    train = TrainConfig(learning_rate=2e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    schedule = learning_rate_schedule(train, total_steps=4)
    rates = [float(schedule(step)) for step in range(5)]
    np.testing.assert_allclose(rates, 2e-4 * np.asarray(expected), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("kind, warmup", SCHEDULES)
def test_learning_rates_are_those_of_transformers(kind, warmup):
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    train = TrainConfig(learning_rate=3e-4, lr_scheduler_type=kind, warmup_steps=warmup)
    ours = learning_rate_schedule(train, total_steps=20)
    for step in range(20):
        assert float(ours(step)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-11)
        optimizer.step()
        theirs.step()


def normal(seed, size=1.0):
    """A weight of each kind, float32 [...]: a matrix, a vector, and a vector of adapters."""
    shapes = {"head": (2, 3), "layers.0.norm": (4,), "layers.0.adapters": (12,)}
    rng = np.random.default_rng(seed)
    return {name: (size * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def update(optimizer, gradient, state, weights, finite=True):
    norm = optax.tree.norm(gradient)
    return updated(optimizer, gradient, state, weights, norm=norm, finite=jnp.bool_(finite))


def plain_adamw(weights, gradients, rates, train):
    """The weights after a step for each gradient, in float64; all but norms decay."""
    weights = {name: leaf.astype(np.float64) for name, leaf in weights.items()}
    means = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    squares = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in gradient.values()))
        clip = min(1, train.max_grad_norm / norm) if train.max_grad_norm else 1
        for name, leaf in weights.items():
            g = clip * gradient[name].astype(np.float64)
            means[name] += (1 - train.adam_beta1) * (g - means[name])
            squares[name] += (1 - train.adam_beta2) * (g * g - squares[name])
            mean = means[name] / (1 - train.adam_beta1**count)
            square = squares[name] / (1 - train.adam_beta2**count)
            decay = 0 if name.endswith("norm") else train.weight_decay
            leaf -= rate * (mean / (np.sqrt(square) + train.adam_epsilon) + decay * leaf)
    return weights


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adamw_is_the_plain_formula(max_grad_norm, weight_decay):
    """Adam forgets the gradient's scale, but not how it changes: here only some of the steps are clipped."""
    train = TrainConfig(
        learning_rate=0.1,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-3,
        warmup_steps=2,
    )
    weights = normal(0)
    gradients = [normal(1 + index, size) for index, size in enumerate((0.01, 3.0, 0.1, 100.0, 0.02))]
    schedule = learning_rate_schedule(train, len(gradients))
    optimizer = adamw(train, schedule)
    found, state = weights, optimizer.init(weights)
    for gradient in gradients:
        found, state = update(optimizer, gradient, state, found)

    def expected(**changes):
        rates = [float(schedule(step)) for step in range(len(gradients))]
        return plain_adamw(weights, gradients, rates, TrainConfig(**(vars(train) | changes)))

    for name, leaf in expected().items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-5, atol=1e-6)
    # The same within this tolerance would show nothing.
    for name in ("layers.0.adapters", "head"):
        assert np.abs(found[name] - expected(max_grad_norm=0.3)[name]).max() > 1e-3
        assert np.abs(found[name] - expected(weight_decay=0.25)[name]).max() > 1e-3
    assert np.abs(found["layers.0.norm"] - weights["layers.0.norm"]).max() > 1e-2


def test_the_first_step_is_as_long_as_the_learning_rate():
    """Adam's first step is the sign of the gradient; a bias correction in float32 alone would show here."""
    weights = {"matrix": np.zeros((2, 2), np.float32)}
    gradient = {"matrix": np.array([[1, -1], [3, -0.5]], np.float32)}
    optimizer = adamw(TrainConfig(max_grad_norm=0), optax.constant_schedule(1e-3))
    updates, _ = optimizer.update(gradient, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["matrix"], -1e-3 * np.sign(gradient["matrix"]), rtol=1e-6)


def test_only_matrices_decay():
    weights = {name: np.ones_like(leaf) for name, leaf in normal(0).items()}
    optimizer = adamw(TrainConfig(weight_decay=0.5), optax.constant_schedule(0.1))
    still = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    found, _ = update(optimizer, still, optimizer.init(weights), weights)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, 1 if name.endswith("norm") else 0.95, rtol=1e-6)


def test_the_adapters_of_a_layer_are_updated_as_one_array():
    """So that XLA has no more to compile where a layer has many adapters."""
    weights = normal(0)
    optimizer = adamw(TrainConfig(learning_rate=0.1, weight_decay=0.5), optax.constant_schedule(0.1))
    state = optimizer.init(weights)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * [(2, 3)] + 2 * [
        (4,)
    ] + 2 * [(12,)]
    equations = str(jax.make_jaxpr(lambda *parts: update(optimizer, *parts))(weights, state, weights))
    assert equations.count("sqrt") == 1 + 3  # the norm's, and one for each array


def test_a_step_that_is_not_finite_changes_nothing():
    weights = normal(0)
    optimizer = adamw(TrainConfig(learning_rate=0.1, weight_decay=0.5), optax.constant_schedule(0.1))
    _, state = update(optimizer, normal(1), optimizer.init(weights), weights)
    gradient = normal(2) | {"head": np.full((2, 3), np.inf, np.float32)}
    found = update(optimizer, gradient, state, weights, finite=False)
    jax.tree.map(np.testing.assert_array_equal, found, (weights, state))
