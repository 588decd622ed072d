"""Train the demo model: a small BitNet b1.58 language model of the text world in `tools/demo/world`.

Quantisation-aware training from scratch. Writes a Hugging Face folder with a bf16 master, which `tools/convert.py`
packs:

    python tools/train_demo.py OUT --minutes 8              on a GPU; `--device cpu` works too, slowly
    python tools/train_demo.py OUT --minutes 8 --resume     continues from OUT/state.pt

A training longer than one may run at a time is done in pieces, of which the last one evaluates:

    python tools/train_demo.py OUT --minutes 16 --piece 8
    python tools/train_demo.py OUT --minutes 16 --piece 8 --resume
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.demo.size import Size
from tools.docs.help_text import DefaultsFormatter


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=DefaultsFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder to write")
    parser.add_argument("--minutes", type=float, help="training time, from the first step on; or use --steps")
    parser.add_argument("--steps", type=int, help="number of training steps; or use --minutes")
    parser.add_argument("--piece", type=float, help="minutes after which to stop and save, for --resume to go on")
    parser.add_argument("--rows", type=int, default=32, help="conversations of 2048 tokens per step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1, help="seed of data and initial weights")
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--ffn", type=int, default=Size.ffn)
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is such a device)")
    parser.add_argument("--workers", type=int, help="processes that generate data (default: all cores but one)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the model (default: on cuda)")
    parser.add_argument("--report", type=int, default=50, help="steps between progress lines")
    parser.add_argument("--save-every", type=float, default=300, help="seconds between saved states; 0: never")
    parser.add_argument("--resume", action="store_true", help="continue from FOLDER/state.pt")
    parser.add_argument("--init", type=Path, help="start from the weights of this Hugging Face folder")
    parser.add_argument("--evaluate", type=int, default=100, help="held-out questions of each kind at the end; 0: none")
    parser.add_argument("--stories", type=int, default=1000, help="stories told at the end, for the same evaluation")
    args = parser.parse_args()
    if args.minutes is None and args.steps is None:
        parser.error("--minutes or --steps is required")
    if any(limit is not None and limit <= 0 for limit in (args.minutes, args.steps, args.piece)):
        parser.error("--minutes, --steps and --piece must be positive")
    if args.hidden < 256 or args.hidden % 256 or min(args.layers, args.ffn, args.rows) < 1:
        parser.error("--hidden must be a multiple of 256 (groups of four heads of 64), the other sizes at least 1")
    try:
        import torch
    except ImportError:
        parser.error("PyTorch is missing; it comes with the extra train")
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    args.compile = cuda if args.compile is None else args.compile
    if args.device.startswith("cuda") and not cuda:
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if args.resume and not (args.folder / "state.pt").is_file():
        parser.error(f"--resume: there is no {args.folder / 'state.pt'}")
    return args


def main() -> None:
    args = parse_arguments()
    import torch
    from tokenizers import Tokenizer

    from tools.demo.data import train_tokenizer
    from tools.demo.judge_training import evaluate
    from tools.demo.model import BitNet, read_folder, write_folder
    from tools.demo.train import train

    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("highest")
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(folder, args.seed)
        print("tokenizer trained", flush=True)
    size = Size(
        hidden=args.hidden, ffn=args.ffn, layers=args.layers, heads=args.hidden // 64, kv_heads=args.hidden // 256
    )
    model = BitNet(size).to(args.device)
    if args.init:
        read_folder(model, args.init)
    ternary = sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight"))
    print(
        f"{ternary / 1e6:.1f} M ternary weights, {model.embed_tokens.numel() / 1e6:.1f} M in the embedding", flush=True
    )
    curve, complete = train(model, args, folder)
    write_folder(model, folder)
    if not complete:
        print("this piece is done, the training is not: go on with the same options and --resume", flush=True)
        return
    read_folder(model, folder)  # what is evaluated is what was written
    report = {"settings": {k: str(v) for k, v in vars(args).items()} | asdict(size), "curve": curve}
    if args.evaluate:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        report["evaluation"] = evaluate(model, tokenizer, args.evaluate, args.stories)
        print(json.dumps(report["evaluation"], indent=1), flush=True)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
