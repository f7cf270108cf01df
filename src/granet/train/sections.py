"""The sections of a recipe: data, model, training, and the settings of a method, as frozen models that check values.

Names are looked up in the registries, so that what a plugin registers is as good as what comes with granet.
Nothing here needs torch.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Annotated, Any, Literal, Union, get_type_hints

import docstring_parser
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, create_model, model_validator
from pydantic_core import core_schema

from granet.methods import METHODS
from granet.methods.base import Method
from granet.methods.base import Steps as StepCount
from granet.pattern import parse
from granet.registry import Registry
from granet.text import short
from granet.train.catalog import DATASETS, MODELS, OPTIMIZERS
from granet.train.problems import STEPS, suggest


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where, what was given, and what is allowed."""


_STEPS = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>ep|it|%)")


def _check_steps(value: int | str) -> int | str:
    if isinstance(value, str):
        match = _STEPS.fullmatch(f"{value}it" if value.isascii() and value.isdecimal() else value)
        if not match:
            raise ValueError(f"{short(value)} {STEPS}")
        if float(match["number"]) > (100 if match["unit"] == "%" else MOST):
            most = "100%, the whole training, is the most" if match["unit"] == "%" else f"{MOST:,} are the most"
            raise ValueError(f"{short(value)} is too much: {most}")
        return int(value) if value.isdecimal() else value
    if not 0 <= value <= MOST:
        raise ValueError(f"a number of steps must be from 0 to {MOST:,}")
    return value


MOST = 10**12  # steps or epochs
Steps = Annotated[int | str, AfterValidator(_check_steps)]


def in_steps(value: int | str, *, steps_per_epoch: int, epochs: int) -> int:
    """Returns `value` as a number of optimizer steps, rounded to the nearest.

    Args:
        value: an integer (steps already), `"1000it"`, `"80ep"` or `"50%"` of the whole training.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: epochs of the whole training.

    >>> [in_steps(v, steps_per_epoch=350, epochs=160) for v in (7, "1000it", "80ep", "50%")]
    [7, 1000, 28000, 28000]
    """
    value = _check_steps(value)
    if isinstance(value, int):
        return value
    match = _STEPS.fullmatch(value)
    scale = {"it": 1, "ep": steps_per_epoch, "%": steps_per_epoch * epochs / 100}[match["unit"]]
    return round(float(match["number"]) * scale)


def _check_registered(registry: Registry, name: str) -> str:
    if name not in registry:
        raise ValueError(f"there is no {registry.kind} {short(name)}; {suggest(name, registry)}")
    return name


def _choices(registry: Registry) -> Any:
    """Returns what adds the names in the registry to a JSON schema, at the moment when it is made."""
    return lambda schema: schema.update(enum=list(registry))


class Section(BaseModel):
    """The base of all sections: frozen, without unknown keys."""

    # descriptions are given by Field(description=): reading docstrings, pydantic would import all lazy modules
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def resolved(self, *, steps_per_epoch: int, epochs: int) -> dict[str, Any]:
        """Returns the fields, with those measured in steps as integers."""
        units = {"steps_per_epoch": steps_per_epoch, "epochs": epochs}
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name, field in type(self).model_fields.items():
            if field.annotation == int | str:
                values[name] = in_steps(values[name], **units)
            elif field.annotation == tuple[Steps, ...]:
                values[name] = tuple(in_steps(value, **units) for value in values[name])
        return values


class Data(Section):
    """What to train on."""

    name: Annotated[str, AfterValidator(partial(_check_registered, DATASETS))] = Field(
        description="Dataset; `granet ls data` says what each needs.", json_schema_extra=_choices(DATASETS)
    )
    root: str | None = Field(
        None, description="Folder of the datasets; else the environment's GRANET_DATA, else ./data."
    )
    validation: int | float = Field(
        0.1,
        gt=0,
        description="Share, or number, of the training images held out for validation.",
    )
    crop: int = Field(0, ge=0, le=10_000, description="Augmentation: largest random shift, in pixels.")
    padding: Literal["reflect", "zeros"] = Field(
        "reflect", description="Augmentation: what fills the border after a shift."
    )
    flip: bool = Field(False, description="Augmentation: mirror half of the images.")
    cutout: int = Field(0, ge=0, le=10_000, description="Augmentation: side of the square blanked out at random.")


class Model(Section):
    """What to train."""

    name: Annotated[str, AfterValidator(partial(_check_registered, MODELS))] = Field(
        description="Architecture; `granet ls models` lists them.", json_schema_extra=_choices(MODELS)
    )
    keep_dense: tuple[str, ...] = Field(
        (), description="Patterns of parameter names that stay dense, such as 'conv1.*'."
    )
    pattern: Annotated[str, AfterValidator(lambda text: str(parse(text)))] = Field(
        "unstructured",
        description="What masks obey: unstructured, N:M (2:4), blocks RxC (4x1) or channel. "
        "Layers of shapes that it does not fit stay dense.",
    )


