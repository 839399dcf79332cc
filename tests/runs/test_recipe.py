"""Recipes: values and sources of the presets, overrides, and validation."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
from checkout import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_openllama import presets
from keras_openllama.config import PACKINGS
from keras_openllama.data import mixture as mixtures
from keras_openllama.runs import recipe as recipes

pytestmark = pytest.mark.backend_free

NAMES = list(presets.registry())
LARGE = [name for name in NAMES if name != "open_llama_nano"]


def yaml_file(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ----- The recipes of the presets


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_a_recipe(name):
    recipe = recipes.preset_recipe(name)
    assert recipe == recipes.preset_recipe(name.removeprefix("open_llama_"))
    assert recipe.mixture is None or recipe.mixture in mixtures.available_mixtures()
    assert recipe.packing in PACKINGS
    context = presets.find(name).config["max_sequence_length"]
    assert recipe.sequence_length == context


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_of_a_preset_names_its_source(name):
    stated = presets.find(name).recipe
    for entry in stated.values():
        assert entry.keys() == {"value", "source"}
        assert re.match(r"https://\S+|(heuristic|computed): \w", entry["source"])
    sources = recipes.resolve_recipe(name).sources
    assert sources.keys() == recipes.SETTINGS.keys()
    for setting, source in sources.items():
        assert source == stated.get(setting, {"source": "default: heuristic"})["source"]


@pytest.mark.parametrize("name", LARGE)
def test_preset_recipe_of_large_models_shares_most_settings(name):
    recipe = recipes.preset_recipe(name)
    adam = recipe.beta_1, recipe.beta_2, recipe.epsilon, recipe.weight_decay
    assert adam == (0.9, 0.95, 1e-8, 0.1)
    assert (recipe.clip_norm, recipe.z_loss) == (1.0, 0.0)
    assert (recipe.sequence_length, recipe.warmup_steps) == (2048, 2000)
    assert recipe.final_learning_rate == pytest.approx(recipe.learning_rate / 10)
    assert (recipe.packing, recipe.mask_documents) == ("concatenate", False)
    assert (recipe.precision, recipe.rematerialize) == ("mixed_bfloat16", "full")
    assert (recipe.milestone_every, recipe.save_every) == (2500, 500)
    assert recipe.steps * recipe.tokens_per_step == 250_000 * 2048 * 2048  # 1.05T
    assert recipe.mixture == presets.find(name).version


def test_preset_recipe_of_7b_is_that_of_easylm():
    recipe = recipes.preset_recipe("7b")
    assert recipe.tokens_per_step == 4_194_304
    assert (recipe.steps, recipe.learning_rate) == (250_000, 3e-4)
    assert recipe.mesh_for(256) == {"data": 4, "fsdp": 64, "model": 1}
    sources = recipes.resolve_recipe("7b").sources
    for setting in ("batch_size", "steps", "learning_rate", "warmup_steps", "meshes"):
        assert "examples/pretrain_llama_7b.sh" in sources[setting]


def test_preset_recipe_of_13b_halves_learning_rate_and_batch_size_of_7b():
    small, large = recipes.preset_recipe("7b"), recipes.preset_recipe("13b")
    assert large.learning_rate == small.learning_rate / 2
    assert large.tokens_per_step == small.tokens_per_step / 2
    assert large.steps == small.steps * 2
    sources = recipes.resolve_recipe("13b").sources
    for setting in ("learning_rate", "batch_size"):
        assert "openlm-research/open_llama/issues/74" in sources[setting]
    assert sources["steps"].startswith("heuristic")


@pytest.mark.parametrize("name", ["3b", "3b_v2", "3b_v3"])
def test_unpublished_settings_of_3b_are_heuristics(name):
    sources = recipes.resolve_recipe(name).sources
    for setting in ("batch_size", "steps", "learning_rate"):
        assert sources[setting].startswith("heuristic")


def test_preset_recipes_of_3b_v2_and_3b_v3_are_equal():
    assert presets.find("3b_v3").recipe == presets.find("3b_v2").recipe
    assert recipes.preset_recipe("7b_v2") == recipes.preset_recipe("7b").replace(
        mixture="v2"
    )


def test_preset_recipe_of_nano_suits_a_cpu():
    recipe = recipes.preset_recipe("nano")
    assert recipe.steps * recipe.tokens_per_step == 300 * 16 * 256
    assert (recipe.learning_rate, recipe.final_learning_rate) == (3e-3, 3e-4)
    assert (recipe.precision, recipe.rematerialize) == ("float32", "none")
    assert recipe.mixture is None
    assert recipe.mesh_for(1) == {"data": 1, "fsdp": 1, "model": 1}


@pytest.mark.parametrize("name", NAMES)
def test_meshes_use_every_chip_and_divide_the_batch(name):
    recipe = recipes.preset_recipe(name)
    for chips, mesh in recipe.meshes.items():
        assert math.prod(mesh.values()) == int(chips)
        assert recipe.batch_size % (mesh["data"] * mesh["fsdp"]) == 0
        assert recipe.mesh_for(int(chips)) == mesh


# ----- Overrides


def test_resolve_recipe_prefers_command_line_to_file_to_preset(tmp_path):
    path = yaml_file(tmp_path, "batch_size: 64\nseed: 7\nmixture: null\n")
    resolved = recipes.resolve_recipe("7b", file=path, overrides={"seed": 8})
    expected = recipes.preset_recipe("7b").replace(batch_size=64, seed=8, mixture=None)
    assert resolved.preset == "open_llama_7b"
    assert resolved.recipe == expected
    assert resolved.sources["batch_size"] == str(path)
    assert resolved.sources["mixture"] == str(path)
    assert resolved.sources["seed"] == "command line"
    assert resolved.sources["save_every"] == "default: heuristic"
    assert resolved.sources["steps"] == recipes.resolve_recipe("7b").sources["steps"]


@pytest.mark.parametrize("written", ["5e5", "5.0e+5", "500000.0", "'500_000'"])
def test_an_integer_that_yaml_parses_otherwise_must_be_written_in_digits(
    written, tmp_path
):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"steps: {written}")
    with pytest.raises(ValueError, match=r"`steps` must .* Write it in digits: 500000"):
        recipes.resolve_recipe("7b", file=path)


@pytest.mark.parametrize("written", ["3e-4", "'0.0003'", "0.0003", "3.0e-4"])
def test_resolve_recipe_reads_learning_rates_in_any_notation(tmp_path, written):
    path = yaml_file(tmp_path, f"learning_rate: {written}\n")
    assert recipes.resolve_recipe("7b", file=path).recipe.learning_rate == 3e-4


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-4, 10, exclude_min=True), st.sampled_from(["", ".3e", ".17g"]))
def test_resolve_recipe_reads_learning_rates_from_yaml_exactly(
    tmp_path_factory, rate, how
):
    text = format(rate, how)
    path = yaml_file(tmp_path_factory.getbasetemp(), f"learning_rate: {text}\n")
    assert recipes.resolve_recipe("7b", file=path).recipe.learning_rate == float(text)


def test_resolve_recipe_reads_meshes_from_yaml(tmp_path):
    path = yaml_file(tmp_path, "meshes: {8: {fsdp: 4, model: 2}}\nclip_norm: 1\n")
    recipe = recipes.resolve_recipe("7b", file=path).recipe
    assert recipe.meshes == {"8": {"data": 1, "fsdp": 4, "model": 2}}
    assert type(recipe.clip_norm) is float


def test_resolve_recipe_ignores_a_file_of_comments(tmp_path):
    path = yaml_file(tmp_path, "# steps: 20\n")
    assert recipes.resolve_recipe("7b", file=path) == recipes.resolve_recipe("7b")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000))
def test_resolve_recipe_shortens_the_warmup_with_the_steps(steps):
    resolved = recipes.resolve_recipe("7b", overrides={"steps": steps})
    warmup = resolved.recipe.warmup_steps
    if steps > 2000:
        assert warmup == 2000
        assert resolved.sources["warmup_steps"].startswith("https://")
    else:
        assert warmup == (max(1, steps // 10) if steps > 1 else 0)
        assert "shortened from 2000" in resolved.sources["warmup_steps"]


def test_resolve_recipe_never_shortens_an_explicit_warmup(tmp_path):
    path = yaml_file(tmp_path, "warmup_steps: 50\n")
    with pytest.raises(ValueError, match=r"Set `warmup_steps` too.*steps=20"):
        recipes.resolve_recipe("7b", file=path, overrides={"steps": 20})
    overrides = {"steps": 20, "warmup_steps": 5}
    assert (
        recipes.resolve_recipe("7b", file=path, overrides=overrides).recipe.steps == 20
    )
    with pytest.raises(ValueError, match=r"Set `warmup_steps` too"):
        recipes.preset_recipe("7b").replace(steps=20)


def test_preset_recipe_returns_independent_copies():
    recipes.preset_recipe("7b").meshes["256"]["data"] = 99
    recipes.preset_recipe("7b").mesh_for(256)["data"] = 99
    assert recipes.preset_recipe("7b").mesh_for(256)["data"] == 4


# ----- Meshes


def test_mesh_for_an_unlisted_number_of_devices_is_all_fsdp():
    resolved = recipes.resolve_recipe("nano")
    assert resolved.recipe.mesh_for(4) == {"data": 1, "fsdp": 4, "model": 1}
    assert resolved.mesh_source(4).endswith("the recipe has no mesh for 4 devices")
    assert resolved.mesh_source(1) == resolved.sources["meshes"]


def test_mesh_for_requires_a_positive_integer():
    with pytest.raises(ValueError, match=r"`num_devices` must be"):
        recipes.preset_recipe("7b").mesh_for(0)


# ----- Memory settings planned for a number of devices


def resolved_with(plan, **overrides):
    planned = {"256": plan}
    return recipes.resolve_recipe("7b", overrides={"planned": planned, **overrides})


def test_for_devices_sets_micro_batches_and_rematerialization():
    resolved = resolved_with({"sequences_per_device": 4, "rematerialize": "products"})
    recipe = resolved.for_devices(256).recipe  # 8 sequences per device.
    assert (recipe.micro_batches, recipe.rematerialize) == (2, "products")
    assert resolved.for_devices(256).sources["micro_batches"] == "command line"
    assert resolved.for_devices(64) == resolved  # No entry for 64.


@pytest.mark.parametrize(
    "change",
    [{"precision": "float32"}, {"sequence_length": 4096}, {"batch_size": 1001}],
)
def test_for_devices_ignores_a_plan_that_does_not_apply(change):
    resolved = resolved_with(
        {"sequences_per_device": 4, "rematerialize": "products"}, **change
    )
    assert resolved.for_devices(256) == resolved


def test_for_devices_prefers_explicit_settings_to_planned_ones():
    plan = {"sequences_per_device": 4, "rematerialize": "products"}
    recipe = resolved_with(plan, rematerialize="full").for_devices(256).recipe
    assert (recipe.micro_batches, recipe.rematerialize) == (2, "full")


@pytest.mark.parametrize(
    ("batch_size", "mesh", "parts"),
    [(2048, None, 2), (256, None, 1), (1536, None, 2), (2048, (1, 128, 2), 4)],
)
def test_for_devices_limits_the_micro_batch_to_the_planned_size(
    batch_size, mesh, parts
):
    plan = {"sequences_per_device": 4, "rematerialize": "products"}
    mesh = mesh and dict(zip(("data", "fsdp", "model"), mesh, strict=True))
    recipe = resolved_with(plan, batch_size=batch_size).for_devices(256, mesh).recipe
    assert recipe.micro_batches == parts


@pytest.mark.parametrize("name", NAMES)
def test_planned_settings_of_presets_divide_the_batch(name):
    resolved = recipes.resolve_recipe(name)
    for chips, plan in resolved.recipe.planned.items():
        recipe = resolved.for_devices(int(chips)).recipe
        mesh = recipe.mesh_for(int(chips))
        rows = recipe.batch_size // (mesh["data"] * mesh["fsdp"])
        assert rows == recipe.micro_batches * plan["sequences_per_device"]
        assert recipe.rematerialize == plan["rematerialize"]


def test_planned_accepts_the_old_name_rows():
    old = {"rows": 4, "rematerialize": "products"}
    new = {"sequences_per_device": 4, "rematerialize": "products"}
    assert resolved_with(old) == resolved_with(new)
    with pytest.raises(ValueError, match=r"planned\[256\]"):
        resolved_with({**old, **new})


@pytest.mark.parametrize(
    "plan",
    [
        {"sequences_per_device": 4},
        {"sequences_per_device": 0, "rematerialize": "full"},
        4,
        {},
    ],
)
def test_planned_requires_sequences_per_device_and_rematerialize(plan):
    with pytest.raises(ValueError, match=r"planned\[256\]"):
        resolved_with(plan)


# ----- Validation

WRONG = {
    "mixture": ["v3", "none", 2, ["v1"]],
    "planned": [
        8,
        [4],
        None,
        {"v4-8": {"sequences_per_device": 1, "rematerialize": "full"}},
    ],
    "sequence_length": [0, "2048", 2048.0],
    "batch_size": [0, True, 1.5],
    "steps": ["1e5", 0, None],
    "learning_rate": [0, -1e-4, "fast", math.nan, math.inf, True, None],
    "final_learning_rate": [0, []],
    "warmup_steps": [-1, 0.1],
    "optimizer": ["sgd", None],
    "beta_1": [1, -0.1],
    "beta_2": [1.0, "1.5"],
    "epsilon": [0],
    "weight_decay": [-0.1],
    "clip_norm": [0, 10**400],
    "packing": ["pack", None],
    "meshes": [None, [8], "8"],
    "mask_documents": [1, "yes", None],
    "z_loss": [-1],
    "precision": ["float16", "bfloat16", {}],
    "rematerialize": ["some", True],
    "micro_batches": [0],
    "milestone_every": [-1],
    "save_every": [0],
    "keep_last": [0],
    "validate_every": [-1],
    "validation_batches": [0],
    "sample_every": [-1],
    "spike_threshold": [0.5, 1, -2],
    "max_skipped_steps": [0],
    "seed": [-1, "0"],
}


def test_wrong_values_cover_every_setting():
    assert WRONG.keys() == recipes.SETTINGS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]]
)
def test_an_invalid_value_raises_with_name_and_requirement(name, value):
    message = re.escape(f"Received: {name}={value!r}")
    with pytest.raises(ValueError, match=rf"^command line: `{name}` must.*{message}"):
        recipes.resolve_recipe("7b", overrides={name: value})
    with pytest.raises(ValueError, match=rf"^`{name}` must"):
        recipes.preset_recipe("7b").replace(**{name: value})


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4}, {"fsdp": 8, "rows": 1}, {"fsdp": -8, "data": -1}, {"fsdp": 8.0}, 8],
)
def test_meshes_must_multiply_to_the_number_of_devices(axes):
    with pytest.raises(ValueError, match=r"`meshes\[8\]` must.*number of chips"):
        recipes.resolve_recipe("7b", overrides={"meshes": {8: axes}})


def test_replace_validates_combinations_of_settings():
    recipe = recipes.preset_recipe("7b")
    with pytest.raises(
        ValueError, match=r"must not exceed `learning_rate`.*final_learning_rate"
    ):
        recipe.replace(learning_rate=1e-5)
    with pytest.raises(ValueError, match=r"must divide `batch_size`.*micro_batches=3"):
        recipe.replace(micro_batches=3)


def test_an_unknown_setting_raises_with_the_closest_match(tmp_path):
    path = yaml_file(tmp_path, "warm_up_steps: 5\n")
    with pytest.raises(ValueError, match=r"mine.yaml: .*Did you mean 'warmup_steps'"):
        recipes.resolve_recipe("7b", file=path)
    with pytest.raises(ValueError, match=r"command line: .*Did you mean 'batch_size'"):
        recipes.resolve_recipe("7b", overrides={"batchsize": 5})
    with pytest.raises(
        ValueError, match=r"setting 'x'\. Its settings: sequence_length"
    ):
        recipes.preset_recipe("7b").replace(x=1)
    path = yaml_file(tmp_path, "1: 5\n")
    with pytest.raises(ValueError, match=r"no setting 1\."):
        recipes.resolve_recipe("7b", file=path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: [1", "is not valid YAML"),
        ("- steps\n- 5\n", "must map settings to values"),
        ("steps", "must map settings to values"),
        ("seed: 1\nsteps: 5\nseed: 2\n", "sets seed twice"),
        ("seed: !!python/object/apply:os.getpid []\n", "is not valid YAML"),
    ],
)
def test_resolve_recipe_rejects_invalid_files(tmp_path, text, problem):
    path = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=f"mine.yaml {problem}"):
        recipes.resolve_recipe("7b", file=path)


def test_resolve_recipe_raises_if_the_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        recipes.resolve_recipe("7b", file=tmp_path / "none.yaml")


def test_resolve_recipe_rejects_presets_without_a_recipe(monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown preset '8b'.*_13b, .*nano"):
        recipes.preset_recipe("8b")
    bare = dataclasses.replace(presets.find("7b"), name="bare", recipe={})
    registry = {**presets.registry(), "bare": bare}
    monkeypatch.setattr(presets, "registry", lambda: registry)
    with pytest.raises(ValueError, match=r"No recipe is known for 'bare'.*_3b, "):
        recipes.resolve_recipe("bare")


def test_resolve_recipe_rejects_incomplete_presets(monkeypatch):
    def resolved(settings):
        preset = dataclasses.replace(presets.find("7b"), recipe=settings)
        with monkeypatch.context() as patch:
            patch.setattr(presets, "find", lambda name: preset)
            return recipes.resolve_recipe("7b")

    complete = presets.find("7b").recipe
    assert resolved(complete) == recipes.resolve_recipe("7b")
    with pytest.raises(ValueError, match=r"recipe of open_llama_7b lacks beta_1, pack"):
        resolved({k: v for k, v in complete.items() if k not in ("beta_1", "packing")})
    with pytest.raises(ValueError, match=r"'value' and 'source'.*seed=\{'value': 1\}"):
        resolved({**complete, "seed": {"value": 1}})
    with pytest.raises(ValueError, match=r"open_llama_7b: `seed` must be"):
        resolved({**complete, "seed": {"value": -1, "source": "heuristic: no reason"}})


# ----- ResolvedRecipe.to_json

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "mixture": st.sampled_from([None, "v1", "v2", "mine.json"]),
        "steps": st.integers(1, 10**9),
        "learning_rate": st.floats(1e-3, 1e6),  # Above every final rate.
        "beta_2": st.floats(0, 1, exclude_max=True),
        "epsilon": st.floats(5e-324, 1),
        "mask_documents": st.booleans(),
        "meshes": st.integers(1, 10**6).map(lambda n: {str(n): {"data": n}}),
        "seed": st.integers(0, 2**70),
    },
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), CHANGES)
def test_to_json_is_lossless(name, changes):
    resolved = recipes.resolve_recipe(name, overrides=changes)
    stored = json.loads(json.dumps(resolved.to_json(), allow_nan=False))
    assert stored["preset"] == name
    for setting, entry in stored["recipe"].items():
        assert entry["value"] == getattr(resolved.recipe, setting)
        assert entry["source"] == resolved.sources[setting]


# ----- ResolvedRecipe.table


@pytest.mark.parametrize("name", NAMES)
def test_table_has_a_line_per_setting_and_at_most_100_columns(name, tmp_path):
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    path = yaml_file(folder, f"mixture: {folder}/mixture.json\nsteps: 100_000\n")
    resolved = recipes.resolve_recipe(name, file=path, overrides={"seed": 3})
    header, *lines = resolved.table().splitlines()
    assert header.split() == ["setting", "value", "from"]
    assert [line.split()[0] for line in lines] == list(recipes.SETTINGS)
    assert max(map(len, [header, *lines])) <= 100
    rows = {line.split()[0]: line for line in lines}
    assert rows["seed"].split()[1:] == ["3", "command", "line"]
    assert rows["steps"].split()[1] == "100000"
    assert rows["steps"].endswith("mine.yaml")
    assert "mixture.json" in rows["mixture"]
    starts = {row.index(row.split(maxsplit=2)[1]) for row in lines}
    assert starts == {len("final_learning_rate") + 2}


def test_table_shortens_github_urls():
    table = recipes.resolve_recipe("7b").table()
    assert " young-geng/EasyLM/examples/pretrain_llama_7b.sh" in table
    assert " 8-512 chips " in table
    assert (
        " openlm-research/open_llama#74 (half" in recipes.resolve_recipe("13b").table()
    )
    assert re.search(r"meshes +1 chips ", recipes.resolve_recipe("nano").table())
    assert re.search(r"mixture +none ", recipes.resolve_recipe("nano").table())


def test_importing_recipe_imports_no_backend():
    program = (
        "import sys\nfrom keras_openllama.runs import recipe\n"
        "recipe.resolve_recipe('7b')\n"
        "heavy = {'keras', 'jax', 'tensorflow', 'torch', 'numpy'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr
