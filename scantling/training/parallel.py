"""The processes of a run: one, or those of torchrun. All wrapping of models for several devices lives in this file.

The order is fixed: tensor parallelism, activation checkpointing, (compilation, by the engine), then DDP or FSDP. Models know
nothing of it. Every process computes its share of a micro-batch and scales its loss so that averaging gradients over the
processes gives the gradient of one process. Two things are not sums over tokens: a router's load-balance loss is taken over
each process's own share, as if these shares were micro-batches of one process that accumulates gradients; and self-guided
training draws once per micro-batch, the same in all processes.
"""

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial, wraps
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from scantling.checkpoint import write_tensors
from scantling.config import RunConfig
from scantling.errors import InputError, RunError, ScantlingError
from scantling.model import Decoder
from scantling.model.guided import is_guide
from scantling.model.norm import Norm
from scantling.parts import DenseFFN
from scantling.placement import local
from scantling.recipe import Muon, Precision
from scantling.spec import ModelSpec

Value = TypeVar("Value")
WAIT = timedelta(days=1)  # for one another: the main process may be preparing data; torchrun sees the dead at once
STARTS = count()  # one process may train several runs, one after the other


def speaks() -> bool:
    """Whether this process is the one that talks to the user: the only one, or rank 0 of torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


class World:
    """One process, or (`Processes`) one of several that share a run.

    Attributes:
        size: processes of the run.
        main: whether this process writes files and speaks.
        device: where it computes.
        building: where models are built; sharded ones move to the device layer by layer.
        data_rank, data_size: which share of every batch is this process's.
        shards: processes that share weights, gradients and optimizer state.
        processes_here: processes on this machine that share its memory.
    """

    def __init__(self) -> None:
        self.main = True
        self.device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
        self.building: str = self.device
        self.size = 1
        self.data_rank, self.data_size, self.shards, self.processes_here = 0, 1, 1, 1

    def wrap(self, model: Decoder, config: RunConfig, precision: Precision) -> None:
        """Prepare a built model, in place, for this world; again after its parameters changed."""
        if config.train.parallel.activation_checkpointing:
            for layer in model.layers:
                if "forward" not in vars(layer):
                    again = partial(recomputed, layer.forward, use_reentrant=False, preserve_rng_state=False)
                    layer.forward = again

    def loss(self, model: Decoder) -> Callable[..., Tensor]:
        """What to call for the training loss: `Decoder.total_loss`'s arguments and result."""
        return model.total_loss

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch's forward and backward pass: copies of a model exchange gradients only in the last one."""
        return nullcontext()

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes' shares of a batch."""
        return value

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of all gradients, 0-d."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)

    def agree(self, decide: Callable[[], Value]) -> Value:
        """What the main process decides."""
        return decide()

    def first(self, make: Callable[[], Value]) -> Value:
        """What every process makes, the main one before the others, so that they find its files."""
        return make()

    def any_reason(self, reason: str | None) -> str | None:
        """A reason that any process has, told to all; None when none has one."""
        return reason

    def wait(self) -> None:
        """Until every process is here."""

    def write(self, tensors: Mapping[str, Tensor], path: Path | None) -> None:
        """Write a checkpoint's group of tensors; every process calls this, but only the main one knows where."""
        if path is not None:
            write_tensors(tensors, path)


