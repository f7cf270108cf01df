"""Settings for every method, on which the tests of all methods run. A new method adds one line to SETTINGS."""

import pytest

from granet import METHODS

SETTINGS = {
    "dense": {},
    "static": {"sparsity": 0.8},
    "gmp": {"sparsity": 0.9, "begin": 3, "end": 20, "interval": 4},
    "granet": {"sparsity": 0.9, "initial_sparsity": 0.4, "end": 17, "total": 30, "interval": 4},
    "rigl": {"sparsity": 0.8, "end": 25, "interval": 4},
    "srigl": {"sparsity": 0.8, "end": 25, "interval": 4, "min_salient": 0.6},
    "set": {"sparsity": 0.8, "total": 30, "interval": 4},
    "snfs": {"sparsity": 0.8, "total": 30, "interval": 4},
    "deep-r": {"sparsity": 0.8, "l1": 0.01, "temperature": 1e-5},
    "dsr": {"sparsity": 0.8, "total": 30, "interval": 4, "threshold": 0.02},
    "mest": {"sparsity": 0.8, "halve": 9, "end": 18, "interval": 4},
    "chtss": {"sparsity": 0.9, "initial_sparsity": 0.4, "end": 25, "interval": 4},
    "ac-dc": {"sparsity": 0.8, "begin": 4, "interval": 4, "end": 23},
    "rigl-itop": {"sparsity": 0.8, "total": 30, "interval": 4},
    "snip": {"sparsity": 0.8},
    "grasp": {"sparsity": 0.8},
    "synflow": {"sparsity": 0.8, "rounds": 10},
    "str": {"s_init": -3.0, "interval": 4},
    "top-kast": {"sparsity": 0.8, "interval": 4},
    "feather": {"sparsity": 0.9, "begin": 3, "end": 17},
    "cyclic": {"sparsity": 0.8, "end": 17, "total": 30, "interval": 4},
    "fixed": {},
}
CHT = {"initial_sparsity": None, "soft": False, "predictor": "ch3-l3p", "anneal": False}
VARIANTS = {
    **SETTINGS,
    "gmp layerwise": {**SETTINGS["gmp"], "scope": "layerwise"},
    "granet layerwise": {**SETTINGS["granet"], "scope": "layerwise"},
    "granet dense-to-sparse": {**SETTINGS["granet"], "initial_sparsity": 0.0},
    "gmp gale": {**SETTINGS["gmp"], "scope": "layerwise", "last_sparsity": 0.8, "schedule": "sigmoid"},
    "granet random": {**SETTINGS["granet"], "growth": "random", "schedule": "linear"},
    "granet momentum": {**SETTINGS["granet"], "growth": "momentum", "schedule": "cosine"},
    "granet accumulate": {**SETTINGS["granet"], "accumulate": 3},
    "rigl random": {**SETTINGS["rigl"], "growth": "random"},
    "rigl explore": {**SETTINGS["rigl"], "growth": "explore"},
    "granet explore": {**SETTINGS["granet"], "growth": "explore", "explored": 2.0},
    "rigl momentum": {**SETTINGS["rigl"], "growth": "momentum"},
    "rigl accumulate": {**SETTINGS["rigl"], "accumulate": 4},
    "srigl no-ablation": {**SETTINGS["srigl"], "min_salient": 0},
    "mest soft": {**SETTINGS["mest"], "soft_bound": True, "distribution": "erk"},
    "chtss chts": {**SETTINGS["chtss"], "initial_sparsity": None, "relative_importance": 0.5},
    "chtss cht": {**CHT, "sparsity": 0.8, "end": 25, "interval": 4},
    "chtss brf": {**SETTINGS["chtss"], "receptive_field": 0.3, "distribution": "erk"},
    "ac-dc layerwise": {**SETTINGS["ac-dc"], "scope": "layerwise"},
    "rigl-itop random": {**SETTINGS["rigl-itop"], "growth": "random"},
    "set by-sign": {**SETTINGS["set"], "by_sign": True},
    "snip iterative": {**SETTINGS["snip"], "rounds": 5},
    "feather every fourth": {**SETTINGS["feather"], "interval": 4, "p": 1.0, "theta": 0.25},
    "cyclic triangular": {**SETTINGS["cyclic"], "cycles": 1, "peak": 4.0, "wave": "triangular"},
    "top-kast global": {**SETTINGS["top-kast"], "scope": "global", "distribution": "erk", "backward_sparsity": 0.5},
}
PATTERNED = {
    f"{variant} {pattern}": (variant, pattern)
    for variant, patterns in {
        "gmp": ("2:4", "4x1", "channel"),
        "gmp layerwise": ("2:4",),
        "granet": ("2:4", "4x1", "channel"),
        "granet dense-to-sparse": ("1:4",),
        "rigl": ("2:4", "4x1", "channel"),
        "srigl": ("4x1",),
        "set": ("2:4", "4x1", "channel"),
        "snfs": ("2:4",),
        "deep-r": ("2:4",),
        "dsr": ("channel",),
        "mest soft": ("1:4",),
        "chtss": ("2:4", "4x1"),
        "ac-dc": ("2:4",),
        "snip iterative": ("2:4",),
        "synflow": ("2:4",),
        "cyclic": ("1:4", "4x1", "channel"),
    }.items()
    for pattern in patterns
}
STORED = {
    f"{variant} stored": variant
    for variant in (
        "static",
        "granet",
        "rigl",
        "srigl",
        "set",
        "mest",
        "chtss",
        "rigl-itop",
        "snip",
        "fixed",
        "granet layerwise",
        "granet random",
        "granet explore",
        "rigl explore",
        "rigl random",
        "mest soft",
        "rigl-itop random",
        "set by-sign",
        "rigl 2:4",
        "granet 4x1",
        "cyclic",
    )
}  # in sparse storage
every = pytest.mark.parametrize("variant", VARIANTS)


def make(variant, **more):
    variant, _ = PATTERNED.get(STORED.get(variant, variant), (STORED.get(variant, variant), None))
    return METHODS[variant.split()[0]](**VARIANTS[variant], **more)
