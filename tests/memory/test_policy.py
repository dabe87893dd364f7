"""Policies over the named activations of a layer."""

import json
from dataclasses import replace

import pytest

from lorajax.memory.policy import ACTIVATIONS, EVERYTHING, LayerPolicy, Policy


def test_presets_say_what_every_layer_keeps():
    assert Policy.of("none", 2) == Policy((EVERYTHING, EVERYTHING))
    assert Policy.of("full", 2) == Policy((LayerPolicy(saved=frozenset({"block_input"})),) * 2)
    away = LayerPolicy(offloaded=frozenset({"block_input"}), gradient_away=True)
    assert Policy.of("offload", 3) == Policy((away, away, replace(away, saved=frozenset({"lora_hidden"}))))
    assert Policy.of("none", 2).keeps_everything and not Policy.of("none", 2).offloads
    assert Policy.of("offload", 1).offloads and Policy.of({"gradient": "offload"}, 1).offloads


def test_names_left_out_are_recomputed_and_the_input_is_saved():
    layer = LayerPolicy.of({"gate": "offload", "up": "recompute"})
    assert layer == LayerPolicy(saved=frozenset({"block_input"}), offloaded=frozenset({"gate"}))
    assert layer.actions == {"block_input": "save", "gate": "offload"}


@pytest.mark.parametrize(
    "checkpointing, message",
    [
        ("half", "'half' is not one of none, full, offload"),
        (
            {"gates": "save"},
            f"'gates' is no activation of a layer; known: {', '.join(ACTIVATIONS)}, gradient",
        ),
        ({"gate": "keep"}, "gate: 'keep' is not one of save, offload, recompute"),
        ({"gradient": "recompute"}, "gradient: 'recompute' is not one of save, offload"),
        ({"block_input": "recompute"}, "block_input: it cannot be recomputed"),
        ({"lora_hidden": "offload"}, "lora_hidden: it is too small to be worth a copy"),
        (Policy((EVERYTHING,)), "a policy of 1 layers for 3"),
    ],
)
def test_what_is_unknown_or_cannot_be_is_refused(checkpointing, message):
    with pytest.raises(ValueError, match=message):
        Policy.of(checkpointing, 3)


def test_copies_take_a_layer_at_least():
    with pytest.raises(ValueError, match="copy_span must be at least 1, not 0"):
        Policy((EVERYTHING,), copy_span=0)


def test_a_policy_goes_through_json():
    actions = {"block_input": "offload", "gate": "save", "attention_output": "offload"}
    some = LayerPolicy.of(actions | {"gradient": "offload"})
    policy = Policy((some, some, EVERYTHING, LayerPolicy.of({})), copy_span=2)
    plain = json.loads(json.dumps(policy.as_plain()))
    assert [number for number, _ in plain["layers"]] == [2, 1, 1]
    assert Policy.from_plain(plain) == policy
