"""Recipes: what the presets say, what changes them, and what is refused."""

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


# ----- What the presets say


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_a_recipe(name):
    recipe = recipes.from_preset(name)
    assert recipe == recipes.from_preset(name.removeprefix("open_llama_"))
    assert recipe.mixture is None or recipe.mixture in mixtures.available()
    assert recipe.packing in PACKINGS
    context = presets.find(name).config["max_sequence_length"]
    assert recipe.sequence_length == context


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_published_somewhere_or_ours(name):
    stated = presets.find(name).recipe
    for entry in stated.values():
        assert entry.keys() == {"value", "source"}
        assert re.match(r"https://\S+|ours: \w", entry["source"])
    sources = recipes.resolve(name).sources
    assert sources.keys() == recipes.SETTINGS.keys()
    for setting, source in sources.items():
        assert source == stated.get(setting, {"source": "default: ours"})["source"]


@pytest.mark.parametrize("name", LARGE)
def test_what_the_large_models_have_in_common(name):
    recipe = recipes.from_preset(name)
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


def test_7b_is_easylms_run():
    recipe = recipes.from_preset("7b")
    assert recipe.tokens_per_step == 4_194_304
    assert (recipe.steps, recipe.learning_rate) == (250_000, 3e-4)
    assert recipe.mesh_for(256) == {"data": 4, "fsdp": 64, "model": 1}
    sources = recipes.resolve("7b").sources
    for setting in ("batch_size", "steps", "learning_rate", "warmup_steps", "meshes"):
        assert "examples/pretrain_llama_7b.sh" in sources[setting]


def test_13b_halves_rate_and_batch_of_7b():
    small, large = recipes.from_preset("7b"), recipes.from_preset("13b")
    assert large.learning_rate == small.learning_rate / 2
    assert large.tokens_per_step == small.tokens_per_step / 2
    assert large.steps == small.steps * 2
    sources = recipes.resolve("13b").sources
    for setting in ("learning_rate", "batch_size"):
        assert "openlm-research/open_llama/issues/74" in sources[setting]
    assert sources["steps"].startswith("ours")


@pytest.mark.parametrize("name", ["3b", "3b_v2", "3b_v3"])
def test_what_3b_never_published_is_ours(name):
    sources = recipes.resolve(name).sources
    for setting in ("batch_size", "steps", "learning_rate"):
        assert sources[setting].startswith("ours")


def test_3b_v3_is_pretrained_as_3b_v2():
    assert presets.find("3b_v3").recipe == presets.find("3b_v2").recipe
    assert recipes.from_preset("7b_v2") == recipes.from_preset("7b").replace(
        mixture="v2"
    )


def test_nano_trains_in_minutes_on_a_cpu():
    recipe = recipes.from_preset("nano")
    assert recipe.steps * recipe.tokens_per_step == 300 * 16 * 256
    assert (recipe.learning_rate, recipe.final_learning_rate) == (3e-3, 3e-4)
    assert (recipe.precision, recipe.rematerialize) == ("float32", "none")
    assert recipe.mixture is None
    assert recipe.mesh_for(1) == {"data": 1, "fsdp": 1, "model": 1}


@pytest.mark.parametrize("name", NAMES)
def test_meshes_use_every_chip_and_divide_the_batch(name):
    recipe = recipes.from_preset(name)
    for chips, mesh in recipe.meshes.items():
        assert math.prod(mesh.values()) == int(chips)
        assert recipe.batch_size % (mesh["data"] * mesh["fsdp"]) == 0
        assert recipe.mesh_for(int(chips)) == mesh


# ----- Changes


def test_the_command_line_goes_before_the_file_and_the_file_before_the_preset(tmp_path):
    path = yaml_file(tmp_path, "batch_size: 64\nseed: 7\nmixture: null\n")
    resolved = recipes.resolve("7b", file=path, overrides={"seed": 8})
    expected = recipes.from_preset("7b").replace(batch_size=64, seed=8, mixture=None)
    assert resolved.preset == "open_llama_7b"
    assert resolved.recipe == expected
    assert resolved.sources["batch_size"] == str(path)
    assert resolved.sources["mixture"] == str(path)
    assert resolved.sources["seed"] == "command line"
    assert resolved.sources["save_every"] == "default: ours"
    assert resolved.sources["steps"] == recipes.resolve("7b").sources["steps"]