class Processes(World):
    """One process of torchrun's: gloo between CPUs, NCCL between GPUs, one GPU per process."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.size, self.main = dist.get_world_size(), dist.get_rank() == 0
        parallel = config.train.parallel
        refuse(config, self.size)
        self.processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        mesh = init_device_mesh(
            self.device, (self.size // parallel.tensor, parallel.tensor), mesh_dim_names=("data", "tensor")
        )
        self.data, self.tensor = mesh["data"], mesh["tensor"]
        self.data_rank, self.data_size = self.data.get_local_rank(), self.data.size()
        self.sharded = parallel.kind == "fsdp"
        self.building = "cpu" if self.sharded else self.device
        self.shards = self.size if self.sharded else 1
        self.copies: DistributedDataParallel | None = None

    # --- models ----------------------------------------------------------------------------------------------------

    def wrap(self, model: Decoder, config: RunConfig, precision: Precision) -> None:
        """DDP around the loss, or layers, then the rest, sharded in place.

        Under bfloat16 FSDP gathers the layers' matrices in bfloat16 and adds their gradients up in float32; norms, tables and
        head are gathered in float32, and autocast does the rest, so that the stream is float32 as in one process.
        """
        if self.sharded and isinstance(model, FSDPModule):
            return
        if self.tensor.size() > 1:
            for layer in model.layers:
                parallelize_module(layer, self.tensor, _tensor_plan(layer))
        super().wrap(model, config, precision)
        if not self.sharded:
            drawn = config.guidance is not None and config.guidance.stochastic  # guides are left out of some passes
            drawn = drawn and any(is_guide(name) for name, _ in model.named_parameters())
            self.copies = None  # a former one takes its hooks with it
            self.copies = DistributedDataParallel(
                _Loss(model), find_unused_parameters=drawn, gradient_as_bucket_view=True
            )
            return
        whole = lower = MixedPrecisionPolicy(cast_forward_inputs=False)
        if precision == "bfloat16":
            lower = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in model.layers:
            if lower is not whole:
                fully_shard(
                    [norm for norm in layer.modules() if isinstance(norm, Norm)], mesh=self.data, mp_policy=whole
                )
            fully_shard(layer, mesh=self.data, mp_policy=lower)
            register_fsdp_forward_method(layer, "update")
        fully_shard(model, mesh=self.data, mp_policy=whole)
        register_fsdp_forward_method(model, "total_loss")
        model.total_loss = _resharding(model, model.total_loss)  # type: ignore[method-assign]

    def loss(self, model: Decoder) -> Callable[..., Tensor]:
        return model.total_loss if self.copies is None else self.copies

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """FSDP reduces every micro-batch's gradients, to keep them sharded."""
        return nullcontext() if last or self.copies is None else self.copies.no_sync()

    # --- numbers ---------------------------------------------------------------------------------------------------

    def sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self.data.get_group())
        return total

    def norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """Of sharded gradients: every process adds the squares of its parts, each divided by how many hold the same part."""
        if not self.sharded:
            return super().norm(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
        holders = torch.tensor([self._holders(gradient) for gradient in gradients], device=norms.device)
        total = (norms.square() / holders).sum()
        dist.all_reduce(total)
        return total.sqrt()

    def _holders(self, tensor: Tensor) -> float:
        """How many processes hold the same part of a tensor."""
        if not isinstance(tensor, DTensor):
            return float(self.size)
        mesh, same = tensor.device_mesh, 1
        for size, placement in zip(mesh.shape, tensor.placements, strict=True):
            same *= size if placement.is_replicate() else 1
        return self.size / mesh.size() * same

    # --- decisions -------------------------------------------------------------------------------------------------

    def agree(self, decide: Callable[[], Value]) -> Value:
        box = [decide() if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def first(self, make: Callable[[], Value]) -> Value:
        if self.main:
            value = make()
            self.wait()
            return value
        self.wait()
        return make()

    def any_reason(self, reason: str | None) -> str | None:
        """One number goes round between the hosts every step; the reason itself only when there is one."""
        some = torch.tensor(0 if reason is None else 1)
        dist.all_reduce(some, op=dist.ReduceOp.MAX)
        if not some.item():
            return None
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, reason)
        return next(found for found in reasons if found is not None)

    def wait(self) -> None:
        dist.all_reduce(torch.zeros(1))

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def write(self, tensors: Mapping[str, Tensor], path: Path | None) -> None:
        """Sharded tensors: every process writes its parts, then the main one streams them into one file.

        No process ever holds them whole (torch.distributed.checkpoint with its safetensors writer). Scalars, which that
        writer loses (torch 2.13), go into a file beside it: `optimizer.scalars.safetensors`.
        """
        if not self.sharded:
            return super().write(tensors, path)
        path = Path(self.agree(lambda: str(path)))
        parts = path.with_suffix(".parts")
        writer = HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
        try:
            save_parts({name: tensor for name, tensor in tensors.items() if tensor.ndim}, storage_writer=writer)
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            raise next((cause for cause in causes if isinstance(cause, OSError)), OSError(5, str(error))) from error
        if self.main:
            (whole,) = parts.glob("*.safetensors")
            whole.rename(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            shutil.rmtree(parts)
            if scalars := {name: tensor for name, tensor in tensors.items() if not tensor.ndim}:
                write_tensors(scalars, path.with_suffix(f".scalars{path.suffix}"))


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DDP wraps. Routers keep their auxiliary losses as ever."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any) -> Tensor:
        return self.model.total_loss(*arguments)


def _resharding(model: Decoder, total_loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without a backward pass the root's weights would stay gathered, and the parameters' names point to copies."""

    @wraps(total_loss)
    def call(*arguments: Any, **keywords: Any) -> Tensor:
        loss = total_loss(*arguments, **keywords)
        if not torch.is_grad_enabled():
            model.reshard()  # type: ignore[operator]
        return loss

    return call


def _tensor_plan(layer: nn.Module) -> dict[str, Any]:
    """Heads and feed-forward units split over processes: the first matrix by its outputs, the second by its inputs."""
    first = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    first += [f"mlp.{name}" for name in ("gate_proj", "up_proj") if hasattr(layer.mlp, name)]
    return {
        **{name: ColwiseParallel() for name in first},
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }


# --- what is refused ---------------------------------------------------------------------------------------------------


def refuse(config: RunConfig, size: int) -> None:
    """Raise InputError, every fault at once, for what `size` processes cannot do with this run."""
    parallel, faults = config.train.parallel, []
    if size % parallel.tensor:
        faults.append(
            f"train.parallel.tensor: {parallel.tensor} processes share a layer, expected a multiple of that many, got {size}; "
            f"start torchrun with --nproc-per-node {parallel.tensor}, or --set train.parallel.tensor=1"
        )
    if parallel.tensor > 1:
        if parallel.kind != "fsdp":
            faults.append(f"train.parallel: tensor {parallel.tensor} goes with kind fsdp, got {parallel.kind}")
        for stage in config.stages:
            faults += _indivisible(stage.spec, parallel.tensor)
    if size > 1 and parallel.kind == "fsdp":
        if config.guidance is not None:
            faults.append(
                "train.parallel: guides appear and go, which fsdp cannot follow; use kind: ddp, or leave guide out"
            )
        if isinstance(config.train.optimizer, Muon):
            faults.append(
                "train.parallel: muon needs whole matrices, fsdp shards them; use kind: ddp, or optimizer adamw"
            )
    if faults:
        raise InputError(*faults)


def _indivisible(spec: ModelSpec, parts: int) -> list[str]:
    """Why layers cannot be split over processes: the first layer for each reason."""
    found: dict[str, str] = {}
    for index, layer in enumerate(spec.layers):
        ffn = layer.ffn
        where = f"train.parallel.tensor {parts}: layer {index} has"
        counts = {"query heads": layer.num_attention_heads, "key/value heads": layer.num_key_value_heads}
        if isinstance(ffn, DenseFFN):
            counts["feed-forward units"] = ffn.intermediate_size
        else:
            found.setdefault("ffn", f"{where} a {ffn.kind} feed-forward, expected a dense one")
        if layer.qk_norm is not None:
            found.setdefault("qk_norm", f"{where} qk_norm, whose gains all heads share; expected none")
        if layer.head_to_group is not None:
            found.setdefault("head_to_group", f"{where} a head_to_group map, expected equal groups")
        for name, number in counts.items():
            if number % parts:
                found.setdefault(name, f"{where} {number} {name}, expected a multiple of {parts}")
    return list(found.values())


# --- start and end -----------------------------------------------------------------------------------------------------


@contextmanager
def started(config: RunConfig) -> Iterator[World]:
    """The world this process finds itself in, until the run is over.

    When one process fails, all end with its exit code, and the first to fail is the only one that says why.

    Raises:
        InputError: this number of processes cannot do this run (`refuse`).
        RunError: another process was lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        refuse(config, 1)
        yield World()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    base, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"scantling/{next(STARTS)}", base)
    kind = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=WAIT)
    try:
        yield Processes(config)
        store.set(f"done/{rank}", "")  # none may hang up while another still listens
        store.wait([f"done/{each}" for each in range(size)], WAIT)
    except Exception as error:
        code = error.exit_code if isinstance(error, ScantlingError) else 1
        mine = f"{rank} {code}"
        told = store.compare_set("failed", "", mine).decode()
        if told != mine:
            raise SystemExit(int(told.split()[1])) from None
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RunError(
                "another process of this run was lost; start the same command again to go on from the last checkpoint"
            ) from error
        raise
    finally:
        gc.collect()  # a sharded model keeps its group alive, whose threads must end before the interpreter does
        dist.destroy_process_group()


__all__ = ["Processes", "World", "refuse", "speaks", "started"]