class Train(Section):
    """How to train."""

    epochs: int = Field(160, ge=1, le=1_000_000, description="Passes over the training set.")
    batch_size: int = Field(128, ge=1, le=1_000_000_000, description="Examples in an optimizer step.")
    partial_batch: bool = Field(
        False, description="Train on an epoch's last batch too where it is smaller than the others."
    )
    accumulate: int = Field(
        1, ge=1, description="Parts a batch is split into, one forward and backward each, to save memory."
    )
    optimizer: Annotated[str, AfterValidator(partial(_check_registered, OPTIMIZERS))] = Field(
        "sgd",
        description="Optimizer; `granet ls optimizers` lists them.",
        json_schema_extra=_choices(OPTIMIZERS),
    )
    lr: float = Field(0.1, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD, first beta of AdamW.")
    nesterov: bool = Field(False, description="Nesterov momentum (SGD only).")
    weight_decay: float = Field(5e-4, ge=0, description="Weight decay.")
    decay: Literal["all", "weights"] = Field(
        "all", description="What decays: all parameters, or only those with two dimensions or more."
    )
    schedule: Literal["multistep", "cosine", "constant"] = Field(
        "multistep", description="Learning rate over training."
    )
    milestones: tuple[Steps, ...] = Field(
        ("50%", "75%"), description="Where the multistep schedule multiplies by gamma."
    )
    gamma: float = Field(0.1, gt=0, lt=1, description="What the multistep schedule multiplies by.")
    stages: tuple[Steps, ...] = Field(
        (),
        description="Lengths of the training before it was extended; each has a cosine schedule of its own length.",
    )
    warmup: Steps = Field(0, description="Length of the linear warm-up of the learning rate.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of the training loss.")
    clip_norm: float | None = Field(None, gt=0, description="Largest norm of the gradient of the active weights.")
    bf16: bool = Field(False, description="Autocast to bfloat16; weights, scores and optimizer stay float32.")
    channels_last: bool = Field(False, description="Channels-last memory layout.")
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = Field(
        None, description="Mode of torch.compile."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, which is then what is evaluated.",
    )
    probe: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="Batches that methods which choose their masks before training look at (snip, grasp).",
    )
    init: str | None = Field(
        None,
        description="Run directory or checkpoint whose weights the training begins with; with the method fixed, and "
        "within its masks.",
    )
    log: Steps = Field("10it", description="Steps between two lines of the training log.")
    evaluate: Steps = Field("1ep", description="Steps between two evaluations on the validation set.")
    evaluate_images: int | None = Field(
        None, ge=1, description="Images of a split to evaluate on, spread evenly over it; None takes all."
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        description="End after so many steps of the training, for a quick look; its schedules stay the same.",
    )
    checkpoint: Steps = Field("1ep", description="Steps between two checkpoints.")
    compress: bool = Field(
        False, description="Leave zeros out of the files of checkpoints; a resumed run is the same to the bit."
    )
    keep: tuple[Steps, ...] = Field((), description="Moments whose checkpoints are kept, such as 10ep or 50%.")
    threads: int | None = Field(None, ge=1, le=1024, description="Processor threads; None leaves them to torch.")
    engine: Literal["dense", "sparse"] = Field(
        "dense", description="Arithmetic: 'sparse' runs layers on granet's own kernels where these are faster (CPU)."
    )
    storage: Literal["dense", "sparse"] = Field(
        "dense", description="What layers hold in training: 'sparse' holds active weights alone, in less memory."
    )
    quantise: Literal["int8"] | None = Field(
        None,
        description="Quantisation-aware training: layers compute with weights and inputs rounded as in int8 inference.",
    )
    device: str = Field("auto", description="Device: 'auto' takes a GPU if there is one.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> "Train":
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(f"nesterov belongs to sgd, not to {self.optimizer}: set nesterov to false")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if self.engine == "sparse" and self.compile:
            raise ValueError("engine sparse runs kernels of its own, which torch.compile cannot see: leave out compile")
        if self.quantise and (self.bf16 or self.compile or self.engine == "sparse"):
            raise ValueError(
                f"quantise {self.quantise} rounds float32 numbers of torch's own layers: leave out bf16, compile and "
                "engine sparse"
            )
        if self.storage == "sparse" and (self.engine == "sparse" or self.quantise or self.compile):
            raise ValueError("storage sparse has kernels of its own: leave out engine sparse, quantise, compile")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into accumulate={self.accumulate} equal parts"
            )
        return self

    def counted(self, steps_per_epoch: int) -> "Train":
        """Returns these settings with all step counts as integers.

        Raises:
            ValueError: something would happen every 0 steps.
        """
        steps = Train.model_construct(**self.resolved(steps_per_epoch=steps_per_epoch, epochs=self.epochs))
        for every in ("log", "evaluate", "checkpoint"):
            if not getattr(steps, every):
                raise ValueError(f"train.{every}: {getattr(self, every)!r} is less than a step; 1 is the least")
        return steps

    def warnings(self, steps_per_epoch: int, slow_bf16: bool = False) -> list[str]:
        """Returns a warning for each setting that has no effect, slows down, or changes what accuracies mean.

        Args:
            steps_per_epoch: of the training.
            slow_bf16: whether the device computes bfloat16 in software.

        >>> Train(epochs=50, milestones=("30ep", "90ep")).warnings(steps_per_epoch=100)
        ['train.milestones: 90ep is after the end of the training (50 epochs, 5,000 steps) and has no effect']
        """
        units, end = {"steps_per_epoch": steps_per_epoch, "epochs": self.epochs}, self.epochs * steps_per_epoch
        moments = [("keep", moment) for moment in self.keep]
        if self.schedule == "multistep":
            moments += [("milestones", moment) for moment in self.milestones]
        length = f"the training ({self.epochs:,} epochs, {end:,} steps)"
        found = [
            f"train.{name}: {moment} is after the end of {length} and has no effect"
            for name, moment in moments
            if in_steps(moment, **units) > end
        ]
        if self.max_steps is not None and self.max_steps >= end:
            found.append(f"train.max_steps: {self.max_steps:,} is not before the end of {length} and has no effect")
        if self.evaluate_images is not None:
            found.append(
                f"train.evaluate_images: accuracies are those of at most {self.evaluate_images:,} images a split"
            )
        if self.bf16 and slow_bf16:
            found.append(
                "train.bf16: there is no bfloat16 arithmetic here, and doing without it can take ten times as long as "
                "float32; write --train.bf16 false"
            )
        if in_steps(self.warmup, **units) > end:
            found.append(f"train.warmup: {self.warmup} is longer than {length}: its lr of {self.lr:g} is never reached")
        return found


