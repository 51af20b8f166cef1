"""Settings of training: few, light to import, and checked before a model is known."""

import subprocess
import sys
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from circuit_breaking.errors import UserError
from circuit_breaking.training import config
from circuit_breaking.training.config import MaskConfig, WeightMaskSettings, check_mask, check_weight_mask
from circuit_breaking.training.gates import METHODS as WEIGHT_METHODS
from circuit_breaking.training.methods import GIVEN, METHODS, method_class
from circuit_breaking.training.methods.base import MaskMethod


def test_settings_load_without_torch():
    code = "import sys, circuit_breaking.training.config; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "False"]


def test_methods_that_settings_name_are_those_there_are():
    names = ("ranking", "clamped", "hard-concrete", "ugs", "attribution")
    assert get_args(get_type_hints(MaskConfig)["method"]) == tuple(METHODS) == names
    for name in (*METHODS, GIVEN):
        assert issubclass(method_class(name), MaskMethod)
    assert tuple(WEIGHT_METHODS) == config.WEIGHT_METHODS


def test_a_mask_has_few_settings():
    assert len(fields(MaskConfig)) <= 20


@pytest.mark.parametrize(
    ("check", "settings", "message"),
    [
        (check_mask, MaskConfig(max_edges=-1), "max_edges is -1; it cannot be negative"),
        (check_mask, MaskConfig(lr=float("nan")), "lr is nan; it must be above 0"),
        (check_mask, MaskConfig(edge_penalty=-0.1), "edge_penalty is -0.1; it cannot be negative"),
        (
            check_mask,
            MaskConfig(method="sift"),
            "method 'sift' is not one of ranking, clamped, hard-concrete, ugs, attribution[.]",
        ),
        (check_weight_mask, WeightMaskSettings(granularity="layer"), "granularity 'layer' is not one of weight"),
    ],
)
def test_settings_are_refused_before_a_model_is_known(check, settings, message):
    with pytest.raises(UserError, match=message):
        check(settings)
