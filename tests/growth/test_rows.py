"""Rows of a grown tensor are the same one by one, in pieces and all at once; memory is a few pieces, whatever the tensor."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scantling.checkpoint import weights_of
from scantling.growth import weights
from scantling.growth.weights import Role, applied
from scantling.lineage import Policy
from scantling.tensor_files import Held, rows_of, tensors
from tests.growth.growing import random_model
from tests.growth.test_conformance import drawn, several


@settings(max_examples=20)
@given(data=st.data())
def test_rows_are_the_same_in_any_company(data: st.DataObject) -> None:
    start = drawn(data.draw)  # type: ignore[arg-type]
    steps = list(several(data.draw, start, data.draw(st.integers(1, 4)), Counter()))  # type: ignore[arg-type]
    role: Role = data.draw(st.sampled_from(["weight", "first", "second"]))
    policy = Policy(free=data.draw(st.sampled_from(["initializer", "matching"])))
    grown = applied(Held(weights_of(random_model(start))[0]), steps, policy, role)
    few = data.draw(st.integers(1, 5))
    with patch.object(weights, "DRAWN_AT_ONCE", 50):  # seeds change within a tensor
        for name in grown.names:
            whole = grown.tensor(name)
            assert (tuple(whole.shape), whole.dtype) == (grown.shape(name), grown.dtype(name))
            with patch.object(tensors, "PIECE_BYTES", 64):  # statistics of old tensors are summed in another order
                rows, shown = grown.rows(name), b"".join(map(bytes, grown.pieces(name)))
                for given_rows in (
                    rows,
                    rows_of(torch.frombuffer(bytearray(shown), dtype=whole.dtype).view(whole.shape)),
                ):
                    parts = [given_rows(at, min(at + few, len(whole))) for at in range(0, len(whole), few)]
                    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)


PEAK = """
import sys, torch
from pathlib import Path
from scantling.growth.path import path
from scantling.growth.weights import applied
from scantling.resolve import spec_from
from scantling.tensor_files import Produced, open_tensors, write_tensors
from scantling.growth.axes import shapes
folder = Path(sys.argv[1])
sizes = dict(vocab_size=8192, hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=8)  # two tables of 32 MiB
spec, target = spec_from(sizes), spec_from({**sizes, "hidden_size": 1152, "num_attention_heads": 4})
kinds = {name: (shape, torch.float32) for name, shape in shapes(spec).items()}
write_tensors(folder / "old", Produced(kinds, lambda name: torch.ones(kinds[name][0])))
grown = applied(open_tensors(folder / "old"), list(path(spec, target)))
grown.tensor("layers.0.self_attn.q_proj.weight")  # what comes with the first random numbers
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew at what is held now
before = peak()
write_tensors(folder / "new", grown)
print(peak() - before)
"""


def test_memory_is_a_few_pieces(tmp_path: Path) -> None:
    """In MiB above what the process holds before, for tensors of 36 MiB made of 32."""
    found = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True)
    assert float(found.stdout) < 28
