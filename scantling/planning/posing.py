"""Which axes may be searched: a plan's families and ratios against what its law and its evidence know of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from scantling.errors import InputError, suggest
from scantling.planning.config import PlanConfig
from scantling.planning.evidence import Evidence, Gain, evidence_names, load_evidence
from scantling.planning.loss import FittedLaw, Law
from scantling.planning.space import Space
from scantling.planning.variants import Variant, variant_from

SEARCHED_ASPECT = (16.0, 256.0)  # hidden_size / num_hidden_layers, where the law knows width or depth
WIDTHS, LAYERS = ("width", "hidden_size"), ("depth", "num_hidden_layers")
SHAPE_COLUMNS = (*WIDTHS, *LAYERS, "aspect")
OF_SIZE = ("N", "C", "M")


def resolved(config: PlanConfig, law: Law) -> tuple[PlanConfig, Law, Evidence | None, tuple[Variant, ...]]:
    """The plan with its families spelled out, the law that knows them, the evidence and each variant's baseline.

    Raises:
        InputError: an axis is searched without evidence, or evidence and law do not go together.
    """
    evidence = _evidence(config, law)
    space = _with_families(config, law, evidence)
    if isinstance(law, FittedLaw):
        space = _shape_axes(config, law, space)
    _ratios(config, law, space)
    config = config.model_copy(update={"space": space})
    config.__dict__.pop("site", None)
    if not isinstance(law, FittedLaw):
        return config, law, evidence, ()
    law = replace(law, variants=space.variants)
    if evidence is None:
        return config, law, None, ()
    keys = dict(space.families).get(evidence.baseline, {}) if isinstance(space.families, dict) else {}
    parents = tuple(
        variant_from(
            v.name, keys, space.ffn.model_copy(update={"expansion": (v.dense_expansion,)}), space.num_hidden_layers
        )
        for v in space.variants
    )
    law = replace(law, gains=tuple(evidence.gains.get(v.name, Gain()) for v in space.variants))
    return config, law, evidence, parents


def _evidence(config: PlanConfig, law: Law) -> Evidence | None:
    if config.evidence is None:
        return None
    try:
        found = load_evidence(config.evidence, config.folder)
    except InputError as error:
        raise config.fault(("evidence",), "; ".join(error.faults)) from None
    if not isinstance(law, FittedLaw) or not law.plain:
        raise config.fault(
            ("evidence",),
            "a saving between families scales the N and D of a law of both (chinchilla, overtraining); "
            f"{law.name} is another law: use such a law, or one fitted per family without evidence",
        )
    return found


def _with_families(config: PlanConfig, law: Law, evidence: Evidence | None) -> Space:
    """The space with families by name and keys, each known to the law or the evidence."""
    space, grouped = config.space, _family_names(law)
    families: Mapping[str, Any] = space.families if isinstance(space.families, dict) else {}
    if not isinstance(space.families, dict):
        if evidence is None or not evidence.families:
            raise config.fault(
                ("space", "families"),
                "a list of names needs shipped evidence that defines them "
                f"(evidence: {' or '.join(evidence_names())}); else write {{name: keys}}, as in a study",
            )
        for name in space.families:
            if name not in evidence.families:
                raise config.fault(
                    ("space", "families"),
                    f"{evidence.name} does not know {name!r}{suggest(name, evidence.families)}; it has "
                    f"{', '.join(evidence.families)}",
                )
        families = {name: evidence.families[name] for name in space.families}
    elif not families and evidence is not None:
        families = evidence.families
    known = evidence.known if evidence is not None else grouped
    if not families and known:
        what = f"the evidence {evidence.name}" if evidence else f"the law {law.name}"
        raise config.fault(
            ("space", "families"),
            f"{what} tells {', '.join(known)} apart; say what they are, as in the study: {{name: keys}}",
        )
    for name in families:
        if not known:
            raise config.fault(
                ("space", "families", name),
                "nothing is known of this family's loss: name evidence ("
                f"{', '.join(evidence_names())}, or the JSON of `scantling fit --compare family --out`), or a law fitted per "
                "family (--law two-architectures)",
            )
        if name not in known:
            raise config.fault(
                ("space", "families", name),
                f"no evidence about {name!r}{suggest(name, known)}; known are {', '.join(known)}",
            )
    if dict(families) == space.families:
        return space
    try:
        for name, keys in families.items():
            variant_from(name, keys, space.ffn, space.num_hidden_layers)
    except ValueError as error:
        raise config.fault(("evidence",), f"its family {error}") from None
    return space.replace(families={name: dict(keys) for name, keys in families.items()})


def _family_names(law: Law) -> tuple[str, ...]:
    """The families a law was fitted to, where it was fitted per family."""
    if not isinstance(law, FittedLaw):
        return ()
    return next((tuple(values) for column, values in law.fit.groups.items() if column != "heads"), ())


def _shape_axes(config: PlanConfig, law: FittedLaw, space: Space) -> Space:
    """What the law says of sizes: the aspect ratio is searched where it knows one, and held where it knows no size."""
    columns = set(law.columns)
    shaped = columns & set(SHAPE_COLUMNS)
    sized = columns & set(OF_SIZE) or (columns & set(WIDTHS) and columns & set(LAYERS))
    one = all(values is not None and len(values) == 1 for values in (space.hidden_size, space.num_hidden_layers))
    if not sized and not one:
        raise config.fault(
            ("law",),
            f"{law.name} says nothing of how the loss falls with size, so it can only choose {', '.join(law.columns)} at one "
            "size: give one space.hidden_size and one space.num_hidden_layers",
        )
    if not law.knows_tokens and config.training.tokens_per_parameter is None:
        raise config.fault(
            ("training", "tokens_per_parameter"),
            f"{law.name} says nothing of training tokens; give the number that its runs had, such as 20",
        )
    given = space.aspect or space.hidden_size or space.num_hidden_layers
    if shaped and not given:
        return space.replace(aspect=SEARCHED_ASPECT)
    return space


def _ratios(config: PlanConfig, law: Law, space: Space) -> None:
    """Several feed-forward ratios need a law that tells them apart."""
    known = isinstance(law, FittedLaw) and {"ffn_ratio", "intermediate_size"} & set(law.columns)
    if len(space.ffn.expansion) > 1 and not known:
        raise config.fault(
            ("space", "ffn", "expansion"),
            f"{law.name} says nothing of how the feed-forward ratio changes the loss, so several cannot be ranked; give one, or "
            "a law with the column ffn_ratio (scantling fit --law 'E + A*N^-a + B*D^-b + K*ffn_ratio^c')",
        )
