"""Influence by probes and exactly, beside torch.autograd.functional.jacobian: time, memory, agreement.

    python benchmarks/influence.py [--length 512] [--width 64] [--layers 4] [--mixer mamba] [--probes 8] [--threads 1]

One sequence, the last position, a language model with random weights. Each way runs in a process of its own, so that the peaks of memory are its own:
what the process needed beyond what it held before. `jacobian` makes ∂y_T/∂x as a whole, (d_model, length, d_model) numbers, through the graph of the whole model;
it is left out where those alone would be larger than --largest GiB. Agreement: the largest relative difference of the score at any distance, to that
of the Jacobian, or to the exact one where it was left out. Probes differ by chance, about 1/√(2 probes) of the score at every distance.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from ssmlens.lens import Subject, influence
from ssmlens.models import LanguageModel, LanguageModelConfig

WAYS = ("jacobian", "exact", "probes")


def measured(way: str, args: argparse.Namespace) -> dict[str, object]:
    """Runs in a process of its own."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(vocab_size=256, d_model=args.width, n_layers=args.layers, mixer=args.mixer)
    )
    subject = Subject(args.mixer, model)
    tokens = torch.randint(0, 256, (1, args.length))
    with torch.no_grad():
        subject.run(subject.embed(tokens[:, :16]))  # compiled kernels and first calls are not what is measured
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if way == "jacobian":
        with subject.still():
            embeddings = subject.embed(tokens).detach()
            whole = torch.autograd.functional.jacobian(lambda x: subject.run(x)[0, -1], embeddings, vectorize=False)
        score = whole[:, 0].square().sum((0, 2)).sqrt().flip(0).double().numpy()
        predicted = None
    else:
        found = influence.measure(subject, tokens, method=way, probes=args.probes, floor=0.0)  # type: ignore[arg-type]
        score, predicted = found.score, str(found.cost)
    seconds = time.perf_counter() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"seconds": seconds, "bytes": more, "score": score.tolist(), "predicted": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("length", 512), ("width", 64), ("layers", 4), ("probes", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--mixer", default="mamba")
    parser.add_argument("--largest", type=float, default=2.0)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measured(args.way, args)))
        return
    size = args.width**2 * args.length * 4
    ways = [way for way in WAYS if way != "jacobian" or size <= args.largest * 2**30]
    print(
        f"{args.mixer}, {args.layers} layers of width {args.width}, length {args.length}, {args.threads} threads, float32, CPU"
    )
    reference = None
    for way in ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        score = np.array(run["score"])
        reference = score if reference is None else reference
        apart = np.abs(score / np.where(reference > 0, reference, 1) - 1)
        said = f"; it said {run['predicted']}" if run["predicted"] else ""
        name = f"{args.probes} probes" if way == "probes" else way
        print(
            f"{name:>10}: {run['seconds']:8.2f} s  {run['bytes'] / 2**20:8.0f} MiB   differs by {apart.max():.1e} at most, "
            f"{np.sqrt(np.square(apart).mean()):.1e} root mean square{said}"
        )
    if "jacobian" not in ways:
        print(f"  jacobian: left out, its {size / 2**30:.1f} GiB alone are more than --largest {args.largest:g}")


if __name__ == "__main__":
    main()
