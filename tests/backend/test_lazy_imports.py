"""Importing the package does not wait for packages that only Keras would import."""

import importlib
import os
import subprocess
import sys
import threading
import types

import keras
import pytest
from checkout import ROOT

from keras_openllama.backend import lazy_imports

OTHER_BACKENDS = {"tensorflow", "torch"} - {keras.config.backend()}
UNUSED = {"matplotlib", "nltk", "pandas", "sklearn", "transformers", *OTHER_BACKENDS}
if keras.config.backend() != "tensorflow":  # TensorFlow imports it.
    UNUSED.add("scipy")
IMPORT = "from keras_openllama import OpenLlamaCausalLM\n"


def run_python(program):
    """Runs a program in a new process; returns what it prints, by line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    out = subprocess.check_output(command, env=environment, text=True)
    return out.splitlines()


def test_import_does_not_execute_what_keras_imports_for_others():
    program = (
        f"import sys\n{IMPORT}"
        f"print(sorted({UNUSED} & {{*sys.modules}}))\n"
        "print('orbax.checkpoint' in sys.modules)\n"  # Grain imports it.
        "print([m for m in sys.modules.values() if '_LazyModule' == type(m).__name__])"
    )
    assert run_python(program) == ["[]", "False", "[]"]


@pytest.mark.backend_free
def test_generate_imports_neither_other_backends_nor_what_keras_imports_for_others():
    program = (
        "import sys\n"
        "from keras_openllama.__main__ import main\n"
        "main(['generate', 'The', '--preset', 'nano', '--max-new-tokens', '1'])\n"
        f"unused = {{'orbax.checkpoint', *{UNUSED}}}\n"
        "print(sorted({'keras_hub', *unused} & {*sys.modules}))"
    )
    assert run_python(program)[-1] == "['keras_hub']"


@pytest.mark.backend_free
def test_lazy_modules_of_keras_work_after_the_import():
    program = (
        f"{IMPORT}import keras, keras_hub, numpy as np, pandas as pd\n"
        "from sklearn.linear_model import LinearRegression\n"
        "from keras.wrappers import SKLearnClassifier\n"
        "print(issubclass(SKLearnClassifier, LinearRegression.__mro__[-2]))\n"
        "print(keras.visualization.plot_image_gallery.__name__)\n"
        "print('plot_segmentation_mask_gallery' in dir(keras.visualization))\n"
        "print(keras_hub.metrics.RougeL.__name__)\n"
        "import grain, kagglehub\n"
        "print(list(grain.MapDataset.range(3)))\n"
        "print(callable(kagglehub.model_download), kagglehub.__version__ > '')\n"
        "model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])\n"
        "model.compile('sgd', 'mse')\n"
        "table = pd.DataFrame({'x': [1.0, 2.0]})\n"
        "model.fit(table, np.ones(2), verbose=0, validation_split=0.5)\n"
        "print(model.predict(table, verbose=0).shape)"
    )
    assert run_python(program) == [
        *("True", "plot_image_gallery", "True", "RougeL", "[0, 1, 2]", "True True"),
        "(2, 1)",
    ]


@pytest.mark.skipif(keras.config.backend() != "jax", reason="Modules of JAX.")
def test_lazy_modules_of_jax_work_after_the_import():
    program = (
        f"{IMPORT}from jax.experimental import sparse\n"
        "from jax.experimental.pallas.ops.tpu import splash_attention\n"
        "print(sparse.linalg.spsolve.__name__)\n"
        "print(splash_attention.CausalMask((2, 2))[:, :].tolist())\n"
        "print(splash_attention.splash_attention_kernel.BlockSizes.__name__)"
    )
    assert run_python(program) == [
        *("spsolve", "[[True, False], [True, True]]", "BlockSizes")
    ]


@pytest.mark.backend_free
@pytest.mark.parametrize("first", ["import keras_openllama", IMPORT])
def test_importing_a_broken_optional_package_fails_as_usual(first, tmp_path):
    (tmp_path / "grain.py").write_text("raise ImportError('libexample.so')")
    program = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{first}\n"
        "try:\n    import grain\nexcept ImportError as error:\n    print(error)\n"
        "user = [m for n, m in sys.modules.items() if n.endswith('pipeline_model')]\n"
        "try:\n    user[0].grain.MapDataset\n"
        "except (ImportError, IndexError) as error:\n    print(error)"
    )
    imported, used = run_python(program)
    assert imported == "libexample.so"
    if first == IMPORT:
        assert "grain is installed, but cannot be imported: libexample.so." in used
        assert "uninstall it" in used


@pytest.mark.backend_free
def test_reload_executes_a_lazy_module_of_keras():
    program = (
        f"{IMPORT}import importlib, keras\n"
        "print(importlib.reload(keras.wrappers) is keras.wrappers)\n"
        "print(keras.wrappers.SKLearnClassifier.__name__)\n"
        "print('SKLearnClassifier' in dir(keras.wrappers))"
    )
    assert run_python(program) == ["True", "SKLearnClassifier", "True"]


@pytest.mark.skipif(keras.config.backend() != "torch", reason="Modules of PyTorch.")
def test_torch_compile_works_after_the_import():
    program = (
        f"import sys\n{IMPORT}"
        "unused = {'torch._dynamo', 'torch.onnx', 'sympy'}\n"
        "print(sorted(unused & {*sys.modules}))\n"
        "import keras, torch\n"
        "draw = lambda: keras.random.uniform((), seed=keras.random.SeedGenerator(1))\n"
        "first = float(draw())\n"
        "print(sorted(unused & {*sys.modules}))\n"
        "double = torch.compile(lambda x: 2 * x, backend='eager', fullgraph=True)\n"
        "print(double(torch.ones(1)).tolist(), float(draw()) == first)\n"
        "compiled = torch.compile(lambda: 2 * draw(), backend='eager')\n"
        "print(float(compiled()) == 2 * first)"
    )
    assert run_python(program) == ["[]", "[]", "[2.0] True", "True"]


@pytest.fixture
def lazy_example(tmp_path, monkeypatch):
    """Returns a function that makes `lazy_example` a lazy module with some source."""

    def create(source):
        (tmp_path / "lazy_example.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(lazy_imports, "_LAZY_MODULES", {"lazy_example"})
        with lazy_imports._finder.lazy():
            import lazy_example
        assert "lazy_example" not in sys.modules
        return lazy_example

    yield create
    sys.modules.pop("lazy_example", None)


@pytest.mark.backend_free
def test_lazy_module_is_executed_once_by_several_threads(lazy_example, capsys):
    module = lazy_example(
        "import time\nprint('executed')\ntime.sleep(0.05)\nvalue = 7\n"
    )
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(module.value)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 4
    assert capsys.readouterr().out == "executed\n"


@pytest.mark.backend_free
def test_lazy_module_is_not_executed_by_imports_and_inspection(lazy_example, capsys):
    module = lazy_example("print('executed')\nvalue = 7\n")
    assert module.__file__.endswith("lazy_example.py")
    assert module.__loader__.get_source("lazy_example").endswith("value = 7\n")
    assert not hasattr(module, "__path__")
    assert not capsys.readouterr().out
    assert "value" in dir(module)
    assert capsys.readouterr().out == "executed\n"
    assert not hasattr(module, "other")


@pytest.mark.backend_free
def test_import_executes_a_lazy_module_in_place(lazy_example, capsys):
    module = lazy_example("print('executed')\nvalue = 7\n")
    import lazy_example as imported

    assert capsys.readouterr().out == "executed\n"
    assert imported is module
    assert importlib.reload(module) is module
    assert type(module) is types.ModuleType


@pytest.mark.backend_free
def test_lazy_module_repeats_an_error_of_its_execution(lazy_example):
    module = lazy_example("import lazy_example\nlazy_example.missing\n")
    for _ in range(2):
        with pytest.raises(AttributeError, match=r"lazy_example.* 'missing'"):
            getattr(module, "value")  # noqa: B009