class MethodSection(Section):
    """How the topology evolves: a method's hyper-parameters, steps in any unit."""

    name: str

    def build(self, *, steps_per_epoch: int, epochs: int) -> Method:
        """Returns the method, with all its steps as integers."""
        values = self.resolved(steps_per_epoch=steps_per_epoch, epochs=epochs)
        try:
            return METHODS[values.pop("name")](**values)
        except ValueError as error:
            given = {name: getattr(self, name) for name in values if getattr(self, name) != values[name]}
            named = [name for name in given if f"{name}=" in str(error)] or list(given)
            if not named:
                raise
            steps = ", ".join(f"method.{name} {given[name]!r} is {values[name]}" for name in named)
            length = f"{steps_per_epoch * epochs:,} in the training, {steps_per_epoch:,} an epoch"
            raise RecipeError(f"{error}; in steps, of which there are {length}: {steps}") from None


def _descriptions(cls: type[Method]) -> dict[str, str]:
    """Returns what the `Args:` section of a method's docstring says about each hyper-parameter."""
    found = {}
    for parameter in docstring_parser.parse(cls.__doc__ or "", docstring_parser.DocstringStyle.GOOGLE).params:
        text = " ".join((parameter.description or "").split())
        found[parameter.arg_name] = text[:1].upper() + text[1:]
    return found


@cache
def _method_section(name: str, cls: type[Method]) -> type[MethodSection]:
    """Returns the section of one method: the fields of its class, steps in any unit, `total` the whole training."""
    hints, fields = get_type_hints(cls, include_extras=True), {}
    descriptions = _descriptions(cls)
    for field in dataclasses.fields(cls):
        default = ... if field.default is dataclasses.MISSING else field.default
        if field.name == "total" and default is ...:
            default = "100%"
        kind = Steps if hints[field.name] == StepCount else hints[field.name]
        fields[field.name] = (kind, Field(default, description=descriptions.get(field.name)))
    literal = Annotated[Literal[name], Field(description="Method; `granet ls methods` lists them.")]
    doc = (cls.__doc__ or "").strip().split("\n")[0]
    return create_model(cls.__name__, __base__=MethodSection, __doc__=doc, name=(literal, name), **fields)


class _Sections(Mapping[str, type[MethodSection]]):
    """The section of each method in `METHODS`, made when it is first asked for."""

    def __getitem__(self, name: str) -> type[MethodSection]:
        return _method_section(name, METHODS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(METHODS)

    def __len__(self) -> int:
        return len(METHODS)


SECTIONS: Mapping[str, type[MethodSection]] = _Sections()
"""Name of a method to its section of a recipe: the hyper-parameters, with steps in any unit."""


@cache
def _union(sections: tuple[type[MethodSection], ...]) -> TypeAdapter:
    return TypeAdapter(Annotated[Union[sections], Field(discriminator="name")])  # noqa: UP007 (a union made at run time)


def _any_section() -> TypeAdapter:
    """Returns what validates the settings of any method that is registered at this moment."""
    return _union(tuple(SECTIONS.values()))


class _OfAnyMethod:
    """Tells pydantic to validate with `_any_section`, and to write a value as the section that it is."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: _any_section().validate_python(value))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: Any) -> dict[str, Any]:
        return handler(_any_section().core_schema)


AnyMethod = Annotated[MethodSection, _OfAnyMethod()]
