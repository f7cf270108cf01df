# What `import granet` offers. `granet/__init__.py` reads this file when it is imported, and editors and type checkers
# read it too: a public name is added here and nowhere else.
from . import criterion as criterion
from . import distribution as distribution
from . import export as export
from . import flops as flops
from . import lab as lab
from . import pattern as pattern
from . import ranks as ranks
from . import schedule as schedule
from . import selection as selection
from . import shards as shards
from . import topology as topology
from .engine.fake_quantisation import fake_quantise as fake_quantise
from .engine.inference import compile as compile
from .engine.training import accelerate as accelerate
from .importers import import_masks as import_masks
from .integrations import distributed_checkpoint as distributed_checkpoint
from .methods import METHODS as METHODS
from .methods.ac_dc import ACDC as ACDC
from .methods.base import Method as Method
from .methods.deep_r import DeepR as DeepR
from .methods.dense import Dense as Dense
from .methods.dsr import DSR as DSR
from .methods.fixed import Fixed as Fixed
from .methods.gmp import GMP as GMP
from .methods.granet import GraNet as GraNet
from .methods.grasp import GraSP as GraSP
from .methods.mest import MEST as MEST
from .methods.rigl import RigL as RigL
from .methods.rigl_itop import RigLITOP as RigLITOP
from .methods.set import SET as SET
from .methods.snfs import SNFS as SNFS
from .methods.snip import SNIP as SNIP
from .methods.soft_threshold import STR as STR
from .methods.static import Static as Static
from .methods.synflow import SynFlow as SynFlow
from .methods.top_kast import TopKAST as TopKAST
from .probe import Probe as Probe
from .selection import plan as plan
from .sparsifier.core import Sparsifier as Sparsifier
from .train import data as data
from .train import models as models
from .train.registration import register as register

__version__: str