@pytest.mark.parametrize("written", ["3e-4", "'0.0003'", "0.0003", "3.0e-4"])
def test_rates_may_be_written_as_people_write_them(tmp_path, written):
    path = yaml_file(tmp_path, f"learning_rate: {written}\n")
    assert recipes.resolve("7b", file=path).recipe.learning_rate == 3e-4


@settings(max_examples=100, deadline=None)
@given(st.floats(1e-4, 10, exclude_min=True), st.sampled_from(["", ".3e", ".17g"]))
def test_any_rate_comes_out_of_yaml_as_it_went_in(tmp_path_factory, rate, how):
    text = format(rate, how)
    path = yaml_file(tmp_path_factory.getbasetemp(), f"learning_rate: {text}\n")
    assert recipes.resolve("7b", file=path).recipe.learning_rate == float(text)


def test_yaml_gives_meshes_by_number_of_chips(tmp_path):
    path = yaml_file(tmp_path, "meshes: {8: {fsdp: 4, model: 2}}\nclip_norm: 1\n")
    recipe = recipes.resolve("7b", file=path).recipe
    assert recipe.meshes == {"8": {"data": 1, "fsdp": 4, "model": 2}}
    assert type(recipe.clip_norm) is float


def test_a_file_of_comments_changes_nothing(tmp_path):
    path = yaml_file(tmp_path, "# steps: 20\n")
    assert recipes.resolve("7b", file=path) == recipes.resolve("7b")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000))
