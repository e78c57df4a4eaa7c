"""What a run in progress is beside its configuration, and how it gets into and out of checkpoints."""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scantling import checkpoint
from scantling.checkpoint import AVERAGE, GUIDES, MODEL, OPTIMIZER
from scantling.config import RunConfig
from scantling.errors import InputError
from scantling.files import explained
from scantling.model.guided import plain_name
from scantling.recipe import Guard
from scantling.training.guard import Watch
from scantling.training.lineage import Groups, grown_groups, parents, started_optimizer
from scantling.training.parallel import World
from scantling.training.step import Stepper


@dataclass
class State:
    """What changes while a run runs, beside weights, optimizer state, average and guides.

    Attributes:
        step: optimizer steps done.
        shift: sequences passed over by rollbacks.
        seconds: of training, evaluations and checkpoints left out.
        tail: losses of the last steps.
        best: (step, validation loss) of the best evaluation.
        saved: the step of the newest checkpoint.
        parents: stages of earlier runs.
    """

    watch: Watch
    step: int = 0
    shift: int = 0
    seconds: float = 0.0
    tail: list[float] = field(default_factory=list)
    best: tuple[int, float] | None = None
    saved: int = 0
    diverged: bool = False
    parents: list[dict[str, Any]] = field(default_factory=list)

    def note_validation(self, step: int, loss: float) -> bool:
        """Keep a validation loss if it is the best so far, and say whether it is."""
        if not loss < (self.best[1] if self.best is not None else math.inf):  # never NaN
            return False
        self.best = (step, loss)
        return True

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's state.json holds, beside the step."""
        return {
            "shift": self.shift,
            "seconds": self.seconds,
            "tail": self.tail,
            "best": self.best,
            "losses": self.watch.losses,
            "events": self.watch.events,
        }


def _state_from(found: dict[str, Any], guard: Guard) -> State:
    step, best = int(found["step"]), found["best"]
    return State(
        watch=Watch(guard, list(found["losses"]), list(found["events"])),
        step=step,
        shift=int(found["shift"]),
        seconds=float(found["seconds"]),
        tail=list(found["tail"]),
        best=(int(best[0]), float(best[1])) if best else None,
        saved=step,
        parents=list(found.get("parents", [])),
    )


def save(config: RunConfig, out: Path, stepper: Stepper, state: State) -> None:
    """Write a checkpoint of everything.

    Raises:
        RunError: the disk is full; older checkpoints are untouched.
    """
    weights, guides = checkpoint.weights_of(stepper.model)
    average = {} if stepper.average is None else stepper.average.tensors()
    tensors = {
        MODEL: weights,
        OPTIMIZER: checkpoint.optimizer_tensors(stepper.model, stepper.optimizers),
        AVERAGE: {plain_name(name): value for name, value in average.items()},
        GUIDES: guides,
    }
    protected = {state.best[0]} if state.best is not None and config.train.keep_best else set()
    if stepper.world.main:
        checkpoint.save(
            out / "checkpoints",
            state.step,
            stepper.spec,
            tensors,
            {
                "run_hash": config.hash,
                "data": stepper.dataset.fingerprint,
                **state.to_json(),
                "parents": state.parents,
                "stages": config.history(state.step),
            },
            keep=config.train.keep_last,
            protected=protected,
            write=stepper.world.write,
        )
    else:
        with explained(out / "checkpoints"):
            for group in tensors.values():
                if group:
                    stepper.world.write(group, None)
    state.saved = state.step


def _newest(root: Path, world: World) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    """The checkpoint that the main process takes for the newest whole one, and what it passed over."""
    found, passed = checkpoint.load_latest(root) if world.main else (None, [])
    folder, passed = world.agree(lambda: (found.folder if found else None, passed))
    if not world.main:
        return checkpoint.load(folder) if folder else None, passed
    for sentence in passed:
        print(sentence, file=sys.stderr)
    return found, passed


def restore(config: RunConfig, out: Path, stepper: Stepper) -> tuple[State, list[str]]:
    """The newest whole checkpoint put into the stepper, or a fresh state; and what was passed over, in sentences.

    A checkpoint taken where the model grows is grown on its way in, with a receipt in the run folder.

    Raises:
        InputError: the checkpoint belongs to another run.
    """
    found, passed = _newest(out / "checkpoints", stepper.world)
    if found is None:
        checkpoint.restore_optimizer(stepper.model, stepper.optimizers, started_optimizer(config))
        return State(Watch(config.train.guard), parents=parents(config)), passed
    if found.state.get("run_hash") != config.hash:
        raise InputError(f"{found.folder}: belongs to another run; delete {out} or choose another --out")
    was, now = found.state.get("data"), stepper.dataset.fingerprint
    if was != now:
        raise InputError(
            f"{found.folder}: the data changed since this run began (fingerprint {str(was)[:12]} then, {now[:12]} now); "
            "bring the old texts back, or start another run with another --out"
        )
    try:
        state = _state_from(found.state, config.train.guard)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{found.folder}: its state is not one this version wrote ({error!r})") from None
    stage = config.stage(state.step)
    groups: Groups = found.tensors
    if stage.growth is not None and found.spec != stage.spec:
        groups = grown_groups(found, stage, out, stepper.world.main)
        state.watch.losses.clear()  # of another model
    if stepper.spec != stage.spec:
        stepper.become(stage.spec)
    guides = found.group(GUIDES)
    if stepper.guided and not guides:
        stepper.remove_guides()
    checkpoint.restore_weights(stepper.model, groups[MODEL], guides)
    checkpoint.restore_optimizer(stepper.model, stepper.optimizers, groups.get(OPTIMIZER, {}))
    if stepper.average is not None:
        names = {plain_name(name): name for name in stepper.average.tensors()}
        stepper.average.load({names.get(name, name): value for name, value in groups.get(AVERAGE, {}).items()})
    return state, passed
