"""Sparse storage: layers that hold their active weights alone, so that gradients and moments are as few."""

from granet.sparsifier.sparse_storage.storage import SparseStorage as SparseStorage
from granet.sparsifier.sparse_storage.weight import is_stored as is_stored
