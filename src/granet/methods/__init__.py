"""The methods: one paper, one file, and no method imports another."""

from granet.methods.ac_dc import ACDC
from granet.methods.base import Method
from granet.methods.deep_r import DeepR
from granet.methods.dense import Dense
from granet.methods.dsr import DSR
from granet.methods.fixed import Fixed
from granet.methods.gmp import GMP
from granet.methods.granet import GraNet
from granet.methods.grasp import GraSP
from granet.methods.mest import MEST
from granet.methods.rigl import RigL
from granet.methods.rigl_itop import RigLITOP
from granet.methods.set import SET
from granet.methods.snfs import SNFS
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
    "snfs": SNFS,
    "deep-r": DeepR,
    "dsr": DSR,
    "mest": MEST,
    "ac-dc": ACDC,
    "rigl-itop": RigLITOP,
    "snip": SNIP,
    "grasp": GraSP,
    "synflow": SynFlow,
    "str": STR,
    "top-kast": TopKAST,
    "fixed": Fixed,
}

__all__ = [
    "ACDC",
    "DSR",
    "GMP",
    "MEST",
    "METHODS",
    "SET",
    "SNFS",
    "SNIP",
    "STR",
    "DeepR",
    "Dense",
    "Fixed",
    "GraNet",
    "GraSP",
    "Method",
    "RigL",
    "RigLITOP",
    "Static",
    "SynFlow",
    "TopKAST",
]
