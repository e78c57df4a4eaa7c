"""The verb of plans: plan."""

from pathlib import Path

from scantling.cli.app import Json, Set, app, print_json


@app.command
def plan(plan: Path, *, out: Path | None = None, set_: Set = (), json_: Json = False) -> None:
    """The cost-optimal shapes for a budget or a target loss, over training and inference.

    Args:
        plan: The plan YAML.
        out: Write the plan JSON here, and beside it YAML: the best shape, a study that tests the choice, the runs to do next.
    """
    from scantling import show
    from scantling.files import write_json, write_text
    from scantling.planning import load_plan
    from scantling.planning import plan as solve

    result = solve(load_plan(plan, set_))
    if out is not None:
        write_json(out, result.to_json())
        asked = {
            "best": result.candidates[0].yaml,
            "study": result.study,
            "next": result.next.study if result.next else None,
        }
        for name, text in asked.items():
            if text is not None:
                write_text(out.with_suffix(f".{name}.yaml"), text)
    print_json(result.to_json()) if json_ else show.plan(result)
