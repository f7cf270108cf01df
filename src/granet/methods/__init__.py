"""The methods: one paper, one file, and no method imports another."""

from granet.methods.base import Method
from granet.methods.dense import Dense
from granet.methods.fixed import Fixed
from granet.methods.gmp import GMP
from granet.methods.granet import GraNet
from granet.methods.grasp import GraSP
from granet.methods.rigl import RigL
from granet.methods.set import SET
from granet.methods.snip import SNIP
from granet.methods.soft_threshold import STR
from granet.methods.static import Static
from granet.methods.synflow import SynFlow
from granet.methods.top_kast import TopKAST

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "static": Static,
    "gmp": GMP,
    "granet": GraNet,
    "rigl": RigL,
    "set": SET,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "str": STR,
    "top-kast": TopKAST,
    "fixed": Fixed,
}

__all__ = [
    "GMP",
    "METHODS",
    "SET",
    "SNIP",
    "STR",
    "Dense",
    "Fixed",
    "GraNet",
    "GraSP",
    "Method",
    "RigL",
    "Static",
    "SynFlow",
    "TopKAST",
]