def test_fewer_steps_shorten_the_warm_up_and_say_so(steps):
    resolved = recipes.resolve("7b", overrides={"steps": steps})
    warmup = resolved.recipe.warmup_steps
    if steps > 2000:
        assert warmup == 2000
        assert resolved.sources["warmup_steps"].startswith("https://")
    else:
        assert warmup == (max(1, steps // 10) if steps > 1 else 0)
        assert "shortened with steps, from 2000" in resolved.sources["warmup_steps"]


def test_a_warm_up_that_was_given_is_never_shortened(tmp_path):
    path = yaml_file(tmp_path, "warmup_steps: 50\n")
    with pytest.raises(ValueError, match=r"Give `warmup_steps` too.*steps=20"):
        recipes.resolve("7b", file=path, overrides={"steps": 20})
    overrides = {"steps": 20, "warmup_steps": 5}
    assert recipes.resolve("7b", file=path, overrides=overrides).recipe.steps == 20
    with pytest.raises(ValueError, match=r"Give `warmup_steps` too"):
        recipes.from_preset("7b").replace(steps=20)


def test_changes_leave_the_presets_alone():
    recipes.from_preset("7b").meshes["256"]["data"] = 99
    recipes.from_preset("7b").mesh_for(256)["data"] = 99
    assert recipes.from_preset("7b").mesh_for(256)["data"] == 4


# ----- Meshes


def test_an_unknown_number_of_chips_is_all_fsdp_and_that_is_ours():
    resolved = recipes.resolve("nano")
    assert resolved.recipe.mesh_for(4) == {"data": 1, "fsdp": 4, "model": 1}
    assert resolved.mesh_source(4).startswith("ours: the recipe has no mesh for 4")
    assert resolved.mesh_source(1) == resolved.sources["meshes"]


def test_a_number_of_chips_is_a_number():
    with pytest.raises(ValueError, match=r"`chips` must be a positive integer"):
        recipes.from_preset("7b").mesh_for(0)


# ----- What is planned for a number of chips


def resolved_with(plan, **overrides):
    planned = {"256": plan}
    return recipes.resolve("7b", overrides={"planned": planned, **overrides})


def test_a_plan_gives_parts_of_the_batch_and_what_is_kept():
    resolved = resolved_with({"rows": 4, "rematerialize": "products"})
    recipe = resolved.on(256).recipe  # 8 rows for each chip.
    assert (recipe.micro_batches, recipe.rematerialize) == (2, "products")
    assert resolved.on(256).sources["micro_batches"] == "command line"
    assert resolved.on(64) == resolved  # Nothing is planned for them.


@pytest.mark.parametrize(
    "change",
    [{"precision": "float32"}, {"sequence_length": 4096}, {"batch_size": 1001}],
)
def test_a_plan_is_for_what_it_was_made_for(change):
    resolved = resolved_with({"rows": 4, "rematerialize": "products"}, **change)
    assert resolved.on(256) == resolved


def test_what_is_given_goes_before_what_is_planned():
    plan = {"rows": 4, "rematerialize": "products"}
    recipe = resolved_with(plan, rematerialize="full").on(256).recipe
    assert (recipe.micro_batches, recipe.rematerialize) == (2, "full")


@pytest.mark.parametrize(
    ("batch_size", "mesh", "parts"),
    [(2048, None, 2), (256, None, 1), (1536, None, 2), (2048, (1, 128, 2), 4)],
)
def test_rows_at_a_time_are_at_most_those_planned(batch_size, mesh, parts):
    plan = {"rows": 4, "rematerialize": "products"}
    mesh = mesh and dict(zip(("data", "fsdp", "model"), mesh, strict=True))
    recipe = resolved_with(plan, batch_size=batch_size).on(256, mesh).recipe
    assert recipe.micro_batches == parts


@pytest.mark.parametrize("name", NAMES)
def test_what_is_planned_divides_the_batch(name):
    resolved = recipes.resolve(name)
    for chips, plan in resolved.recipe.planned.items():
        recipe = resolved.on(int(chips)).recipe
        mesh = recipe.mesh_for(int(chips))
        rows = recipe.batch_size // (mesh["data"] * mesh["fsdp"])
        assert rows == recipe.micro_batches * plan["rows"]
        assert recipe.rematerialize == plan["rematerialize"]


@pytest.mark.parametrize(
    "plan", [{"rows": 4}, {"rows": 0, "rematerialize": "full"}, 4, {}]
)
def test_a_plan_is_rows_and_what_is_kept(plan):
    with pytest.raises(ValueError, match=r"planned\[256\]"):
        resolved_with(plan)


# ----- What is refused

WRONG = {
    "mixture": ["v3", "none", 2, ["v1"]],
    "planned": [8, [4], None, {"v4-8": {"rows": 1, "rematerialize": "full"}}],
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


def test_every_setting_is_checked():
    assert WRONG.keys() == recipes.SETTINGS.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]]
)
def test_a_wrong_value_is_named_with_what_would_be_right(name, value):
    message = re.escape(f"Received: {name}={value!r}")
    with pytest.raises(ValueError, match=rf"^command line: `{name}` must.*{message}"):
        recipes.resolve("7b", overrides={name: value})
    with pytest.raises(ValueError, match=rf"^`{name}` must"):
        recipes.from_preset("7b").replace(**{name: value})


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 4}, {"fsdp": 8, "rows": 1}, {"fsdp": -8, "data": -1}, {"fsdp": 8.0}, 8],
)
def test_a_mesh_that_is_not_its_chips_is_refused(axes):
    with pytest.raises(ValueError, match=r"`meshes\[8\]` must.*number of chips"):
        recipes.resolve("7b", overrides={"meshes": {8: axes}})


def test_settings_must_fit_each_other():
    recipe = recipes.from_preset("7b")
    with pytest.raises(ValueError, match=r"not be above the peak.*final_learning_rate"):
        recipe.replace(learning_rate=1e-5)
    with pytest.raises(ValueError, match=r"must divide `batch_size`.*micro_batches=3"):
        recipe.replace(micro_batches=3)


