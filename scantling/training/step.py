"""One optimizer step: micro-batches, loss, gradients, clipping, update. Nothing in it waits for the device."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scantling import checkpoint
from scantling.average import Average
from scantling.config import RunConfig
from scantling.data.dataset import Batch, Dataset
from scantling.model import Decoder, build
from scantling.model.guided import attach_guides, is_guide, plain_name, remove_guides, set_guides
from scantling.optim import apply, learning_rate_factor, make_optimizers
from scantling.placement import local
from scantling.profile import DATA
from scantling.spec import ModelSpec
from scantling.training import engine as engines
from scantling.training.engine import Engine
from scantling.training.parallel import World


@dataclass(frozen=True)
class Outcome:
    """What a step found, on the device: mean loss, gradient norm before clipping, and whether the update was made."""

    step: int
    rate: float
    values: Tensor

    def read(self) -> tuple[float, float, bool]:
        """(loss, gradient norm, applied); waits for the device."""
        loss, norm, bad = self.values.tolist()
        return loss, norm, not bad


@dataclass(frozen=True)
class Part:
    """A micro-batch: `count` numbered sequences from `first`, `share` of the step's; this process's own part of it."""

    first: int
    count: int
    share: float


class Stepper:
    """Model, optimizers and data of a run, and the step that moves them on."""

    def __init__(self, config: RunConfig, engine: Engine, world: World, dataset: Dataset, model: Decoder) -> None:
        self.config, self.engine, self.world, self.dataset, self.model = config, engine, world, dataset, model
        self.loader = Loader(self)
        self._start()

    @property
    def spec(self) -> ModelSpec:
        """The model's, which growth changes."""
        return self.model.spec

    def _start(self) -> None:
        config = self.config
        self.guided = config.guidance is not None
        if config.guidance is not None:
            attach_guides(self.model, config.guidance.stochastic)
        self.prepare()
        self.average = Average(self.model, config.train.average_decay) if config.train.average_decay else None

    def prepare(self) -> None:
        """Wrap the model as it is now, and make its optimizers."""
        engines.apply(self.engine, self.model)
        self.world.wrap(self.model, self.config, self.engine.precision)
        self.loss = self.world.loss(self.model)
        self.optimizers = make_optimizers(self.model, self.config.train)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def remove_guides(self) -> None:
        """The plain model from now on: the guides, their optimizer state and their average go."""
        kept = checkpoint.optimizer_tensors(self.model, self.optimizers)
        average = self.average.tensors() if self.average else {}
        remove_guides(self.model)
        self.guided = False
        self.prepare()
        kept = {name: value for name, value in kept.items() if not is_guide(name)}
        checkpoint.restore_optimizer(self.model, self.optimizers, kept)
        if self.average is not None:
            self.average = Average(self.model, self.average.decay)
            self.average.load({plain_name(name): value for name, value in average.items() if not is_guide(name)})

    def begin_again(self, fresh: Decoder) -> None:
        """Weights, optimizers, guides and average as at the start of the run, for a restore to fill."""
        remove_guides(self.model)
        if self.spec != fresh.spec:
            self.model = fresh
        else:
            checkpoint.restore_weights(self.model, checkpoint.weights_of(fresh)[0])
        self._start()

    def become(self, spec: ModelSpec) -> None:
        """A model of another spec, with fresh weights, optimizers and average, for a restore to fill."""
        self.model = build(spec, seed=self.config.train.seed, device=self.world.building)
        self._start()

    def close(self) -> None:
        """End the loader's thread."""
        self.loader.close()

    def parts(self, step: int, shift: int) -> list[Part]:
        """This process's share of each micro-batch of a step. An empty one repeats a sequence with weight 0."""
        first, total = self.config.sequences(step)
        world, size = self.world, self.engine.micro_batch_sequences * self.world.data_size
        found = []
        for start in range(0, total, size):
            count = min(size, total - start)
            low = start + count * world.data_rank // world.data_size
            high = start + count * (world.data_rank + 1) // world.data_size
            found.append(Part(first + shift + low, max(1, high - low), (high - low) / total))
        return found

    def step(self, step: int, shift: int, threshold: float) -> Outcome:
        """Train on the sequences of 0-based `step`.

        Args:
            shift: sequences passed over so far, by rollbacks.
            threshold: a mean loss above it is a spike: the update is left out.
        """
        config, train, engine = self.config, self.config.train, self.engine
        alpha = config.guidance.alpha(step) if config.guidance else None
        factor = learning_rate_factor(train, step, config.steps) * config.growth_factor(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        parts = self.parts(step, shift)
        loss = torch.zeros((), device=engine.device)
        for number, (part, batch) in enumerate(zip(parts, self.loader.batches(step, shift), strict=True)):
            if self.guided:
                set_guides(self.model, alpha, train.seed, step, number)
            inputs, labels, documents = batch
            torch.manual_seed(noise_seed(train.seed, step, number, self.world.data_rank))
            with self.world.accumulating(last=number == len(parts) - 1):
                with engines.autocasting(engine):
                    mean = self.loss(inputs, labels, documents, train.z_loss) / labels.numel()
                    part_loss = (mean + self.model.auxiliary_loss()) * part.share
                (part_loss * self.world.data_size).backward()
            loss += part_loss.detach()
        loss = self.world.sum(loss)
        norm = self.world.norm(self.parameters)
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | (loss > threshold)
        self._clip(norm)
        for optimizer in self.optimizers:
            apply(optimizer, bad)
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, bad)
        return Outcome(step, train.optimizer.learning_rate * factor, torch.stack((loss, norm, bad.float())))

    def _clip(self, norm: Tensor) -> None:
        limit = self.config.train.max_grad_norm or math.inf
        if math.isinf(limit) or (self.engine.device == "cpu" and norm.item() <= limit):
            return
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))


def noise_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of what a model draws in one pass (`gaussian` transitions), so that a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, step, micro_batch, rank]).generate_state(1, np.uint64)[0] >> 1)


class Loader:
    """The batches of a step, the next micro-batch assembled while the device works on this one."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.ahead: tuple[Part, Future[tuple[Tensor, Tensor, Tensor | None]]] | None = None

    def batches(self, step: int, shift: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs, labels and document numbers of each micro-batch, on the device."""
        parts = self.stepper.parts(step, shift)
        after = self.stepper.parts(step + 1, shift)[:1] if step + 1 < self.stepper.config.steps else []
        for part, following in zip(parts, [*parts[1:], *after, None], strict=False):
            mine = (
                self.ahead[1]
                if self.ahead is not None and self.ahead[0] == part
                else self.pool.submit(self._load, part)
            )
            with torch.profiler.record_function(DATA):
                batch = mine.result()
            self.ahead = (following, self.pool.submit(self._load, following)) if following is not None else None
            yield batch

    def _load(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        train, device = self.stepper.config.train, self.stepper.engine.device
        batch: Batch = self.stepper.dataset.sequences(
            seed=train.seed,
            first=part.first,
            count=part.count,
            sequence_length=train.sequence_length,
            documents=train.document_mask,
        )

        def moved(array: object) -> Tensor:
            tensor = torch.from_numpy(array)
            return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

        return moved(batch.inputs), moved(batch.labels), None if batch.documents is None else moved(batch.documents)

    def close(self) -> None:
        """End the thread."""
        self.pool.shutdown(cancel_futures=True)
