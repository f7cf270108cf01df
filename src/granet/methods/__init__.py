"""The methods: one paper, one file, and no method imports another."""

from granet.methods.base import Method
from granet.methods.dense import Dense
from granet.methods.gmp import GMP
from granet.methods.granet import GraNet
from granet.methods.rigl import RigL
from granet.methods.set import SET
from granet.methods.static import Static

METHODS: dict[str, type[Method]] = {
    "dense": Dense,
    "static": Static,
    "gmp": GMP,
    "granet": GraNet,
    "rigl": RigL,
    "set": SET,
}

__all__ = ["GMP", "METHODS", "SET", "Dense", "GraNet", "Method", "RigL", "Static"]
