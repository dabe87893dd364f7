"""GPUs that a plan can be made for without having one."""

import pytest

from lorajax.errors import UserError
from lorajax.memory.targets import TARGETS, find_target


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(
        UserError, match=r"unknown device 'rtx4080', did you mean rtx4090\? Known are v100, .*t4, a100"
    ):
        find_target("rtx4080")
    with pytest.raises(UserError, match=r"unknown device 'cpu'\. Known are .*h200, b200, rtx5090$"):
        find_target("cpu")
    with pytest.raises(UserError, match=r"unknown device ''\. Known are v100"):
        find_target("")
    with pytest.raises(UserError, match=r"unknown device 'a100', did you mean a100-40gb or a100-80gb\?"):
        find_target("a100")


def test_names_are_taken_as_people_write_them():
    assert find_target("A100 80GB") is TARGETS["a100-80gb"]
    assert find_target("RTX_4090") is find_target("rtx-4090") is TARGETS["rtx4090"]


@pytest.mark.parametrize("name", TARGETS)
def test_what_targets_say_is_plausible(name):
    target = TARGETS[name]
    assert target.name == name
    assert 14 * 2**30 < target.memory < 200 * 2**30
    assert 1e10 < target.link < target.bandwidth / 10 < target.flops / 100
    assert target.shared_memory[1] <= target.shared_memory[0]


def test_compilers_are_told_what_they_know():
    # CUDA 13 assembles nothing for Volta, and architectures of their own ("90a") are not all alike.
    assert "cuda_compute_capability { major: 7 minor: 5 }" in find_target("v100").config
    assert "cuda_compute_capability { major: 8 minor: 9 }" in find_target("l4").config
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }" in find_target("h100").config
    assert "cuda_compute_capability { major: 12 minor: 0 }" in find_target("rtx5090").config


def test_xla_and_the_kernels_are_told_of_one_cudnn():
    target = find_target("h200")
    rest, patch = divmod(target.device.cudnn_version, 100)
    major, minor = divmod(rest, 100)
    assert f'dnn_version: "{major}.{minor}.{patch}"' in target.config
    assert f"dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}" in target.config


def test_kernels_are_chosen_for_the_real_capability():
    assert find_target("v100").device.compute_capability == (7, 0)
    assert find_target("v100").device.half_dtype == "float16"
    assert "9.0" in find_target("l4").device.no_mosaic
    assert find_target("b200").device.no_mosaic is None
