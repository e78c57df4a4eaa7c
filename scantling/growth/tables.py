"""Growing what lies outside the layers: vocabulary, learned positions, a head of its own, biases."""

from scantling.growth.axes import Dim, axes
from scantling.growth.steps import Change, Made, Moved, Step, appended, with_layer
from scantling.spec import ModelSpec


def grow_vocabulary(spec: ModelSpec, size: int) -> Step:
    """More tokens: logits of old ones stay, their probabilities do not, since new ones take a share."""
    change = Change(appended(spec.vocab_size, size), "free")
    return Step(
        "vocabulary",
        f"vocab_size {spec.vocab_size} to {size}",
        spec,
        spec.replace(vocab_size=size),
        {Dim("vocabulary"): change},
    )


def grow_positions(spec: ModelSpec, size: int) -> Step:
    """More learned positions; old ones are as they were."""
    change = Change(appended(spec.max_position_embeddings, size), "free")
    text = f"max_position_embeddings {spec.max_position_embeddings} to {size}"
    return Step("positions", text, spec, spec.replace(max_position_embeddings=size), {Dim("positions"): change})


def untie(spec: ModelSpec) -> Step:
    """An output head of its own, a copy of the input table; their gradients differ from the first step on."""
    sources = {"lm_head.weight": Moved("embed_tokens.weight")}
    return Step(
        "untie", "tie_word_embeddings true to false", spec, spec.replace(tie_word_embeddings=False), sources=sources
    )


def add_biases(spec: ModelSpec, target: ModelSpec) -> Step:
    """Biases where the target has them and the model has none, all zero. Layers correspond one to one."""
    after = spec.replace(lm_head_bias=target.lm_head_bias)
    for index, layer in enumerate(target.layers):
        changes = {"attention_bias": layer.attention_bias, "attention_out_bias": layer.attention_out_bias}
        after = with_layer(after, index, **changes)
    new = axes(after).keys() - axes(spec).keys()
    return Step("biases", "biases of zero", spec, after, sources={name: Made("zero") for name in new})
