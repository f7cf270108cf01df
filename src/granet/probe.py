"""The probe: measurements on a network before it is trained, from a few batches.

The methods that prune at initialisation ask it for gradients (SNIP), the Hessian times the gradient (GraSP) and the
synaptic flow, which needs no data (SynFlow). The probe calls the model with other tensors in place of its parameters
and buffers, so weights, gradients, batch-norm statistics and modes of the model do not change. Random generators start
from the same seed in every measurement, so that dropout and a shuffling loader are the same in each, and get their
earlier state back afterwards. The results thus depend only on the model and the batches.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from granet.functional import called_with
from granet.names import did_you_mean

Masks = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Probe:
    """A model together with the batches on which it is measured.

    Every measurement takes `masks`, a mapping from parameter names to bool tensors, and returns a result for these
    parameters, measured with their inactive weights at zero. Without masks it returns one for every parameter, dense.

    Attributes:
        model: the model. Nothing in it changes.
        batches: pairs `(inputs, targets)` on the model's device, a list or a loader; `inputs` may be a tuple of
            arguments. Every measurement iterates over them anew. `synaptic_flow` needs no batches.
        loss: a function `loss(output, targets)` that returns a scalar, the mean over the targets.
        example: inputs `(n, ...)` of the shape that the model takes, for `synaptic_flow`; by default those of the first
            batch. Only the shape matters.

    Raises:
        ValueError: `batches` is an iterator, which gives its batches only once.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> probe = Probe(model, [(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]]))], loss=F.mse_loss)
    >>> probe.gradients()["weight"]  # 2 * (1 + 2) * (1, 2)
    tensor([[ 6., 12.]])
    """

    model: nn.Module
    batches: Iterable[tuple[Tensor | tuple, Tensor]] = ()
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    example: Tensor | None = None

    def __post_init__(self):
        if isinstance(self.batches, Iterator):
            raise ValueError(
                f"Probe: batches is a {type(self.batches).__name__}, which gives its batches only once: "
                "pass list(batches), or list(itertools.islice(batches, n)) for the first n"
            )

    def gradients(self, masks: Masks | None = None, *, training: bool = True) -> dict[str, Tensor]:
        """Returns the mean gradient of the loss over all examples, by parameter, in float32 or float64.

        Inactive weights have a gradient too, taken where they are zero.

        Args:
            masks: the active weights of the parameters to measure.
            training: True for training mode, False for evaluation mode, where batch norm uses its running statistics.

        Raises:
            ValueError: there are no batches, a loss or gradient is not finite, or the output is not a tensor.
        """
        with _undisturbed(self.model, training=training):
            return self._mean(self._tensors(masks), self.loss, _gradient)

    def hessian_gradient(self, masks: Masks | None = None, temperature: float = 200.0) -> dict[str, Tensor]:
        """Returns the Hessian of the mean loss times its gradient, `H g`, in training mode, by parameter (GraSP).

        It is half the gradient of the gradient flow `g . g`. Of `masks`, only the active weights count in `g`.

        Args:
            masks: the active weights of the parameters to measure.
            temperature: the number by which the model's output is divided before the loss is computed.

        Raises:
            ValueError: as for `gradients`, or the temperature is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive, because the output is divided by it")

        def cooled(output: Tensor, targets: Tensor) -> Tensor:
            return self.loss(output / temperature, targets)

        # the fused kernels of attention have no second derivative
        with _undisturbed(self.model, training=True), sdpa_kernel(SDPBackend.MATH):
            tensors = self._tensors(masks)
            flow = self._mean(tensors, cooled, _gradient)
            if masks is not None:
                flow = {name: g * masks[name].to(g.device) for name, g in flow.items()}

            def product(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
                gradient = _gradient(loss, leaves, create_graph=True)
                along = sum((g * v).sum() for g, v in zip(gradient, flow.values(), strict=True))
                return _gradient(along, leaves) if along.requires_grad else [torch.zeros_like(x) for x in leaves]

            return self._mean(tensors, cooled, product)

    def synaptic_flow(self, masks: Masks | None = None) -> dict[str, Tensor]:
        """Returns the synaptic flow through every weight, `|w * dR/d|w||`, in float64, by parameter (SynFlow).

        R is the sum of the outputs for one input of ones, in evaluation mode, with the absolute values of all
        parameters and buffers. In a network of linear layers and ReLU, it is the sum over all paths of the product of
        the absolute weights along the path. No data is used.

        Args:
            masks: the active weights of the parameters to measure.

        Raises:
            ValueError: there is neither an example nor a batch, the example does not consist of floating-point numbers,
                a flow is not finite, or the output is not a tensor.
        """
        with _undisturbed(self.model, training=False):
            example = self._example()
            tensors = {name: _positive(tensor) for name, tensor in self._tensors(masks).items()}
            leaves = {name: tensors[name].requires_grad_() for name in self._names(masks)}
            device = next(iter(leaves.values())).device
            ones = torch.ones((1, *example.shape[1:]), dtype=torch.float64, device=device)
            total = self._output(tensors, ones).sum()
            flow = _gradient(total, list(leaves.values()))
            return _finite(
                {
                    name: (slope * weight.detach()).abs_()
                    for (name, weight), slope in zip(leaves.items(), flow, strict=True)
                }
            )

    def _names(self, masks: Masks | None) -> list[str]:
        """Returns the names of the parameters to measure."""
        parameters = dict(self.model.named_parameters())
        if masks is None:
            return [name for name, p in parameters.items() if p.is_floating_point()]
        for name in masks:
            if name not in parameters:
                hint = did_you_mean(name, parameters)
                raise ValueError(f"the probe's model has no parameter {name!r}: is it the model to be pruned?{hint}")
        return list(masks)

    def _tensors(self, masks: Masks | None) -> dict[str, Tensor]:
        """Returns the tensors for the model to compute with: masked parameters that require gradients, and buffers.

        Buffers are copies, so that the model's own do not change.
        """
        tensors = {name: p.detach() for name, p in self.model.named_parameters()}
        for name in self._names(masks):
            masked = tensors[name] if masks is None else tensors[name] * masks[name].to(tensors[name].device)
            tensors[name] = masked.requires_grad_()
        return tensors | {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    def _mean(self, tensors: dict[str, Tensor], loss: Callable, quantity: Callable) -> dict[str, Tensor]:
        """Returns the mean over all targets of `quantity(loss, leaves)`, by parameter."""
        leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        mean: dict[str, Tensor] = {}
        seen = 0
        _seed(tensors)
        for i, batch in enumerate(self.batches):
            if isinstance(batch, Mapping):
                keys = ", ".join(map(repr, list(batch)[:3]))
                raise ValueError(
                    f"Probe: batch {i} is a dict with the keys {keys}, not a pair (inputs, targets): make pairs of the "
                    "batches, for example [(batch['x'], batch['y']) for batch in batches]"
                )
            try:
                inputs, targets = batch
            except (TypeError, ValueError):
                raise ValueError(
                    f"Probe: batch {i} must be a pair (inputs, targets), not a {type(batch).__name__}"
                ) from None
            value = loss(self._output(tensors, inputs), targets)
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"Probe: the loss of batch {i} is {value.item()}: check its inputs and the model's weights"
                )
            found = quantity(value, list(leaves.values()))
            seen += len(targets)
            for name, tensor in zip(leaves, found, strict=True):
                tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
                mean[name] = mean[name].lerp(tensor, len(targets) / seen) if name in mean else tensor
        if not seen:
            raise ValueError("Probe: there are no batches: pass a list of pairs (inputs, targets)")
        return _finite(mean)

    def _output(self, tensors: dict[str, Tensor], inputs: Tensor | tuple) -> Tensor:
        """Returns the output of the model, computed with `tensors` as its parameters and buffers."""
        output = called_with(self.model, tensors, inputs)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Probe: the output of {type(self.model).__name__} is a {type(output).__name__}, not a tensor: pass a "
                "model whose forward returns the tensor that the loss takes; its parameters must keep their names"
            )
        return output

    def _example(self) -> Tensor:
        """Returns inputs of the shape that the model takes: `example`, or the inputs of the first batch."""
        example = self.example
        if example is None:
            first = next(iter(self.batches), None)
            if first is None:
                raise ValueError(
                    "Probe: the synaptic flow needs the shape of the model's input: pass batches, or an example such "
                    "as Probe(..., example=torch.ones(1, 3, 32, 32))"
                )
            example = first[0]
        if not isinstance(example, Tensor) or not example.is_floating_point():
            kind = example.dtype if isinstance(example, Tensor) else type(example).__name__
            raise ValueError(
                f"Probe: the example is of {kind}: the synaptic flow starts from an input of ones, so the model must "
                "take one tensor of floating-point numbers"
            )
        return example


@contextmanager
def _undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Puts the model into training or evaluation mode and enables gradients in the `with` block.

    Afterwards, modes and random generators are as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _seed(tensors: Mapping[str, Tensor]) -> None:
    """Seeds the random generators of the CPU and of the devices that hold `tensors`; others are left alone."""
    torch.default_generator.manual_seed(0)
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.set_rng_state(torch.Generator(device).manual_seed(0).get_state(), device)


def _gradient(value: Tensor, leaves: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """Returns the gradient of `value`, which is zero for leaves that it does not depend on."""
    found = torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def _positive(tensor: Tensor) -> Tensor:
    """Returns the absolute values in float64; tensors of integers are returned unchanged."""
    return tensor.detach().to(torch.float64).abs() if tensor.is_floating_point() else tensor.detach()


def _finite(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `scores` as they are, or raises ValueError if one is not finite."""
    for name, tensor in scores.items():
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise ValueError(
                f"Probe: the result for {name} is not finite: its weights, or the activations that reach it, are too "
                "large; check how the model is initialised"
            )
    return scores
