"""The sparsifier: the one object that changes anything, and its parts."""

from granet.sparsifier.core import Sparsifier as Sparsifier
