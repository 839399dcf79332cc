"""Time from starting a process to the first token, compared with transformers.

    python benchmarks/start_up.py [--rounds 7]

Both load the same float16 file, presets/open_llama_nano, into float32 on the CPU,
tokenize the prompt with SentencePiece and generate greedily. The time is measured from
before the interpreter starts to the first new token. Rounds alternate between the two,
after one round that only warms the page cache. The figures are medians.
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
STAGES = ("imports", "loading", "first token")

# Each prints the times at which its stages ended. Python's monotonic clock is the same
# for all processes of a machine, so the start of the process can be subtracted.
OURS = f"""
import time
from keras_openllama import OpenLlamaCausalLM
moments = [time.monotonic()]
lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
moments.append(time.monotonic())
next(lm.stream({PROMPT!r}, max_new_tokens=32))
moments.append(time.monotonic())
print(moments)
"""

THEIRS = f"""
import time
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
print(moments)
"""


def measure(script, backend):
    """Runs a script in a new process; returns the seconds of each stage."""
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
    moments = [start, *json.loads(output.splitlines()[-1])]
    return [end - begin for begin, end in itertools.pairwise(moments)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--backend", default="jax", help="Keras's backend (%(default)s)"
    )
    options = parser.parse_args()

    rounds = {"keras_openllama": [], "transformers": []}
    for _ in range(options.rounds + 1):
        rounds["keras_openllama"].append(measure(OURS, options.backend))
        rounds["transformers"].append(measure(THEIRS, options.backend))
    medians = {}
    for name, (_, *timed) in rounds.items():
        stages = [statistics.median(stage) for stage in zip(*timed, strict=True)]
        total = statistics.median(sum(stages) for stages in timed)
        medians[name] = [*stages, total]

    print(f"Seconds, medians of {options.rounds}; keras_openllama on {options.backend}")
    print(f"{'':12}" + "".join(f"{name:>18}" for name in medians) + f"{'ratio':>9}")
    for index, stage in enumerate((*STAGES, "total")):
        ours, theirs = (values[index] for values in medians.values())
        print(f"{stage:12}{ours:18.2f}{theirs:18.2f}{ours / theirs:9.2f}")


if __name__ == "__main__":
    main()
