import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.models.checkpoint import load
from lorajax.models.decoder import Decoder


@pytest.fixture
def model(llama_folder) -> Decoder:
    """The tiny Llama in float32, without adapter."""
    return load(llama_folder, dtype="float32")


@pytest.fixture(scope="session")
def randomise():
    """randomise(model, seed=0): both halves of the adapter random, so that it changes the output."""

    def fill(model: Decoder, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        for linear in model.linears().values():
            for param in (linear.lora_a, linear.lora_b):
                if param is not None:
                    param[...] = jnp.asarray(rng.normal(0, 0.3, param[...].shape), jnp.float32)

    return fill


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 350, (2, 9))
