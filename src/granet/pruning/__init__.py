"""One-shot pruning: a trained model is made sparse at once, on a little calibration data, without training."""

from granet.pruning.magnitude import Magnitude as Magnitude
from granet.pruning.owl import OWL as OWL
from granet.pruning.prune import Report as Report
from granet.pruning.prune import prune as prune
from granet.pruning.sparsegpt import SparseGPT as SparseGPT
from granet.pruning.wanda import Wanda as Wanda
