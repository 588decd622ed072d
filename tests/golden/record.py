"""Records in tests/golden what transformers computes, and runs it for a live test.

    python tests/golden/record.py       (needs torch, transformers and accelerate; rewrites the golden.npz files)

Recorded with transformers 5.23.0 and torch 2.13.0+cpu: float32, eager attention, one thread. What those versions
recorded before is asked of the cases of random weights again, to the bit, so that a file never mixes two runs.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent
LAST = 5  # positions of the built-in model whose logits are recorded
FIRST_OF_GROUP = ("q_proj", "o_proj", "gate_proj", "down_proj")  # linears whose input is that of their whole group


@dataclass(frozen=True)
class Run:
    """What transformers computed for a prompt of T tokens and N more, chosen greedily and fed one by one."""

    logits: NDArray[np.float32]  # [T, vocab]
    greedy: list[int]  # [N]
    q: list[NDArray[np.int8]]  # [T + N, K] for each group of linears, in order
    hidden: list[NDArray[np.float32]]  # [T, hidden]: embedding, and after each layer

    def groups(self, name: str) -> dict[str, NDArray]:
        """Int8 activations under the names by which they are recorded."""
        return {f"q/{name}/{i}": q for i, q in enumerate(self.q)}


class Transformers:
    """A Hugging Face folder, run by transformers in float32."""

    def __init__(self, folder: Path):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers compiles its quantisation, which needs a C++ compiler
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self.model = torch.nn.Module.float(model)  # from_pretrained leaves norms and scales in the file's bfloat16
        self.q: list[list[NDArray[np.int8]]] = []
        self.hidden: list[NDArray[np.float32]] = []
        for name, module in self.model.named_modules():
            if type(module).__name__ == "BitLinear":
                module.dtype = torch.float32
            if name.split(".")[-1] in FIRST_OF_GROUP:
                self.q.append([])
                module.register_forward_pre_hook(self._keep_activations(self.q[-1]))
            if type(module).__name__.endswith("DecoderLayer"):
                module.register_forward_pre_hook(lambda _, given: self.hidden.append(given[0][0].numpy().copy()))
                last = module
        last.register_forward_hook(lambda _, __, out: self.hidden.append(out[0].numpy().copy()))

    @staticmethod
    def _keep_activations(kept: list[NDArray[np.int8]]) -> Any:
        """A hook that quantises a linear's input as the linear itself is about to."""

        def hook(module: Any, given: tuple[Any, ...]) -> None:
            assert module.rms_norm is None
            scale = 127 / given[0].abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            kept.append((given[0] * scale).round().clamp(-128, 127).numpy().astype(np.int8)[0])

        return hook

    def run(self, ids: list[int], more: int = 0) -> Run:
        """A prompt in one pass, and `more` tokens after it."""
        import torch

        for kept in self.q:
            kept.clear()
        self.hidden.clear()
        greedy: list[int] = []
        with torch.no_grad():
            out = self.model(torch.tensor([ids]), use_cache=True)
            logits, hidden = out.logits[0].numpy(), list(self.hidden)
            for _ in range(more):
                greedy.append(int(out.logits[0, -1].argmax()))
                token = torch.tensor([greedy[-1:]])
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
        return Run(logits, greedy, [np.concatenate(kept) for kept in self.q], hidden)


def record_random_weights(name: str) -> None:
    """Adds int8 activations to what is recorded of a checkpoint of random weights."""
    path = GOLDEN / name / "golden.npz"
    with np.load(path) as before:
        recorded = {key: before[key] for key in before if not key.startswith("q/")}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
        config = json.loads((Path(folder) / "config.json").read_text())
        (Path(folder) / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
        model = Transformers(Path(folder))
        for prompt in [key[4:] for key in recorded if key.startswith("ids/")]:
            greedy = recorded.get(f"greedy/{prompt}", np.array([], np.int64))
            run = model.run(recorded[f"ids/{prompt}"].tolist(), len(greedy))
            assert run.greedy == greedy.tolist()
            if f"logits/{prompt}" in recorded:
                assert np.array_equal(run.logits, recorded[f"logits/{prompt}"]), f"{name}: another machine's rounding"
            if f"hidden/{prompt}" in recorded:
                assert np.array_equal(run.hidden, recorded[f"hidden/{prompt}"]), f"{name}: another machine's rounding"
            recorded |= run.groups(prompt)
    write(path, recorded)


def record_demo() -> None:
    from tests.demo.demo_in_transformers import CONVERSATIONS, GOLDEN_DEMO, prompt_ids, write_hugging_face

    arrays: dict[str, NDArray] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(Path(folder))
        model = Transformers(Path(folder))
        for name in CONVERSATIONS:
            run = model.run(prompt_ids(name))
            arrays |= {
                f"ids/{name}": np.array(prompt_ids(name)),
                f"argmax/{name}": run.logits.argmax(axis=1),
                f"logits_tail/{name}": run.logits[-LAST:],
                f"std/{name}": np.float32(run.logits.std()),
                **run.groups(name),
            }
    write(GOLDEN_DEMO, arrays)


def write(path: Path, arrays: dict[str, NDArray]) -> None:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    for case in ("offline", "bitlinear", "online"):
        record_random_weights(case)
    record_demo()
