"""Data-parallel training under torchrun: which of the processes this one is, and what they do together.

`joined()` makes the process group that torchrun's environment describes, `current()` is this process's place in it. In
a process of its own every operation is the identity, so that a training loop is written once.
"""

from __future__ import annotations

import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")

_blocks = itertools.count()  # of work done together, in this process: the same number on every rank


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train one network together; the defaults are a process of its own.

    All ranks must call each of the methods that send something together.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local: its number on its node, which is that of its GPU.
        neighbours: how many there are on its node.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and talks to the user."""
        return self.rank == 0

    @property
    def workers(self) -> int | None:
        """The processes that may decode this rank's images; None where all cores are its own."""
        return None if self.world == 1 else max(1, min(16, (os.cpu_count() or 1) // self.neighbours))

    def share(self, batch_size: int, accumulate: int = 1) -> int:
        """The examples of a batch that are this rank's.

        Raises:
            ValueError: the batch cannot be split evenly among ranks, and each share into `accumulate` parts.
        """
        if batch_size % (self.world * accumulate):
            parts = f"{self.world} processes" + (f" times accumulate={accumulate}" if accumulate > 1 else "")
            least = self.world * accumulate
            near = max(round(batch_size / least), 1) * least
            raise ValueError(
                f"train.batch_size is that of all processes together, and {batch_size} cannot be split evenly among "
                f"{parts}: {near} could"
            )
        return batch_size // self.world

    def device(self, name: str) -> torch.device:
        """The device that a recipe's `train.device` means on this rank: each rank of a node has a GPU of its own.

        Raises:
            ValueError: there is no such device, or it cannot be shared.
        """
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(
                f"train.device: there is no device {name!r}; write 'auto', 'cpu', 'cuda' or 'cuda:1'"
            ) from None
        if device.type != "cuda":
            return device
        if not torch.cuda.is_available():
            raise ValueError(f"train.device: {name!r} is asked for, but torch sees no GPU; 'auto' takes what there is")
        if self.world == 1:
            return device
        if device.index is not None:
            raise ValueError(f"train.device: {name!r} is one GPU, for {self.world} processes; write 'cuda' or 'auto'")
        if self.neighbours > torch.cuda.device_count():
            raise ValueError(
                f"{self.neighbours} processes on this node, but {torch.cuda.device_count()} GPUs: start one a GPU"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def replica(self, model: nn.Module) -> nn.Module:
        """`model` as DistributedDataParallel: the mean of all ranks' gradients arrives in the backward pass.

        Its buffers are left alone, because `mean_` averages them: rank 0's would speak for its own examples only.
        """
        if self.world == 1:
            return model
        ddp = nn.parallel.DistributedDataParallel
        new = "forward_sync_buffers"  # what torch before 2.13 calls broadcast_buffers
        return ddp(model, **{new if new in inspect.signature(ddp).parameters else "broadcast_buffers": False})

    def turns(self, replica: nn.Module, parts: Sequence[T]) -> Iterator[T]:
        """Each of `parts`; only the backward pass of the last one, in the loop's body, sends the sum of gradients."""
        if self.world > 1:
            for part in parts[:-1]:
                with replica.no_sync():
                    yield part
            parts = parts[-1:]
        yield from parts

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Set each of the tensors to its mean over all ranks, in one message."""
        if self.world == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor`, which becomes the sum over all ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is True on any rank."""
        return flag if self.world == 1 else bool(self.sum_(torch.tensor(int(flag))))  # on the CPU: no GPU is waited for

    def decide(self, answer: Callable[[], T]) -> T:
        """What `answer()` gives on the first rank, which alone calls it and tells the others.

        For whatever two ranks might see differently: files, which appear between two looks at them, clocks, the
        environment, random numbers.

        Raises:
            Exception: on the first rank what `answer` raised.
            RankError: on the others, with the message of that error.
        """
        if self.world == 1:
            return answer()
        said, mine = [None, None], None
        if self.first:
            try:
                said[0] = answer()
            except Exception as error:
                mine, said[1] = error, described(error)
        dist.broadcast_object_list(said, src=0)
        if mine is not None:
            raise mine
        if said[1] is not None:
            raise RankError(f"rank 0 failed: {said[1]}")
        return said[0]

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Work that each rank does by itself, and that may fail on some: with one rank all of them fail.

        Nothing inside may send anything, or the ranks that have not failed wait for those that have.

        Raises:
            RankError: on ranks that did not fail themselves, with the message of one that did.
        """
        mine = None
        try:
            yield
        except Exception as error:
            mine = error
        if self.any(mine is not None):
            if self.world > 1:
                said = [None] * self.world
                dist.all_gather_object(said, mine and described(mine))
            if mine is not None:
                raise mine
            rank, message = next((rank, message) for rank, message in enumerate(said) if message is not None)
            raise RankError(f"rank {rank} failed: {message}")

    def same(self, what: str, value: object) -> None:
        """Compare a value that all ranks should have alike.

        Raises:
            ValueError: on the ranks where it is not that of the first.
            RankError: on the others.
        """
        theirs = self.decide(lambda: value)
        with self.guard():
            if value != theirs:
                raise ValueError(f"{what}: rank {self.rank} has {value}, where rank 0 has {theirs}")

    def each(self, items: Iterable[T]) -> Iterator[T]:
        """The items, as many on every rank; where one cannot be had on one rank (a broken image), all ranks fail."""
        iterator = iter(items)
        while True:
            with self.guard():
                item = next(iterator, iterator)
            if item is iterator:
                return
            yield item

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that all ranks do together: those that wait in vain for one that failed end with its message.

        They learn of it when the process that failed ends: torchrun sees to that, as does
        `torch.multiprocessing.spawn`.

        Raises:
            RankError: another rank failed; the message is that of its error.
            ConnectionError: another rank died without a word, or was not heard of for the group's timeout.
        """
        if self.world == 1:
            yield
            return
        store = dist.PrefixStore(f"granet {next(_blocks)}", dist.distributed_c10d._get_default_store())
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            if not _lost(error):
                with suppress(RuntimeError):  # the process that had the store may be gone
                    store.compare_set("failed", "", f"rank {self.rank} failed: {described(error)}")
                raise
            with suppress(RuntimeError):
                store.wait(["failed"], timedelta(seconds=2))
                raise RankError(store.get("failed").decode()) from error
            raise ConnectionError(f"the other processes are gone, or do not answer: {error}") from error


class RankError(ConnectionError):
    """Another rank failed, and this one with it: the message is that of the other rank's error."""


def described(error: BaseException) -> str:
    """The type and the message of `error`, for the other ranks."""
    return f"{type(error).__name__}: {error}"


def _lost(error: BaseException) -> bool:
    """Whether `error` is that of a message that did not arrive."""
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)


def current() -> Ranks:
    """This process's place in the default process group; a place of its own without one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Ranks()
    world = dist.get_world_size()
    local, neighbours = (
        int(os.environ.get(key, default))
        for key, default in (("LOCAL_RANK", dist.get_rank()), ("LOCAL_WORLD_SIZE", world))
    )
    return Ranks(dist.get_rank(), world, local, neighbours)


@contextmanager
def joined(timeout: timedelta = timedelta(minutes=10)) -> Iterator[Ranks]:
    """Gives this process's place among those that torchrun started, joined in a process group while inside.

    Args:
        timeout: how long a rank waits for the others before it gives up with an error.

    Raises:
        RankError: another rank failed; the message is that of its error.
        ConnectionError: another rank died without a word, or was not heard of for `timeout`.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield current()
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # a restart finds the store of the life before, with addresses where nobody listens any more. On several nodes
        # the count of restarts is not the same everywhere
        store = dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # what lies on the CPU goes by gloo, so that no GPU is waited for; what lies on GPUs by NCCL
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    here = current()
    try:
        with here.together():
            yield here
    finally:
        leave()


def leave() -> None:
    """Leave the process group, as `destroy_process_group()`, once gloo's threads have let go of the last message.

    They need the interpreter's lock for that (torch 2.13). A process that leaves within milliseconds of its last
    message hangs, if a DistributedDataParallel is the last to hold the group, or is aborted when the interpreter ends.
    Without a group there is nothing to leave.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    time.sleep(0.2)
    dist.destroy_process_group()
