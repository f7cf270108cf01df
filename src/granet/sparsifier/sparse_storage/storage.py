"""The layers of a model that a sparsifier keeps in sparse storage, and what moves with their weights.

Where the topology changes, the values of a layer are put in the order of its new positions, and so is everything that
lies beside them one for one: the optimizers' buffers, gradients, and averages of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import topology
from granet.criterion import Layer
from granet.names import matched
from granet.ranks import current
from granet.selection import Choice, storage_reasons
from granet.sparsifier import followers
from granet.sparsifier.regrowth import Starts, buffers_of, ratio_to
from granet.sparsifier.sparse_storage import weight as stored
from granet.sparsifier.sparse_storage.gradients import Gradient, Gradients
from granet.sparsifier.sparse_storage.linear import Pieces
from granet.sparsifier.sparse_storage.masks import Masks
from granet.sparsifier.sparse_storage.values import PIECE, Move, dense, give_back, part

MATRICES = ("Muon", "Shampoo", "SOAP", "LBFGS", "KFAC", "GaLore")  # in the names of optimizers that need whole weights


class StoredLayer:
    """A layer in sparse storage as a method sees it: as a `granet.criterion.Layer`, made dense when it is looked at."""

    effective = None

    def __init__(self, module: nn.Module, kept: Tensor | None, gradient: Gradient | None):
        self._module, self._kept, self._gradient = module, kept, gradient
        self.shape = torch.Size(stored.shape_of(module))

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return dense(self._module.values, self._module.positions, self.shape)

    @property
    def grad(self) -> Tensor | None:
        """The dense gradient, zero where it does not count."""
        if self._gradient is not None:
            return self._gradient.dense()
        return None if self._kept is None else dense(self._kept, self._module.positions, self.shape)

    def numel(self) -> int:
        """The number of weights, active or not."""
        return self.shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The type of the values."""
        return self._module.values.dtype

    @property
    def has_grad(self) -> bool:
        """Whether the layer comes with a gradient."""
        return self._gradient is not None or self._kept is not None

    def every(self, stride: int) -> Layer:
        """The first weight of each `stride`, in the order of the flat index."""
        return self._part(0, self.numel(), stride)

    def parts(self, size: int) -> Iterator[Layer]:
        """The flat layer in consecutive pieces of at most `size` weights, each valid until the next is asked for."""
        held = self._module.values, self._kept if self._gradient is None else self._gradient.values
        out = [None if one is None else one.new_empty(min(size, self.numel())) for one in held]
        for start in range(0, self.numel(), size):
            yield self._part(start, min(start + size, self.numel()), out=out)

    def _part(self, start: int, stop: int, stride: int = 1, out: Sequence = (None, None)) -> Layer:
        positions, grad = self._module.positions, None
        weight = part(self._module.values[: len(positions)], positions, start, stop, stride, out=out[0])
        if self._gradient is not None:
            grad = self._gradient.part(start, stop, stride, out=out[1])
        elif self._kept is not None:
            grad = part(self._kept[: len(positions)], positions, start, stop, stride, out=out[1])
        return Layer(weight, grad)

    def ratio(self, old: Tensor, positions: Tensor) -> Tensor | float:
        """Returns what `granet.sparsifier.regrowth.ratio_of` says of the weights at `positions`.

        Args:
            old: flat indices of the weights that were active when the gradient was taken.
            positions: flat indices.
        """
        if self._gradient is None:
            return 1.0
        pieces = (self._gradient.at(piece).square().sum(dtype=torch.float64) for piece in old.split(PIECE))
        return ratio_to(self._gradient.at(positions).square(), float(sum(pieces)) / len(old))


