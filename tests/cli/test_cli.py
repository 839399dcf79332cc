"""The command line: help, start time, streaming, and errors in one line."""

import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_openllama import SamplingConfig
from keras_openllama.__main__ import COMMANDS, main
from keras_openllama.cli.command import CommandParser, add_renamed_argument, command
from keras_openllama.cli.generate import parse_arguments, sampling_config
from keras_openllama.models import causal_lm

PROMPT = "The old man looked at the sea, and"
HEAVY = ("jax", "keras", "keras_hub", "tensorflow", "torch", "transformers")
HEAVY += ("matplotlib", "sentencepiece")


@pytest.fixture(autouse=True)
def same_backend(monkeypatch):
    """The commands run in this process, whose backend is already set."""
    monkeypatch.setenv("KERAS_BACKEND", keras.config.backend())


@pytest.fixture
def fake_model(monkeypatch):
    """Replaces the model by one that records its calls and generates three pieces."""

    class FakeModel:
        preset = None
        arguments = None
        backbone = SimpleNamespace(context_length=256)

        @classmethod
        def from_preset(cls, preset, **arguments):
            cls.preset = preset, arguments
            return cls()

        def compile(self, kv_cache_dtype):
            type(self).kv_cache_dtype = kv_cache_dtype

        def before_each_piece(self):
            pass

        def stream(self, prompt, **arguments):
            type(self).arguments = prompt, arguments
            for piece in (" one", " two", " three"):
                self.before_each_piece()
                yield piece

    monkeypatch.setattr(causal_lm, "OpenLlamaCausalLM", FakeModel)
    return FakeModel


# Help and errors


@pytest.mark.backend_free
@pytest.mark.parametrize("command", [[], ["generate"], ["convert"]])
def test_help_teaches_with_examples(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "\n  " in text and f"keras-openllama {(command or ['generate'])[0]} " in text


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"action": "store_true", "default": False}, [], True),
        ({"nargs": "+", "default": ()}, ["a", "b"], ["a", "b"]),
        ({"action": "append"}, ["a"], ["a", "a"]),
    ],
)
def test_add_renamed_argument_accepts_the_old_name_and_warns_once(
    options, values, expected, capsys
):
    parser = CommandParser("prog", argument_default=argparse.SUPPRESS)
    group = parser.add_argument_group("group")
    add_renamed_argument(group, "--old", "--new-name", help="the help", **options)
    assert parser.parse_args(["--new-name", *values] * 2).new_name == expected
    assert not capsys.readouterr().err
    assert parser.parse_args(["--old", *values] * 2).new_name == expected
    assert capsys.readouterr().err.count("--old was renamed to --new-name") == 1
    assert vars(parser.parse_args([])).get("new_name") == options.get("default")
    assert "--old" not in parser.format_help()


@pytest.mark.backend_free
@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_neither_keras_nor_a_backend(command):
    script = (
        "import sys\n"
        "from keras_openllama.__main__ import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit: pass\n"
        f"print('imported:', [name for name in {HEAVY} if name in sys.modules])"
    )
    process = [sys.executable, "-c", script, command]
    out = subprocess.check_output(process, text=True)
    assert f"usage: keras-openllama {command} " in out
    assert out.splitlines()[-1] == "imported: []"


@pytest.mark.backend_free
@pytest.mark.parametrize("command", [[], ["finetune"]], ids=str)
def test_help_prints_where_stdout_lacks_characters(command):
    process = [sys.executable, "-m", "keras_openllama", *command, "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    out = subprocess.check_output(process, env=environment, text=True)
    assert "?" in out and out.isascii()


@pytest.mark.backend_free
def test_main_suggests_the_closest_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["prepare_data"])
    assert exit.value.code == 2
    assert "Did you mean 'prepare-data'?" in capsys.readouterr().err


@pytest.mark.backend_free
def test_command_names_the_extra_of_a_missing_package(capsys):
    @command("plot", extra="train")
    def fails(arguments, prog):
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")

    assert fails([]) == 2
    assert capsys.readouterr().err == (
        "keras-openllama plot: error: orbax is not installed. "
        "Install it with: pip install 'keras-openllama[train]'\n"
    )