def test_an_unknown_setting_brings_the_nearest_to_mind(tmp_path):
    path = yaml_file(tmp_path, "warm_up_steps: 5\n")
    with pytest.raises(ValueError, match=r"mine.yaml: .*Did you mean 'warmup_steps'"):
        recipes.resolve("7b", file=path)
    with pytest.raises(ValueError, match=r"command line: .*Did you mean 'batch_size'"):
        recipes.resolve("7b", overrides={"batchsize": 5})
    with pytest.raises(
        ValueError, match=r"setting 'x'\. Its settings: sequence_length"
    ):
        recipes.from_preset("7b").replace(x=1)
    path = yaml_file(tmp_path, "1: 5\n")
    with pytest.raises(ValueError, match=r"no setting 1\."):
        recipes.resolve("7b", file=path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("steps: [1", "is not YAML"),
        ("- steps\n- 5\n", "must map settings to values"),
        ("steps", "must map settings to values"),
        ("seed: 1\nsteps: 5\nseed: 2\n", "sets seed twice"),
        ("seed: !!python/object/apply:os.getpid []\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, problem):
    path = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=f"mine.yaml {problem}"):
        recipes.resolve("7b", file=path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        recipes.resolve("7b", file=tmp_path / "none.yaml")


def test_a_preset_without_a_recipe_is_refused_with_those_that_have_one(monkeypatch):
    with pytest.raises(ValueError, match=r"no preset '8b'.*open_llama_13b, .*nano"):
        recipes.from_preset("8b")
    bare = dataclasses.replace(presets.find("7b"), name="bare", recipe={})
    registry = {**presets.registry(), "bare": bare}
    monkeypatch.setattr(presets, "registry", lambda: registry)
    with pytest.raises(ValueError, match=r"No recipe is known for 'bare'.*_3b, "):
        recipes.resolve("bare")


def test_a_recipe_with_holes_is_refused(monkeypatch):
    def resolved(settings):
        preset = dataclasses.replace(presets.find("7b"), recipe=settings)
        with monkeypatch.context() as patch:
            patch.setattr(presets, "find", lambda name: preset)
            return recipes.resolve("7b")

    whole = presets.find("7b").recipe
    assert resolved(whole) == recipes.resolve("7b")
    with pytest.raises(ValueError, match=r"recipe of open_llama_7b lacks beta_1, pack"):
        resolved({k: v for k, v in whole.items() if k not in ("beta_1", "packing")})
    with pytest.raises(ValueError, match=r"'value' and 'source'.*seed=\{'value': 1\}"):
        resolved({**whole, "seed": {"value": 1}})
    with pytest.raises(ValueError, match=r"open_llama_7b: `seed` must be"):
        resolved({**whole, "seed": {"value": -1, "source": "ours: no reason"}})


# ----- The record of a run

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
def test_json_can_hold_a_recipe(name, changes):
    resolved = recipes.resolve(name, overrides=changes)
    stored = json.loads(json.dumps(resolved.to_json(), allow_nan=False))
    assert stored["preset"] == name
    for setting, entry in stored["recipe"].items():
        assert entry["value"] == getattr(resolved.recipe, setting)
        assert entry["source"] == resolved.sources[setting]


# ----- The table


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_a_line_for_each_setting_and_fits_the_terminal(name, tmp_path):
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    path = yaml_file(folder, f"mixture: {folder}/mixture.json\nsteps: 100_000\n")
    resolved = recipes.resolve(name, file=path, overrides={"seed": 3})
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


def test_the_table_shows_the_file_in_its_repository():
    table = recipes.resolve("7b").table()
    assert " young-geng/EasyLM/examples/pretrain_llama_7b.sh" in table
    assert " 8-512 chips " in table
    assert " openlm-research/open_llama#74 (half" in recipes.resolve("13b").table()
    assert re.search(r"meshes +1 chips ", recipes.resolve("nano").table())
    assert re.search(r"mixture +none ", recipes.resolve("nano").table())


def test_reading_recipes_imports_no_backend():
    program = (
        "import sys\nfrom keras_openllama.runs import recipe\n"
        "recipe.resolve('7b')\n"
        "heavy = {'keras', 'jax', 'tensorflow', 'torch', 'numpy'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "[]\n", result.stderr