class SparseStorage:
    """The layers of a model in sparse storage, by the names of their dense weights. Without arguments there are none.

    Args:
        model: the model.
        modules: the layers, by the names of their weights in the model.
    """

    def __init__(self, model: nn.Module | None = None, modules: Mapping[str, nn.Module] | None = None):
        self.model, self.modules = model, dict(modules or {})
        self._unknown: set[str] = set()  # layers with places whose weights were neither trained here nor loaded
        self._checked = False
        self._fixed_size = current().world > 1  # DistributedDataParallel does not follow another size
        self._gradients: Gradients | None = None
        self._hooks: list = []

    @classmethod
    def of(cls, model: nn.Module, choices: Iterable[Choice], masks: Mapping[str, Tensor]) -> SparseStorage:
        """Returns the storage of a model whose linear and convolution layers from now on hold active weights alone."""
        reasons = storage_reasons(model, choices)
        modules = {name: model.get_submodule(name.rpartition(".")[0]) for name, why in reasons.items() if not why}
        for name, module in modules.items():
            stored.store(module, masks[name])
        give_back()
        return cls(model, modules)

    def unstore(self, models: Iterable[object]) -> dict[str, nn.Parameter]:
        """Gives all layers of the models dense weights again, and returns those of the first by name."""
        for model in models:
            for module in model.modules() if isinstance(model, nn.Module) else ():
                if stored.shape_of(module) is not None:
                    stored.unstore(module)
        return {name: module.weight for name, module in self.modules.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.modules

    def __bool__(self) -> bool:
        return bool(self.modules)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with the active values."""
        return {name: module.values for name, module in self.modules.items()}

    def compact(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns the masks, with those of the layers made from their positions, which must be those of the masks."""
        made = {name: (module.positions, stored.shape_of(module)) for name, module in self.modules.items()}
        return Masks(masks, made) if made else masks

    def listen(self, sparsifier) -> None:
        """Has what an update of the sparsifier needs of the dense gradients kept, in the backwards before it."""
        mine, owner = ref(self), ref(sparsifier)
        unstructured = str(sparsifier.pattern) == "unstructured"

        def candidates(active: int) -> int | None:
            return owner().method.candidates(owner().step + 1, active) if unstructured else None

        def explored(name: str) -> Tensor | None:
            one = owner()
            if (share := one.method.explores) is None:
                return None
            rng = torch.Generator().set_state(one._rng.get_state())  # the update will draw the same
            return topology.some(one.masks[name], share, topology.seeds(one.masks, rng)[name])

        def mask(name: str) -> Tensor:
            return owner().masks[name]

        self._gradients = Gradients(candidates, mask, explored, alone=current().world == 1)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for name, module in self.modules.items():

            def add(module: nn.Module, pieces: Pieces, name: str = name) -> None:
                if (storage := mine()) is not None and owner() is not None:
                    storage._gradients.add(name, module, pieces)

            def due(module: nn.Module, add: Callable = add) -> Callable | None:
                return add if (one := owner()) is not None and one.attached and one.dense_grad_due else None

            def count(_: Tensor, name: str = name) -> None:
                if (storage := mine()) is not None:
                    storage._gradients.count(name)

            stored.listen(module, due)
            if module.values.requires_grad:
                self._hooks.append(module.values.register_post_accumulate_grad_hook(count))

    def __deepcopy__(self, memo: dict) -> SparseStorage:
        other = memo[id(self)] = SparseStorage(deepcopy(self.model, memo), deepcopy(self.modules, memo))
        other._unknown, other._checked, other._fixed_size = set(self._unknown), self._checked, self._fixed_size
        return other

    def layers(self, kept: Mapping[str, Tensor]) -> dict[str, StoredLayer]:
        """Returns the layers, with the gradients of this step; `kept` has those of active weights alone."""
        found = self._gradients.found if self._gradients else {}
        return {name: StoredLayer(m, kept.get(name), found.get(name)) for name, m in self.modules.items()}

    def combine_gradients(self) -> str:
        """Takes the mean of the dense gradients over all ranks, which call this together.

        Returns a warning if some gradients of inactive weights were left out.
        """
        if self._gradients is None:
            return ""
        ranks, found = current(), self._gradients.found
        for name, module in self.modules.items() if ranks.world > 1 else ():
            if ranks.any(name in found):
                if name not in found:
                    found[name] = self._gradients.zero(name, module.values.device)
                ranks.mean_([found[name].values])
        if not self._gradients.cut:
            return ""
        return (
            "the gradient of this update came from several backwards, where the step before had one, or from several "
            f"uses of a layer, so of inactive weights of {min(self._gradients.cut)!r} the first ones were looked at in "
            "part; later updates look at all"
        )

    def begin_step(self) -> None:
        """Forgets the dense gradients: the step that they belong to is complete."""
        if self._gradients is not None:
            self._gradients.begin()

    def begin(self) -> tuple[int, str]:
        """Runs before the first step: drops what was loaded outside of the masks.

        Returns how many weights that is, and a warning if some that are active were never given.
        """
        unknown = sorted(name for name in self._unknown if not stored.was_loaded(self.modules[name]))
        lost = sum(stored.forget_loaded(module) for module in self.modules.values())
        self._unknown = set()
        if not unknown:
            return lost, ""
        return lost, (
            f"masks were loaded and {unknown[0]!r} has active weights that never were: they are zero. Load the model's "
            "state dict too, before the first step"
        )

    def reposition(self, masks: Mapping[str, Tensor], followers: Iterable[object] = ()) -> None:
        """Has the layers, and those of averaged models, hold the weights at the places of loaded masks.

        What optimizers have stays as it is.
        """
        copies = [self._copies(one) for one in followers if isinstance(one, nn.Module)]
        for name, module in self.modules.items():
            known = stored.reposition(module, masks[name], fixed=self._fixed_size)
            (self._unknown.discard if known else self._unknown.add)(name)
            for layers in copies:
                stored.reposition(layers[name], masks[name], fixed=self._fixed_size)

    def _copies(self, follower: nn.Module) -> dict[str, nn.Module]:
        """The follower's own layers in the place of those in sparse storage."""
        names = {f"{name.removesuffix('weight')}values": name for name in self.modules}
        found = matched(names, [key for key, _ in follower.named_parameters()])
        return {names[key]: follower.get_submodule(other.rpartition(".")[0]) for key, other in found.items()}

    def refuse(self, optimizers: Iterable[Optimizer]) -> None:
        """Raises ValueError if an optimizer needs whole weights, or remembers what cannot follow their values."""
        for optimizer in optimizers if self.modules else ():
            kind = type(optimizer).__name__
            if any(part.lower() in kind.lower() for part in MATRICES):
                raise ValueError(
                    f"{kind} needs the matrix shape of weights, or remembers all of them as one, and layers in sparse "
                    "storage have values in a row: use SGD, AdamW or another optimizer that treats each weight by "
                    'itself, or storage="dense"'
                )

    def check(self, optimizers: Iterable[Optimizer]) -> None:
        """Raises ValueError if an optimizer keeps what cannot follow the values; looks until its state is there."""
        if self._checked or not self.modules:
            return
        self._checked = any(optimizer.state for optimizer in optimizers)
        for optimizer in optimizers:
            for name, module in self.modules.items():
                for key, buffer in optimizer.state.get(module.values, {}).items():
                    if isinstance(buffer, Tensor) and buffer.numel() > 1 and buffer.shape != module.values.shape:
                        raise ValueError(
                            f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(buffer.shape)} for the "
                            f"{len(module.values)} active weights of {name!r}, which cannot follow them when the "
                            'topology changes: use another optimizer, or storage="dense"'
                        )

    def follow(self, follower: object) -> dict[str, tuple[Tensor, nn.Module | None]]:
        """Returns a follower's values of every layer, and the layer they belong to if the follower is a module.

        Raises:
            TypeError: it is nothing that holds tensors.
            ValueError: it has no values of one of the layers.
        """
        if not self.modules:
            return {}
        names = {f"{name.removesuffix('weight')}values": name for name in self.modules}
        tensors = followers.held_by(follower, self.model, names)
        if not isinstance(follower, nn.Module):
            return {names[key]: (tensor, None) for key, tensor in tensors.items()}
        return {name: (module.values, module) for name, module in self._copies(follower).items()}

    @torch.no_grad()
    def renew(
        self,
        old: Mapping[str, Tensor],
        new: Mapping[str, Tensor],
        optimizers: Iterable[Optimizer],
        followers: Iterable[object],
    ) -> None:
        """Moves the values of every layer whose mask has changed, and what lies beside them.

        Grown weights start from zero, and in the optimizers' buffers as `granet.sparsifier.regrowth` says.

        Args:
            old: the masks before the update.
            new: the masks after it.
            optimizers: those that hold the values.
            followers: averages of the weights; see `Upkeep.follow`.
        """
        if self.modules:
            give_back()
        starts, layers, optimizers = Starts(), self.layers({}), list(optimizers)
        averages = [self.follow(follower) for follower in followers]
        for name, module in self.modules.items():
            before, after = old[name], new[name]
            if after is before or torch.equal(after, before):
                continue
            values, size = module.values, len(module.values) if self._fixed_size else None
            move = Move(module.positions, before, after, size)
            growing = bool(move.grown.any())
            ratio = layers[name].ratio(module.positions, move.positions[move.grown]) if growing else 1.0
            for optimizer, group, key, buffer in buffers_of(optimizers, values):
                if not isinstance(buffer, Tensor):
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} as codes in blocks of many weights, which cannot "
                        'follow values in sparse storage: use another optimizer, or storage="dense"'
                    )
                start = starts.of(optimizer, group, key, buffer, move.before, ratio) if growing else None
                optimizer.state[values][key] = move(buffer, start)
            for one in averages:
                tensor, copy = one[name]
                stored.put(tensor, move(tensor))
                if copy is not None:
                    copy.positions = move.positions.to(tensor.device)
            moved, grad = move(values.detach()), None if values.grad is None else move(values.grad)
            stored.place(module, moved, move.positions)
            values.grad = grad
            give_back()