@pytest.mark.backend_free
def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("keras-openllama 0.")


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "option",
    [
        *[("--max-new-tokens", value) for value in ("0", "-3", "1e3", "nan")],
        *[("--temperature", value) for value in ("-1", "nan", "inf", "warm")],
        *[("--top-p", value) for value in ("0", "1.5", "nan")],
        *[("--top-k", value) for value in ("0", str(10**15))],
        *[("--seed", value) for value in ("-1", "nan", str(2**32))],
        *[("--min-p", value) for value in ("-0.1", "1.1")],
        *[("--logit-bias", value) for value in ("5", "5=inf")],
        ("--repetition-penalty", "0"),
        ("--num-samples", "0"),
    ],
    ids=" ".join,
)
def test_generate_rejects_a_number_out_of_range(option, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["generate", "x", *option])
    assert exit.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: see 'keras-openllama generate --help'"
    assert error.startswith(f"keras-openllama generate: error: {option[0]} must be ")
    assert error.endswith(f" Received: {option[1]!r}")


@pytest.mark.backend_free
def test_generate_suggests_the_closest_preset_in_one_line(capsys):
    assert main(["generate", "x", "--preset", "open_llama_7b_v3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("keras-openllama generate: error: ")
    assert captured.err.count("\n") == 1
    assert "open_llama_7b_v2" in captured.err


@pytest.mark.backend_free
def test_traceback_flag_raises_the_error():
    with pytest.raises(ValueError, match="open_llama_7b_v3"):
        main(["generate", "x", "--preset", "open_llama_7b_v3", "--traceback"])


@pytest.mark.backend_free
def test_choose_backend_says_how_to_install_a_missing_backend(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["generate", "x", "--backend", "torch"]) == 2
    assert "pip install 'keras-openllama[torch]'" in capsys.readouterr().err


@pytest.mark.backend_free
def test_choose_backend_rejects_a_change_after_keras_is_imported(capsys):
    other = "torch" if keras.config.backend() == "jax" else "jax"
    assert main(["generate", "x", "--backend", other]) == 2
    assert f"--backend {other} has no effect" in capsys.readouterr().err


@pytest.mark.backend_free
def test_generate_rejects_an_empty_prompt(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for prompt in ("", "-"):
        assert main(["generate", prompt]) == 2
        error = capsys.readouterr().err
        assert error.startswith("keras-openllama generate: error: PROMPT is empty")


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["The sea", "--max-new-tokens", "255"], "--max-new-tokens must be at most 25"),
        (["The sea " * 200], "and the context of nano, 256 tokens, has no room"),
    ],
)
def test_generate_says_what_exceeds_the_context_of_the_model(
    arguments, message, capsys
):
    assert main(["generate", *arguments, "--preset", "nano"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "error: PROMPT has " in captured.err and message in captured.err


@pytest.mark.backend_free
def test_generate_stops_at_the_end_of_the_context(capsys):
    assert main(["generate", "The sea " * 80, "--strip-prompt"]) == 0
    assert capsys.readouterr().out.strip()


# generate


@pytest.mark.slow_on_tensorflow
def test_generate_prints_prompt_and_text_of_the_embedded_model(capsys):
    from keras_openllama import OpenLlamaCausalLM

    assert main(["generate", PROMPT, "--max-new-tokens", "8"]) == 0
    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    expected = lm.generate(PROMPT, max_new_tokens=8)
    assert expected.startswith(PROMPT) and len(expected) > len(PROMPT)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.backend_free
def test_generate_loads_adapters(tmp_path, capsys):
    from keras_openllama import OpenLlamaCausalLM

    lm = OpenLlamaCausalLM.from_preset("open_llama_nano")
    plain = lm.generate(PROMPT, max_new_tokens=8)
    lm.backbone.enable_lora(2)
    random = np.random.default_rng(0)
    for variable in lm.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    lm.save_adapters(tmp_path / "adapters")
    expected = lm.generate(PROMPT, max_new_tokens=8)
    assert expected != plain
    adapters = ["--adapters", str(tmp_path / "adapters")]
    assert main(["generate", PROMPT, "--max-new-tokens", "8", *adapters]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.backend_free
def test_generate_with_a_seed_is_reproducible(capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", PROMPT, "--max-new-tokens", "8", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_stdin_and_prints_nothing_on_stderr():
    command = [sys.executable, "-m", "keras_openllama", "generate", "-"]
    result = subprocess.run(
        [*command, "--strip-prompt", "--max-new-tokens", "4"],
        input=PROMPT + "\n",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.strip()
    assert PROMPT not in result.stdout


@pytest.mark.backend_free
def test_generate_prints_each_piece_before_generating_the_next(fake_model, capsys):
    seen = []
    fake_model.before_each_piece = lambda _: seen.append(capsys.readouterr().out)
    assert main(["generate", "zero"]) == 0
    assert seen == ["zero", " one", " two"]
    assert capsys.readouterr().out == " three\n"


@pytest.mark.backend_free
def test_generate_passes_its_options_to_the_model(fake_model):
    model = ["--preset", "hf://user/repo", "--dtype", "bfloat16", "--revision", "abc"]
    model += ["--quantization", "int4", "--kv-cache-dtype", "int8"]
    text = ["--max-new-tokens", "7", "--stop", "x", "--stop", "y"]
    main(["generate", "zero", *model, *text])
    preset, loading = fake_model.preset
    assert preset == "hf://user/repo"
    assert loading == {"dtype": "bfloat16", "revision": "abc", "quantization": "int4"}
    assert fake_model.kv_cache_dtype == "int8"
    prompt, writing = fake_model.arguments
    assert prompt == "zero"
    assert writing == {
        "max_new_tokens": 7,
        "stop": ["x", "y"],
        "sampling": SamplingConfig(temperature=0),
        "draft": None,
    }


@pytest.mark.slow_on_tensorflow
def test_generate_with_a_draft_prints_the_same_text_and_its_statistics(capsys):
    command = ["generate", PROMPT, "--max-new-tokens", "8"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--draft", "prompt_lookup", "--draft-stats"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected
    assert "proposed tokens accepted" in printed.err


@pytest.mark.backend_free
def test_generate_strips_only_the_last_new_line_of_stdin(fake_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Q: why?\n\nA:\n\n"))
    main(["generate", "-"])
    assert fake_model.arguments[0] == "Q: why?\n\nA:\n"


@pytest.mark.backend_free
@pytest.mark.parametrize("flag", ["--strip-prompt", "--no-prompt"])
def test_strip_prompt_prints_the_generated_text_only(flag, fake_model, capsys):
    main(["generate", "zero", flag])
    assert capsys.readouterr().out == " one two three\n"


@pytest.mark.backend_free
def test_generate_prints_warnings_in_one_line(fake_model, capsys):
    fake_model.before_each_piece = lambda _: warnings.warn("a\nwarning", stacklevel=1)
    main(["generate", "zero"])
    assert set(capsys.readouterr().err.splitlines()) == {"keras-openllama: a warning"}


# Sampling options


def sampling_of(*flags):
    return sampling_config(parse_arguments(["zero", *flags], prog="generate"))


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"temperature": 0}),
        ("--temperature 0.5", {"temperature": 0.5}),
        ("--seed 3", {"seed": 3}),
        ("--num-samples 2", {}),
        ("--num-samples 1", {"temperature": 0}),
        ("--min-p 0.1", {"min_p": 0.1}),
        ("--top-k 7", {"top_k": 7}),
        ("--top-p 0.8", {"top_p": 0.8}),
        ("--top-p 0.8 --top-k 7", {"top_p": 0.8, "top_k": 7}),
        ("--sampler top_k", {"top_k": 40}),
        ("--sampler top_p --seed 1", {"top_p": 0.9, "seed": 1}),
        ("--repetition-penalty 1.1", {"temperature": 0, "repetition_penalty": 1.1}),
        (
            "--sampler random --presence-penalty 1 --frequency-penalty -0.5 "
            "--logit-bias 5=2 --logit-bias 7=-1.5 --ban 3 --ban 4 --min-new-tokens 9",
            {
                "presence_penalty": 1,
                "frequency_penalty": -0.5,
                "logit_bias": {5: 2, 7: -1.5},
                "banned_tokens": (3, 4),
                "min_new_tokens": 9,
            },
        ),
    ],
)
def test_sampling_config_infers_the_sampler_from_its_options(flags, expected):
    assert sampling_of(*flags.split()) == SamplingConfig(**expected)


@pytest.mark.backend_free
@pytest.mark.parametrize("flag", ["--top-k 7", "--min-p 0.1", "--num-samples 2"])
def test_sampling_config_rejects_options_of_other_samplers(flag):
    with pytest.raises(ValueError, match=rf"{flag} .*'greedy'"):
        sampling_of("--sampler", "greedy", *flag.split())


@pytest.mark.slow_on_tensorflow
def test_generate_prints_each_sample(capsys):
    flags = ["--max-new-tokens", "4", "--seed", "1", "--strip-prompt"]
    main(["generate", PROMPT, *flags])
    single = capsys.readouterr().out
    main(["generate", PROMPT, *flags, "--num-samples", "2"])
    first, second = capsys.readouterr().out.split("--- 2 of 2 ---\n")
    assert first == "--- 1 of 2 ---\n" + single
    assert second.strip() and second != single


# presets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    def add(repository, files):
        """Writes files in the layout of the Hub's cache: links to blobs."""
        root = tmp_path / f"models--openlm-research--{repository}"
        (root / "blobs").mkdir(parents=True)
        (root / "snapshots" / "abc").mkdir(parents=True)
        for name, content in files.items():
            (root / "blobs" / name).write_text(content)
            (root / "snapshots" / "abc" / name).symlink_to(root / "blobs" / name)

    return add


def listed(capsys):
    assert main(["presets", "--json"]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


@pytest.mark.backend_free
def test_presets_prints_a_table_of_all_presets(cache, capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines[1:]}
    assert len(rows) == 7
    assert " 3.43B " in rows["open_llama_3b"]
    assert "6.85 GB" in rows["open_llama_3b"]
    assert "hf://openlm-research/open_llama_3b_v2" in rows["open_llama_3b_v3"]
    assert rows["open_llama_13b"].endswith("no")
    assert rows["open_llama_nano"].endswith("embedded")


@pytest.mark.backend_free
def test_presets_reports_what_is_in_the_cache(cache, capsys):
    index = json.dumps({"weight_map": {"a": "a.bin", "b": "b.bin"}})
    sharded = {"tokenizer.model": "t", "pytorch_model.bin.index.json": index}
    cache("open_llama_3b", {"tokenizer.model": "t", "pytorch_model.bin": "weights"})
    cache("open_llama_7b", {**sharded, "a.bin": "a"})
    cache("open_llama_7b_v2", {**sharded, "a.bin": "a", "b.bin": "b"})
    cache("open_llama_3b_v2", {"model.safetensors": "no tokenizer"})

    rows = listed(capsys)
    assert rows["open_llama_3b"]["cached"] == "yes"
    assert rows["open_llama_3b"]["cached_bytes"] == len("tweights")
    assert rows["open_llama_7b"]["cached"] == "partly"
    assert rows["open_llama_7b_v2"]["cached"] == "yes"
    assert rows["open_llama_3b_v2"]["cached"] == "partly"
    assert rows["open_llama_3b_v3"]["cached"] == "partly"
    assert (
        rows["open_llama_13b"] | {"cached": "no", "cached_bytes": 0}
        == (rows["open_llama_13b"])
    )
    assert rows["open_llama_nano"]["cached"] == "embedded"


# convert


@pytest.mark.backend_free
def test_convert_dry_run_lists_the_files_that_convert_writes(tmp_path, capsys):
    target = tmp_path / "out"
    arguments = ["convert", "open_llama_nano", str(target), "--to", "transformers"]
    assert main([*arguments, "--dry-run"]) == 0
    listed = dict(
        reversed(line.split()) for line in capsys.readouterr().out.splitlines()[:-1]
    )
    assert not target.exists()
    assert main(arguments) == 0
    assert "Wrote" in capsys.readouterr().out
    written = {path.name: path.stat().st_size for path in target.iterdir()}
    assert written == {n: int(size.replace(",", "")) for n, size in listed.items()}


@pytest.mark.backend_free
def test_convert_from_easylm_to_keras_needs_a_preset(tmp_path, capsys):
    file, out = str(tmp_path / "nano.msgpack"), str(tmp_path / "nano")
    assert main(["convert", "nano", file, "--to", "easylm"]) == 0
    assert main(["convert", file, out, "--to", "keras", "--preset", "nano"]) == 0
    assert main(["generate", PROMPT, "--preset", out, "--max-new-tokens", "4"]) == 0
    converted = capsys.readouterr().out.splitlines()[2]
    assert main(["generate", PROMPT, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [converted]


@pytest.mark.backend_free
def test_convert_errors_are_one_line_with_a_remedy(tmp_path, capsys):
    target = tmp_path / "out.msgpack"
    target.write_text("precious")
    arguments = ["convert", "open_llama_nano", str(target), "--to", "easylm"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("keras-openllama convert: error: ") and error.count("\n") == 1
    )
    assert str(target) in error and "--force" in error
    assert target.read_text() == "precious"
    assert main([*arguments, "--force"]) == 0
    with pytest.raises(SystemExit):
        main([*arguments, "--dtype", "float8"])
    assert "float8" in capsys.readouterr().err


@pytest.mark.backend_free
def test_convert_imports_neither_tensorflow_nor_torch(tmp_path):
    script = (
        "import sys\n"
        "from keras_openllama.__main__ import main\n"
        "for to in ('transformers', 'easylm', 'keras'):\n"
        "    main(['convert', 'nano', f'{sys.argv[1]}/{to}', '--to', to])\n"
        "keras_format = f'{sys.argv[1]}/keras'\n"
        "main(['convert', keras_format, f'{sys.argv[1]}/back', '--to', 'easylm'])\n"
        "main(['generate', 'The', '--preset', keras_format, '--max-new-tokens', '1'])\n"
        "print([name for name in ('tensorflow', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.check_output(command, text=True)
    assert out.splitlines()[-1] == "[]"
