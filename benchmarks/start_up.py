"""Time from starting a process to the first token, compared with transformers.

    python benchmarks/start_up.py [--rounds 7] [--backend jax torch]

Both load the same float16 file, presets/open_llama_nano, into float32 on the CPU,
tokenize the prompt with SentencePiece and generate greedily. The time is measured from
before the interpreter starts to the first new token. Rounds alternate between the two,
after one round that only warms the page cache, and the caches of compiled programs. The
figures are medians. CPU seconds, of all threads, and imported modules depend less on
what else the machine does.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "presets" / "open_llama_nano"
PROMPT = "The old man looked at the sea, and"
FIGURES = ("imports", "loading", "first token", "total", "CPU seconds", "modules")

# Each prints the times at which its stages ended. Python's monotonic clock is the same
# for all processes of a machine, so the start of the process can be subtracted.
OURS = f"""
import os, sys, time
from keras_openllama import OpenLlamaCausalLM
moments = [time.monotonic()]
lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
moments.append(time.monotonic())
next(lm.stream({PROMPT!r}, max_new_tokens=32))
moments.append(time.monotonic())
print([*moments, sum(os.times()[:2]), len(sys.modules)])
"""

THEIRS = f"""
import os, sys, time
import sentencepiece
import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
moments = [time.monotonic()]
processor = sentencepiece.SentencePieceProcessor({str(WEIGHTS / "tokenizer.model")!r})
lm = LlamaForCausalLM.from_pretrained({str(WEIGHTS)!r}, dtype=torch.float32)
moments.append(time.monotonic())

class FirstToken(BaseStreamer):
    puts = 0

    def put(self, ids):
        self.puts += 1
        if self.puts == 2:  # The prompt came first.
            moments.append(time.monotonic())

    def end(self):
        pass

ids = torch.tensor([[1, *processor.encode({PROMPT!r})]])
lm.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    max_new_tokens=32,
    do_sample=False,
    streamer=FirstToken(),
)
print([*moments, sum(os.times()[:2]), len(sys.modules)])
"""


def measure(script, backend):
    """Runs a script in a new process; returns what `FIGURES` names."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # As where pip installed the package: its bytecode is compiled in the first round.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.monotonic()
    output = subprocess.check_output(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, text=True
    )
    *moments, cpu_seconds, modules = json.loads(output.splitlines()[-1])
    moments = [start, *moments]
    stages = [end - begin for begin, end in itertools.pairwise(moments)]
    return [*stages, moments[-1] - start, cpu_seconds, modules]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--backend", nargs="+", default=["jax", "torch"], help="backends of Keras"
    )
    options = parser.parse_args()

    rounds = {**{backend: [] for backend in options.backend}, "transformers": []}
    for _ in range(options.rounds + 1):
        for name, results in rounds.items():
            ours = name != "transformers"
            results.append(measure(OURS if ours else THEIRS, name if ours else "torch"))
    medians = {
        name: [statistics.median(values) for values in zip(*timed, strict=True)]
        for name, (_, *timed) in rounds.items()
    }

    print(f"Seconds, medians of {options.rounds}; ratios to transformers")
    print(f"{'':12}" + "".join(f"{name:>14}{'':8}" for name in medians))
    for index, figure in enumerate(FIGURES):
        values = [results[index] for results in medians.values()]
        digits = 0 if figure == "modules" else 2
        row = (f"{x:14.{digits}f}{x / values[-1]:8.2f}" for x in values)
        print(f"{figure:12}{''.join(row)}")


if __name__ == "__main__":
    main()
